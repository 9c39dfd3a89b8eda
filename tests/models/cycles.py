"""A hybrid model of any width whose head has a known share of right words in each class of prompts.

The words are split into cycles of one length, a class each. A text stays in the cycle in which it
starts, and the last token of the prompt says which that is: a word its own, any other token the
cycle of the remainder of its distance from the digit 0, so that a prompt that ends in the digit 3
starts cycle 3. The chat template cuts a prompt short and ends in a digit.

Every word has a direction of its own, orthogonal to all others, in the residual stream. The token
embeddings of the trunk and those of the head mix the directions of a few words so that the logits
are the logarithms of chosen probabilities. The trunk says the next word of the cycle with
``certainty`` and the one after it otherwise. The head, which reads nothing but the token, is right
after a chosen share of the words of each cycle, and says how sure it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import models
from llama_mtp.measure.pairs import PROMPTS

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.4, 0.2, 0.0)
PERIOD = 100  # words of a cycle
N_TRUNK = 4
N_FF = 256
FIRST = 24  # characters of a prompt that the chat template keeps
PEAK = (
    20.0  # length of the vector of all logits: what is not chosen keeps e^-10 or less of the rest
)


@dataclass(frozen=True)
class Cycles:
    """A written model.

    ``model.follow`` and ``model.heads[0]`` are what the trunk finds most likely after a token, and
    the head; :func:`models.expected_acceptance` follows from them.
    """

    model: models.Model
    words: models.Tokens  # [n_cycles, period]: in the order of the text
    sure: npt.NDArray[np.bool_]  # [n_cycles, period]: whether the head is sure of what follows

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """[n_cycles, period]: whether the head is right about what follows the word."""
        right: npt.NDArray[np.bool_] = (
            self.model.heads[0][self.words] == self.model.follow[self.words]
        )
        return right


def build(
    path: Path,
    *,
    n_embd: int = 1024,
    shares: Sequence[float] = SHARES,
    period: int = PERIOD,
    certainty: float = 0.85,
    confident: float = 0.9,
    doubtful: float = 0.4,
    mistaken: float = 0.1,
    state_scale: float = 0.1,
    n_vocab: int = 0,
    prompts: Mapping[str, str] = PROMPTS,
    seed: int = 1,
) -> Cycles:
    """Write a qwen35 model to ``path``, in F32.

    Args:
        n_embd: width, more than ``period * len(shares)``; a multiple of 256 takes every ggml type.
        shares: of the words of each cycle after which the head is right.
        period: words of a cycle.
        certainty: probability that the trunk gives to the next word; the rest is for the one after
            it, in the same cycle.
        confident, doubtful: probability that the head gives to its best word where it is sure and
            where it is not.
        mistaken: share of the right words of which the head is not sure, and of the wrong ones of
            which it is.
        state_scale: what a block adds, the token's own direction being 1.
        n_vocab: tokens in all, 0 for as many as are needed: words that no text has make the output
            matrix as large as a real one.
        prompts: class by class what a user says; the chat template ends the k-th in the digit of
            cycle k modulo their number, and any other text in that of its length.

    Raises ValueError for sizes and probabilities that cannot be had.
    """
    n_words = period * len(shares)
    if not 1 <= len(shares) <= 10 or period < 4 or n_words >= n_embd:
        raise ValueError(
            f"{len(shares)} cycles of {period} words do not fit a width of {n_embd}; "
            "take up to ten cycles, of four words or more, and fewer words than the width."
        )
    if not all(0.5 < p < 1.0 for p in (certainty, confident)) or not 0.25 < doubtful < 1.0:
        raise ValueError(
            "The best word would not be the best; "
            "certainty and confident lie in 0.5 to 1, doubtful in 0.25 to 1."
        )
    rng = np.random.default_rng(seed)
    words = models.FIRST_WORD + rng.permutation(n_words).reshape(len(shares), period)
    end = models.FIRST_WORD + n_words
    n_vocab = max(n_vocab, end)
    silent = np.r_[: models.FIRST_WORD, end:n_vocab]

    # Dimension 0 is constant and keeps all that are no words of a cycle out of the text.
    direction = np.zeros((n_words, n_embd), dtype=np.float32)
    direction[:, 1:] = np.linalg.qr(rng.normal(size=(n_embd - 1, n_words)))[0].T
    output = np.zeros((n_vocab, n_embd), dtype=np.float32)
    output[models.FIRST_WORD : end] = direction * PEAK / np.sqrt(n_embd)
    output[end:] = rng.standard_normal((n_vocab - end, n_embd), dtype=np.float32)
    output[end:] *= PEAK / n_embd
    output[silent, 0] = -2 * PEAK

    # What comes one, two, three, four words after a token, by the distance less one.
    after = np.empty((n_vocab, 4), dtype=np.int64)
    lead = words[(silent - models.N_SPECIAL - ord("0")) % len(shares)]
    start = rng.integers(0, period, len(silent))
    for ahead in range(4):
        after[words, ahead] = np.roll(words, -1 - ahead, axis=1)
        after[silent, ahead] = np.take_along_axis(lead, (start[:, None] + ahead) % period, axis=1)[
            :, 0
        ]

    right = np.ones(n_vocab, dtype=bool)
    sure = np.ones(n_vocab, dtype=bool)
    for cycle, share in zip(words, shares, strict=True):
        right[cycle] = False
        right[rng.permutation(cycle)[: round(share * period)]] = True
        for kind in (cycle[right[cycle]], cycle[~right[cycle]]):
            sure[kind] = right[kind]
            swapped = rng.permutation(kind)[: round(mistaken * len(kind))]
            sure[swapped] = ~right[swapped]

    def mixed(odds: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Embeddings [n_vocab, n_embd] after which the words of ``after`` have these ``odds``."""
        weights = (_logits(odds) * np.sqrt(n_embd) / PEAK).astype(np.float32)
        rows = np.zeros((n_vocab, n_embd), dtype=np.float32)
        for ahead in range(4):
            rows += weights[:, ahead, None] * direction[after[:, ahead] - models.FIRST_WORD]
        rows[:, 0] = 1.0
        return rows

    trunk_odds = np.zeros((n_vocab, 4))
    trunk_odds[:, :2] = certainty, 1 - certainty
    best = np.where(right, 0, 1)
    head_odds = np.zeros((n_vocab, 4))
    every = np.arange(n_vocab)
    head_odds[every, best] = confident
    head_odds[every, 1 - best] = 1 - confident
    head_odds[~sure] = (1 - doubtful) / 3
    head_odds[every[~sure], best[~sure]] = doubtful

    il = N_TRUNK
    tensors: dict[str, npt.NDArray[Any]] = {
        "token_embd.weight": mixed(trunk_odds),
        "output_norm.weight": np.ones(n_embd),
        "output.weight": output,
        f"blk.{il}.nextn.embed_tokens.weight": mixed(head_odds),
        f"blk.{il}.nextn.eh_proj.weight": np.eye(n_embd, 2 * n_embd),
    }
    for norm in ("enorm", "hnorm", "shared_head_norm"):
        tensors[f"blk.{il}.nextn.{norm}.weight"] = np.ones(n_embd)
    for i in range(N_TRUNK + 1):
        tensors |= models.decoder_block(
            "qwen35",
            i,
            rng,
            0.0 if i == il else state_scale,
            recurrent=i != il and i % 2 == 0,
            n_embd=n_embd,
            n_ff=N_FF,
        )
    texts = {
        int(token): f"\u2581{chr(ord('a') + k)}{i}"
        for k, cycle in enumerate(words)
        for i, token in enumerate(cycle)
    }
    models.write_tensors(
        path,
        "qwen35",
        N_TRUNK,
        1,
        tensors,
        n_embd=n_embd,
        n_ff=N_FF,
        words=[texts.get(token, f"\u2581_{token}") for token in range(models.FIRST_WORD, n_vocab)],
        chat_template=_chat_template(list(prompts.values()), len(shares)),
    )
    heads = after[every, best]
    return Cycles(models.Model(path, "qwen35", after[:, 0], (heads,)), words, sure[words])


def _logits(odds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Logits [n, k] of rows of probabilities; 0 where that is 0. Each row has length ``PEAK``."""
    chosen = odds > 0
    logs = np.where(chosen, np.log(np.where(chosen, odds, 1.0)), 0.0)
    # c with sum((log p + c)^2) = PEAK^2 over those chosen, the larger of the two
    n, b, a = chosen.sum(axis=1), logs.sum(axis=1), (logs**2).sum(axis=1) - PEAK**2
    c = (-b + np.sqrt(b**2 - n * a)) / n
    logits: npt.NDArray[np.float64] = np.where(chosen, logs + c[:, None], 0.0)
    return logits


def _chat_template(prompts: Sequence[str], n_cycles: int) -> str:
    starts = [prompt[:FIRST] for prompt in prompts]
    if len(set(starts)) != len(starts):
        raise ValueError(f"Two prompts begin with the same {FIRST} characters.")
    known = json.dumps({start: str(k % n_cycles) for k, start in enumerate(starts)})
    return (
        f"{{% set known = {known} %}}{{% set text = messages[-1]['content'] %}}"
        f"{{% set start = text[:{FIRST}] %}}"
        f"{{{{ start }}}}{{{{ known.get(start, (text | length) % {n_cycles}) }}}}"
    )
