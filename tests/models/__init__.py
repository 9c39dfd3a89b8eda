"""Tiny GGUF models whose answers are known, written when the tests run.

The next word of a text is, but for what the blocks add, a fixed function ``follow`` of the current
one: a single cycle through all words. The residual stream carries the direction that the output
matrix reads as ``follow[token]``, and the words' directions are the orbit of one rotation, so one
matrix takes the direction of any word to that of the word after it. The blocks of the trunk have
small random weights: the KV cache and the recurrent state change the logits (``state_scale``: a
little, or so much that the text depends on all that came before).

The head is one of two. ``"embedding"`` reads only the token, through an embedding table of its own
that makes it right for chosen words and wrong for others. ``"hidden"`` reads only the hidden row
that it is given and turns it by one word: it is right as long as it gets the right row, and wrong
when it gets any other. Either way acceptance follows from the text alone
(:func:`expected_acceptance`), from that of a hidden head where ``state_scale`` is small.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

N_EMBD = 64
N_FF = 64
N_HEAD = 2
HEAD_DIM = 32
N_CTX_TRAIN = 2048
WINDOW = 48  # of mimo2's sliding-window layer
N_SPECIAL = 3  # <unk>, <s>, </s>
N_BYTES = 256
N_WORDS = 251  # prime: no rotation has a shorter cycle
FIRST_WORD = N_SPECIAL + N_BYTES
N_VOCAB = FIRST_WORD + N_WORDS
BOS, EOS = 1, 2
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

ARCHITECTURES = ("qwen35", "hy_v3", "mimo2")

Array = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Model:
    """A written model: where it is and what it is known to do."""

    path: Path
    arch: str
    follow: Tokens  # [n_vocab]: the word after a token, but for what the state adds
    heads: tuple[Tokens, ...]  # [n_vocab] each: what an embedding head predicts; else empty

    def text(self, n: int, seed: int = 0) -> list[int]:
        """Return ``n`` random words to prompt with."""
        rng = np.random.default_rng(seed)
        return [int(t) for t in rng.integers(FIRST_WORD, N_VOCAB, n)]

    def drafts(self, previous: int, last: int, depth: int) -> list[int]:
        """Return what the head drafts after ``last``, whose hidden row is that of ``previous``."""
        if not self.heads:
            last = int(self.follow[previous])
        drafts: list[int] = []
        for k in range(depth):
            step = self.heads[min(k, len(self.heads) - 1)] if self.heads else self.follow
            last = int(step[last])
            drafts.append(last)
        return drafts


@dataclass(frozen=True)
class Expectation:
    """What a generation must book: (drafted, sampled, accepted) of every round, in order."""

    rounds: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def drafted(self) -> int:
        return sum(r[0] for r in self.rounds)

    @property
    def accepted(self) -> int:
        return sum(r[2] for r in self.rounds)

    @property
    def accept_counts(self) -> set[int]:
        return {r[2] for r in self.rounds}

    def accepted_per_pos(self, depth: int) -> list[int]:
        return [sum(r[2] > pos for r in self.rounds) for pos in range(depth)]

    def tested_per_pos(self, depth: int) -> list[int]:
        return [sum(min(r[1], r[0]) > pos for r in self.rounds) for pos in range(depth)]


def expected_acceptance(
    model: Model, prompt: Sequence[int], emitted: Sequence[int], depth: int
) -> Expectation:
    """Follow from the text alone which drafts were accepted.

    ``emitted[0]`` comes from the prompt; every later token from a round of ``depth`` drafts.
    """
    rounds: list[tuple[int, int, int]] = []
    text = [prompt[-1], *emitted]
    at = 1
    while at + 1 < len(text):
        drafts = model.drafts(text[at - 1], text[at], depth)
        rest = text[at + 1 : at + 2 + depth]
        accepted = 0
        while accepted < min(len(rest), depth) and drafts[accepted] == rest[accepted]:
            accepted += 1
        sampled = min(accepted + 1, len(rest))
        rounds.append((depth, sampled, accepted))
        at += sampled
    return Expectation(rounds)


def assert_acceptance(
    stats: Any, model: Model, prompt: list[int], emitted: list[int], depth: int
) -> Expectation:
    """Compare what a generation booked with what follows from its text; return the latter."""
    expected = expected_acceptance(model, prompt, emitted, depth)
    assert stats.num_rounds == len(expected.rounds)
    assert stats.num_draft_tokens == expected.drafted
    assert stats.num_accepted_tokens == expected.accepted
    assert stats.num_emitted_tokens == len(emitted) - 1  # the first token comes from the prompt
    assert stats.num_accepted_per_pos == expected.accepted_per_pos(depth)
    assert stats.num_tested_per_pos == expected.tested_per_pos(depth)
    assert stats.num_target_decodes == len(expected.rounds)
    return expected


@dataclass(frozen=True)
class Words:
    """The cycle of the words, and the directions of the residual stream that stand for them."""

    words: Tokens  # [n_words]: in the order of the cycle
    place: Tokens  # [n_vocab]: where in the cycle the word after a token stands
    direction: npt.NDArray[np.float64]  # [n_words, n_embd], by place
    rotation: npt.NDArray[np.float64]  # [n_embd, n_embd]: takes a direction to the next one
    token_embd: npt.NDArray[np.float64]  # [n_vocab, n_embd]
    output: npt.NDArray[np.float64]  # [n_vocab, n_embd]


def lay_out_words(
    rng: np.random.Generator, n_embd: int = N_EMBD, *, sharpness: float = 1.0
) -> Words:
    """Choose the cycle and the directions; ``n_embd`` is even and at most 502."""
    # One cycle through the words; bytes and special tokens lead into it.
    words = rng.permutation(np.arange(FIRST_WORD, N_VOCAB))
    place = np.empty(N_VOCAB, dtype=np.int64)
    place[words] = np.arange(1, N_WORDS + 1) % N_WORDS
    place[:FIRST_WORD] = rng.integers(0, N_WORDS, FIRST_WORD)

    # One constant dimension (it keeps bytes and special tokens out of the text), one unused, and
    # planes that turn by their own angle per word.
    planes = n_embd // 2 - 1
    angles = 2 * np.pi * rng.choice(np.arange(1, N_WORDS), planes, replace=False) / N_WORDS
    turns = np.arange(N_WORDS)[:, None] * angles[None, :]
    direction = np.zeros((N_WORDS, n_embd))
    direction[:, 0] = 1.0
    direction[:, 2::2] = np.cos(turns)
    direction[:, 3::2] = np.sin(turns)
    rotation = np.eye(n_embd)
    for k, angle in enumerate(angles):
        i = 2 + 2 * k
        rotation[i, i] = rotation[i + 1, i + 1] = np.cos(angle)
        rotation[i + 1, i] = np.sin(angle)
        rotation[i, i + 1] = -np.sin(angle)

    # A part of its own lets the state tell tokens apart that lead to the same word.
    own = rng.normal(0, 0.4, (N_VOCAB, n_embd))
    own[:, :2] = 0
    output = np.zeros((N_VOCAB, n_embd))
    output[words] = direction
    output[words, 0] = 0
    output[:FIRST_WORD, 0] = -40.0
    output *= 2 * sharpness / np.sqrt(n_embd)
    return Words(words, place, direction, rotation, direction[place] + own, output)


def build(
    path: Path,
    arch: str,
    *,
    head: str | None = "embedding",
    n_heads: int = 1,
    right: float = 0.75,
    state_scale: float = 0.25,
    sharpness: float = 1.0,
    n_trunk: int | None = None,
    drop_head_tensors: bool = False,
    head_only: bool = False,
    seed: int = 1,
) -> Model:
    """Write a model to ``path``.

    Args:
        arch: one of ``ARCHITECTURES``: hybrid, attention only, and sliding-window with a gathering
            MTP graph.
        head: ``"embedding"``, ``"hidden"``, or ``None`` for a file that declares no head.
        n_heads: NextN blocks (more than one: mimo2 and hy_v3 only); each is right for other words.
        right: share of the words after which an embedding head is right.
        state_scale: size of what a block adds, the token's own direction being 1. 0.25 bends the
            logits, 1 and more makes the text depend on its history.
        sharpness: scale of the logits; at 1 the most likely word has a probability near 0.8.
        drop_head_tensors: keep the head's declaration, leave its tensors out.
        head_only: leave the trunk's blocks out, as llama.cpp's ``--mtp`` conversion does.
    """
    rng = np.random.default_rng(seed)
    trunk = n_trunk if n_trunk is not None else (4 if arch == "qwen35" else 2)
    n_nextn = n_heads if head is not None else 0

    laid = lay_out_words(rng, sharpness=sharpness)
    words, place = laid.words, laid.place

    tensors: dict[str, npt.NDArray[Any]] = {
        "token_embd.weight": laid.token_embd,
        "output_norm.weight": np.ones(N_EMBD),
        "output.weight": laid.output,
    }
    for il in range(trunk):
        tensors |= decoder_block(
            arch, il, rng, state_scale, recurrent=arch == "qwen35" and il % 2 == 0
        )

    heads: list[Tokens] = []
    for k in range(n_nextn):
        wrong = rng.random(N_VOCAB) >= right
        ahead = np.where(wrong, (place + 1) % N_WORDS, place)
        heads.append(words[ahead])
        if drop_head_tensors:
            continue
        il = trunk + k
        tensors |= decoder_block(arch, il, rng, 0.0, recurrent=False)
        project = np.zeros((N_EMBD, 2 * N_EMBD))  # [embedding half | hidden half]
        if head == "embedding":
            project[:, :N_EMBD] = np.eye(N_EMBD)
            tensors[f"blk.{il}.nextn.embed_tokens.weight"] = laid.direction[ahead]
        else:
            project[:, N_EMBD:] = laid.rotation
        tensors[f"blk.{il}.nextn.eh_proj.weight"] = project
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            tensors[f"blk.{il}.nextn.{norm}.weight"] = np.ones(N_EMBD)

    if head_only:
        blocks = tuple(f"blk.{il}." for il in range(trunk))
        tensors = {name: t for name, t in tensors.items() if not name.startswith(blocks)}
    write_tensors(path, arch, trunk, n_nextn, tensors)
    return Model(path, arch, words[place], tuple(heads) if head == "embedding" else ())


def decoder_block(
    arch: str,
    il: int,
    rng: np.random.Generator,
    scale: float,
    *,
    recurrent: bool,
    n_embd: int = N_EMBD,
    n_ff: int = N_FF,
) -> dict[str, npt.NDArray[Any]]:
    """Return a decoder block that adds ``scale`` to a residual stream of size 1; 0 adds nothing."""

    def dense(n_out: int, n_in: int, size: float = 1.0) -> npt.NDArray[np.float64]:
        return rng.normal(0, size / np.sqrt(n_in), (n_out, n_in))

    width = N_HEAD * HEAD_DIM
    after = "post_attention_norm" if arch == "qwen35" else "ffn_norm"
    block: dict[str, npt.NDArray[Any]] = {
        "attn_norm.weight": np.ones(n_embd),
        f"{after}.weight": np.ones(n_embd),
        "ffn_gate.weight": dense(n_ff, n_embd),
        "ffn_up.weight": dense(n_ff, n_embd),
        "ffn_down.weight": dense(n_embd, n_ff, scale),
    }
    if recurrent:
        block |= {
            "attn_qkv.weight": dense(3 * width, n_embd),
            "attn_gate.weight": dense(width, n_embd),
            "ssm_conv1d.weight": rng.normal(0, 0.7, (3 * width, 4)),
            "ssm_dt.bias": rng.normal(0, 0.5, N_HEAD),
            "ssm_a": -rng.uniform(0.02, 0.3, N_HEAD),
            "ssm_beta.weight": dense(N_HEAD, n_embd),
            "ssm_alpha.weight": dense(N_HEAD, n_embd),
            "ssm_norm.weight": np.ones(HEAD_DIM),
            "ssm_out.weight": dense(n_embd, width, scale),
        }
    else:
        # Sharp attention: the block picks single tokens out of the history, not its mean.
        sharp = 1.0 if arch != "mimo2" else 1.7
        gated = 2 if arch == "qwen35" else 1
        query = dense(gated * width, n_embd, sharp)
        key, value = dense(width, n_embd, sharp), dense(width, n_embd)
        if arch == "mimo2":
            block["attn_qkv.weight"] = np.concatenate([query, key, value])
        else:
            block |= {
                "attn_q.weight": query,
                "attn_k.weight": key,
                "attn_v.weight": value,
                "attn_q_norm.weight": np.full(HEAD_DIM, 1.7),
                "attn_k_norm.weight": np.full(HEAD_DIM, 1.7),
            }
        block["attn_output.weight"] = dense(n_embd, width, scale)
    for name in ("ffn_down", "attn_output", "ssm_out"):
        if f"{name}.weight" in block:
            block[f"{name}.weight"][:2] = 0  # the constant dimension stays constant
    return {f"blk.{il}.{name}": tensor for name, tensor in block.items()}


def write_tensors(
    path: Path,
    arch: str,
    trunk: int,
    n_nextn: int,
    tensors: dict[str, npt.NDArray[Any]],
    *,
    n_embd: int = N_EMBD,
    n_ff: int = N_FF,
    words: Sequence[str] = (),
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """Write the file; ``words`` are the texts of the words, default: letters and pairs of them."""
    n_layer = trunk + n_nextn
    part = path.with_suffix(".part")
    w = gguf.GGUFWriter(part, arch)
    w.add_name(f"constructed {arch}")
    w.add_context_length(N_CTX_TRAIN)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    if n_nextn:
        w.add_uint32(f"{arch}.nextn_predict_layers", n_nextn)
    if arch == "qwen35":
        w.add_rope_dimension_count(HEAD_DIM // 2)
        w.add_array(f"{arch}.rope.dimension_sections", [3, 3, 2, 0])
        w.add_uint32(f"{arch}.full_attention_interval", 2)
        w.add_ssm_conv_kernel(4)
        w.add_ssm_inner_size(N_HEAD * HEAD_DIM)
        w.add_ssm_state_size(HEAD_DIM)
        w.add_ssm_time_step_rank(N_HEAD)
        w.add_ssm_group_count(N_HEAD)
    else:
        w.add_rope_dimension_count(HEAD_DIM)
        w.add_expert_feed_forward_length(n_ff)
    if arch == "mimo2":
        w.add_sliding_window(WINDOW)
        # The first layer of the trunk and the heads slide, as in the models of this family.
        w.add_array(
            f"{arch}.attention.sliding_window_pattern",
            [il == 0 or il >= trunk for il in range(n_layer)],
        )
    _add_vocabulary(w, words, chat_template)
    for name, tensor in tensors.items():
        w.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(part, path)


def _add_vocabulary(w: Any, words: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE) -> None:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pairs = [a + b for a in letters for b in "aeiouynrst"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(N_BYTES))]
    words = words or (["\u2581", *letters, *pairs])[:N_WORDS]
    texts += words
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * N_BYTES + [gguf.TokenType.NORMAL] * len(words)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(texts)
    w.add_token_scores([-float(i) for i in range(len(texts))])
    w.add_token_types([int(kind) for kind in kinds])
    w.add_unk_token_id(0)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_add_bos_token(True)
    w.add_add_space_prefix(False)
    w.add_chat_template(chat_template)
