"""What decodes and drafts cost, in nanoseconds, from the times that rounds took.

A decode of k rows costs whatever this machine, model and quantisation make it cost: two rows can be
cheaper than one, three dearer than four. So every row count is timed for itself, and nothing about
the curve is assumed beyond a guess at what was never timed.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from . import constants as k


class Cost:
    """A cost in nanoseconds: the median of the last times."""

    __slots__ = ("at", "ns", "_times")

    def __init__(self) -> None:
        self.ns = 0.0
        self.at = 0  # round in which it was last timed
        self._times: deque[float] = deque(maxlen=k.MEMORY)

    @property
    def n(self) -> int:
        """How many times the median is of."""
        return len(self._times)

    def add(self, ns: float, at: int) -> None:
        times = self._times
        times.append(ns)
        self.ns = sorted(times)[(len(times) - 1) // 2]  # spikes only add: of two the lower
        self.at = at

    def restart(self) -> None:
        """Measure anew; until then ``ns`` is what it was."""
        self._times.clear()


class Costs:
    """Costs of the target's decodes by row count, and of drafting by the number of picks.

    Attributes:
        plain: cost of a target decode of one row.
        rounds: target decodes so far.
    """

    __slots__ = ("plain", "rounds", "_draft", "_made", "_target", "_wasted")

    def __init__(self, depth: int) -> None:
        self._target = [Cost() for _ in range(depth + 1)]  # [d]: a target decode of d + 1 rows
        self._draft = [Cost() for _ in range(depth + 1)]  # [d]: drafting d tokens
        self._wasted = 0.0  # recent ns in which the drafter found nothing, or left rows to replay
        self._made = 1.0  # recent rounds that made drafts
        self.plain = self._target[0]
        self.rounds = 0

    @property
    def plain_age(self) -> int:
        """Rounds since a plain decode was timed."""
        return self.rounds - self.plain.at

    def add_target(self, drafted: int, ns: int) -> bool:
        """Time a decode that verifies ``drafted``. True: that was news."""
        self.rounds += 1
        cost = self._target[drafted]
        cost.add(max(ns, 1), self.rounds)  # a coarse clock may say 0
        return cost.n <= k.NEWS

    def add_draft(self, picks: int, ns: int) -> None:
        """Time the making of ``picks``."""
        self._made = self._made * k.KEEP_WASTE + 1.0
        self._wasted *= k.KEEP_WASTE
        self._draft[picks].add(ns, self.rounds)

    def waste(self, ns: float) -> None:
        """Time that drafting took and that brought no drafts."""
        self._wasted += ns

    def target_ns(self, depth: int, *, sink: bool = True) -> npt.NDArray[np.float64]:
        """What decodes that verify 0, ..., ``depth`` drafts are taken to cost, replays included.

        An estimate that nobody has tested for long sinks, so that it is tested where it comes
        cheapest: in a round whose drafts are likely right. ``sink=False``: as last timed.
        """
        costs = _known(self._target, 0.0)
        if sink:
            for d in range(1, len(costs)):
                age = (self.rounds - self._target[d].at) / (len(costs) - 1)
                costs[d] *= 1.0 - 0.5 * min(1.0, age / k.STALE)
        costs[1:] += self._wasted / self._made
        return costs[: depth + 1]

    def draft_ns(self, depth: int) -> npt.NDArray[np.float64]:
        """What drafting 0, ..., ``depth`` tokens costs."""
        first = self._draft[1].ns if len(self._draft) > 1 else 0.0
        return np.maximum.accumulate(_known(self._draft, first))[: depth + 1]


def _known(costs: list[Cost], step: float) -> npt.NDArray[np.float64]:
    """Costs by index; what is not known is taken to cost ``step`` more than what is before it.

    A single time may be a spike, so it counts only where it is lower than that.
    """
    out = np.zeros(len(costs))
    for i, c in enumerate(costs):
        guess = out[i - 1] + step if i else c.ns
        out[i] = c.ns if c.n > 1 else min(guess, c.ns) if c.n else guess
    return out
