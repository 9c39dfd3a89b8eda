"""Same seed, same tokens: the check in two parts that every claim of identity goes through.

Ours and a freshly cleared stock object generate side by side. Where they part, the last bits of the
logits must be the cause, and nothing else:

(a) the two rows differ by no more than twice what the stock host itself shows, in this run, between
    a row decoded alone and the same row at the end of a batch;
(b) the stock sampler in the same state, given our row, returns our token.

A legal divergence is recorded, both restart from our text, and the check goes on. Everything else
is illegal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host

Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Divergence:
    """Where the texts parted: at token ``index``, and what the two parts of the check said."""

    index: int
    stock_token: int
    our_token: int
    difference: float  # largest, between our row and stock's
    tolerance: float
    sampler_token: int  # what the stock sampler makes of our row

    @property
    def legal(self) -> bool:
        return self.difference <= self.tolerance and self.sampler_token == self.our_token

    def __str__(self) -> str:
        return (
            f"token {self.index}: stock {self.stock_token}, ours {self.our_token}, "
            f"stock sampler on our row {self.sampler_token}; rows differ by {self.difference:.3g}, "
            f"{self.tolerance:.3g} allowed: {'legal' if self.legal else 'ILLEGAL'}"
        )


@dataclass
class IdentityReport:
    """Outcome of one comparison; ``tokens`` is our text."""

    tokens: list[int] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def illegal(self) -> list[Divergence]:
        return [d for d in self.divergences if not d.legal]


def clear(llama: Any) -> None:
    """Make a stock object as good as new: no text, an empty memory."""
    llama.reset()
    llama._ctx.kv_cache_clear()


def fresh_text(
    stock: Any, prompt: Sequence[int], n: int, seed: int = 1, **sampling: Any
) -> list[int]:
    """Return what a freshly cleared stock object generates: the truth to compare with."""
    clear(stock)
    return text(stock, prompt, n, seed, **sampling)


def text(llama: Any, prompt: Sequence[int], n: int, seed: int = 1, **sampling: Any) -> list[int]:
    """Return the next ``n`` tokens after ``prompt``."""
    llama.set_seed(seed)
    return list(islice(llama.generate(prompt, **sampling), n))


def check_identity(
    stock: Any,
    ours: Any,
    prompt: Sequence[int],
    n: int,
    seed: int = 1,
    max_batch: int = 8,
    *,
    quiet: bool = False,
    **sampling: Any,
) -> IdentityReport:
    """Generate ``n`` tokens with both and compare them by the two-part check.

    ``max_batch`` is the largest batch in which a row may have been decoded: 1 + depth. The sampling
    options are those of ``Llama.generate`` without Python callbacks.
    """
    report = IdentityReport()
    context = list(prompt)
    while report.n_tokens < n:
        emitted, divergence = _until_divergence(
            stock, ours, context, n - report.n_tokens, report.n_tokens, seed, max_batch, sampling
        )
        report.tokens += emitted
        context += emitted
        if divergence is not None:
            report.divergences.append(divergence)
            if not quiet:
                print(divergence)
    return report


def _until_divergence(
    stock: Any,
    ours: Any,
    context: list[int],
    n: int,
    offset: int,
    seed: int,
    max_batch: int,
    sampling: dict[str, Any],
) -> tuple[list[int], Divergence | None]:
    # Both read the context as a prompt: what they differ by then comes from the rounds alone.
    clear(stock)
    clear(ours)
    stock.set_seed(seed)
    ours.set_seed(seed)
    reference = stock.generate(context, **sampling)
    candidate = ours.generate(context, **sampling)
    before = stock._init_sampler(**sampling)
    # Mirostat's state follows the rows, not the tokens alone: the stock sampler "in the same state"
    # is one that was given every row of ours.
    replay = stock._init_sampler(**sampling) if sampling.get("mirostat_mode") in (1, 2) else None
    emitted: list[int] = []
    try:
        for _ in range(n):
            expected, token = next(reference), next(candidate)
            emitted.append(token)
            if replay is not None:
                picked = host.pick(replay, _row(ours, ours._session.live_row), accept=True)
            if token != expected:
                stock_row = _row(stock, -1)
                our_row = _row(ours, ours._session.live_row)
                noise = _host_noise(stock, context, emitted[:-1], stock_row, max_batch)
                return emitted, Divergence(
                    index=offset + len(emitted) - 1,
                    stock_token=expected,
                    our_token=token,
                    difference=float(np.abs(our_row - stock_row).max()),
                    tolerance=2 * noise,
                    sampler_token=host.pick(before, our_row) if replay is None else picked,
                )
            before = stock._sampler.clone()
        return emitted, None
    finally:
        reference.close()
        candidate.close()


def _row(llama: Any, index: int) -> Row:
    return host.logits_row(llama._ctx, index, llama._n_vocab)


def _host_noise(
    stock: Any, context: list[int], emitted: list[int], alone: Row, max_batch: int
) -> float:
    """Return how far stock's own row moves when the text was decoded in batches, as ours was.

    Not the last batch alone: a cache in half precision rounds the rows of earlier batches too. The
    last batch is filled up, since a verify has rows after the one that we look at.
    """
    noise = 0.0
    for k in range(2, max_batch + 1):
        clear(stock)
        stock.eval(context)
        row = alone
        for at in range(0, len(emitted), k):
            tokens = emitted[at : at + k]
            filled = tokens + [tokens[-1]] * (k - len(tokens))
            host.decode(stock._ctx, filled, stock.n_tokens)
            stock.n_tokens += len(tokens)
            row = _row(stock, len(tokens) - 1)
        noise = max(noise, float(np.abs(row - alone).max()))
    return noise
