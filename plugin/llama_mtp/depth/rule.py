"""Which drafts a round makes and verifies, and which way of it pays most.

The price of time is a rate, tokens per nanosecond: a step is worth taking when the tokens it brings
exceed what its time would bring elsewhere. At the best rate that any rule reaches, the rule that
gains most per round is the one that reaches it (Dinkelbach, On Nonlinear Fractional Programming,
1967).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .acceptance import CLASSES

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_GRID = np.linspace(0.0, 1.0, 17)  # chances that all drafts so far are right


@dataclass(frozen=True, eq=False)
class Rule:
    """What one round does, pick by pick.

    With P(k) the product of ``accept`` over the first k picks: pick k + 1 is drafted while
    ``P(k) >= go[k]``, and those m drafts are verified that make
    ``P(1) + ... + P(m) - price[m]`` largest, of equals the most.

    Attributes:
        depth: most drafts, 0 for a plain round.
        accept: float32 ``[depth, CLASSES]``, chance that a pick is right when all before it are.
        go: float32 ``[depth]``.
        price: float32 ``[depth + 1]``, in tokens; infinite where so many are never verified.
        window: most rows that a draft which has been away reads of the text; 0: as many as
            ``spec_prefill_window``.
    """

    depth: int
    accept: Floats
    go: Floats
    price: Floats
    window: int = 0


def constant(depth: int) -> Rule:
    """Draft and verify ``depth`` tokens, whatever they promise."""
    return _rule(depth)


def look(window: int = 0) -> Rule:
    """Draft one token and verify none."""
    return replace(_rule(1, price=[0.0, np.inf]), window=window)


def best_rule(
    rate: float,
    target: Doubles,
    draft: Doubles,
    accept: Doubles,
    shares: Doubles,
) -> tuple[float, Rule]:
    """Tokens that the best rule gains per round over a plain one at ``rate``, and that rule.

    Backwards from the last pick, over the chance P that all picks before it are right.

    Args:
        rate: tokens per ns that time is worth.
        target: ns of a decode that verifies 0, 1, ... drafts; its length bounds the depth.
        draft: ns of drafting 0, 1, ... tokens.
        accept: chance that a pick is right, by position and class.
        shares: how often a pick is of each class.
    """
    n = len(target) - 1
    price = rate * (target - target[0])
    steps = rate * np.diff(draft)
    rows = np.diff(price)
    go = np.full(n, 2.0)
    later = np.zeros(len(_GRID))  # gain of picks k + 1, k + 2, ... by P
    for k in range(n - 1, -1, -1):
        chance = _GRID[:, None] * accept[k][None, :]
        after = np.interp(chance, _GRID, np.maximum(later, 0.0))
        kept = np.maximum(chance - rows[k] + after, 0.0)
        later = (kept * shares).sum(axis=1) - steps[k]
        pays = np.flatnonzero(later > 0.0)
        if len(pays):
            i = int(pays[0])
            low, high = later[i - 1] if i else 0.0, later[i]
            part = -low / (high - low) if i else 0.0
            go[k] = _GRID[max(i - 1, 0)] + part * _GRID[1]
    gain = float(later[-1]) if n else 0.0
    go[:1] = 0.0  # whether to draft at all is asked once per plan, not once per round
    return gain, _rule(n, accept[:n], go, price)


def best_constant(
    target: Doubles, draft: Doubles, accept: Sequence[float]
) -> tuple[int, float, float]:
    """The constant depth with the most tokens per ns, its tokens and its ns a round.

    ``accept`` is by position; the others are as in :func:`best_rule`.
    """
    best, tokens, agreed, rate = (0, 1.0, float(target[0])), 1.0, 1.0, 0.0
    for depth in range(1, len(target)):
        agreed *= accept[depth - 1]
        tokens += agreed
        ns = float(target[depth] + draft[depth])
        if tokens > rate * ns:
            best, rate = (depth, tokens, ns), tokens / max(ns, 1.0)
    return best


def _rule(
    depth: int,
    accept: npt.ArrayLike = 1.0,
    go: npt.ArrayLike = 0.0,
    price: npt.ArrayLike = 0.0,
) -> Rule:
    def floats(x: npt.ArrayLike, *shape: int) -> Floats:
        return np.ascontiguousarray(np.broadcast_to(x, shape), dtype=np.float32)

    return Rule(depth, floats(accept, depth, CLASSES), floats(go, depth), floats(price, depth + 1))
