"""What decodes and drafts cost, in nanoseconds, from the times that rounds took.

A decode of k rows costs whatever this machine, model and quantisation make it cost: two rows can be
cheaper than one, three dearer than four. So every row count is timed for itself, and nothing about
the curve is assumed beyond a guess at what was never timed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MEMORY = 24  # decodes that an estimate averages over
_FIRST_SLOPE = 0.05  # of a plain decode: a guess at one more row, before any was timed
_DEAR = 1.3  # plain decodes: a price for two rows that few heads are good enough for
_OPTIMISM = 0.9  # a row count between two timed ones is taken to cost this part of their line
_STALE = 768  # rounds, for each row count, in which one that nobody tests looks half as dear ...
_UNKNOWN = 96  # ... and where nobody ever has
_LONG = 64  # rounds after which a row count counts as long not tested
_KEEP_WASTE = 0.999  # of what drafting wasted, per plain round: a reason to try again, in time
_KEEP = 0.98  # of it and of the rounds that share it, per round with drafts


class Cost:
    """A running cost in nanoseconds: the mean of medians of three, each step bounded.

    The median removes lone spikes, the bound keeps two in a row from doing harm.
    """

    __slots__ = ("n", "ns", "_a", "_b")

    def __init__(self) -> None:
        self.n = 0
        self.ns = self._a = self._b = 0.0

    def add(self, x: float) -> None:
        """Take one time into account."""
        a, b = self._a, self._b
        self._a, self._b = b, x
        n = self.n = self.n + 1
        if n < 3:  # spikes only ever add time, so of two the smaller is the better guess
            self.ns = x if n == 1 or x < self.ns else self.ns
            return
        if a > b:
            a, b = b, a
        x = a if x < a else b if x > b else x
        if n == 3:
            self.ns = x
            return
        ns = self.ns
        step, most = x - ns, 0.5 * ns
        if step > most:
            step = most
            n = self.n = min(n, 4)  # it may have been wrong from the start
        elif step < -most:
            step = -most
            n = self.n = min(n, 4)
        self.ns = ns + step / (n - 1 if n < _MEMORY else _MEMORY)

    def restart(self) -> None:
        """Measure anew; until then ``ns`` is what it was."""
        self.n = 0


class Costs:
    """Costs of the target's decodes by row count, and of drafting by the number of picks.

    Attributes:
        plain: cost of a target decode of one row.
        rounds: target decodes so far.
        plain_age: of them, those since a plain one was timed.
    """

    __slots__ = ("plain", "rounds", "_draft", "_made", "_target", "_timed", "_wasted")

    def __init__(self, depth: int) -> None:
        self._target = [Cost() for _ in range(depth + 1)]  # [d]: a target decode of d + 1 rows
        self._timed = [0] * (depth + 1)  # [d]: the round in which it was last timed
        self._draft = [Cost() for _ in range(depth + 1)]  # [d]: drafting d tokens
        self._wasted = 0.0  # recent ns in which the drafter found nothing, or left rows to replay
        self._made = 1.0  # recent rounds that verified drafts
        self.plain = self._target[0]
        self.rounds = 0

    @property
    def plain_age(self) -> int:
        return self.rounds - self._timed[0]

    @property
    def reach(self) -> int:
        """The most drafts to try: one, while the only decode of two rows so far was a dear one.

        It may have been a spike; where it was not, more rows are dearer still.
        """
        two = self._target[1]
        return 1 if two.n == 1 and two.ns > _DEAR * self.plain.ns else len(self._target) - 1

    def add_target(self, drafted: int, ns: int) -> bool:
        """Time a decode that verifies ``drafted``. True: that was news.

        News is a first measurement, or one of what was long not tested.
        """
        self.rounds += 1
        if drafted:
            self._made = self._made * _KEEP + 1.0
            self._wasted *= _KEEP
        else:
            self._wasted *= _KEEP_WASTE
        if drafted >= len(self._target):
            return False
        cost = self._target[drafted]
        cost.add(ns if ns > 0 else 1)  # a coarse clock may say 0
        news = cost.n <= 3 or self.rounds - self._timed[drafted] > _LONG
        self._timed[drafted] = self.rounds
        return news

    def add_draft(self, picks: int, ns: int, *, caught_up: bool) -> bool:
        """Time the making of ``picks``. True: that was news.

        After plain rounds the draft catches up on their tokens; that is not the price of a draft.
        """
        if picks >= len(self._draft):
            return False
        cost = self._draft[picks]
        if caught_up and cost.n >= 2:
            return False
        cost.add(ns)
        return cost.n <= 2

    def waste(self, ns: float) -> None:
        """Time that drafting took and that brought no drafts."""
        self._wasted += ns

    def usual(self, drafted: int, picks: int) -> float:
        """What a round that makes ``picks`` and verifies ``drafted`` has cost so far."""
        return self._target[drafted].ns + self._draft[picks].ns

    def target_ns(self, depth: int, *, sink: bool = True) -> npt.NDArray[np.float64]:
        """What decodes that verify 0, ..., ``depth`` drafts are taken to cost, replays included.

        An estimate that nobody has tested for long sinks, so that it is tested where it comes
        cheapest: in a round whose drafts are likely right. Only two rows, the cheapest to try, are
        ever thought cheaper than one without having been timed. ``sink=False``: as last timed.
        """
        costs = _guess(self._target, _FIRST_SLOPE * self.plain.ns)
        for d in range(1, len(costs)):
            known = self._target[d].n > 0
            if sink:
                age = (self.rounds - self._timed[d]) / (len(costs) - 1)
                costs[d] *= 1.0 - 0.5 * min(1.0, age / (_STALE if known else _UNKNOWN))
            if not known and d > 1:
                costs[d] = max(costs[d], costs[0])
        if self._wasted > 1.0:
            costs[1:] += self._wasted / self._made
        return costs[: depth + 1]

    def draft_ns(self, depth: int) -> npt.NDArray[np.float64]:
        """What drafting 0, ..., ``depth`` tokens costs."""
        first = self._draft[1].ns if len(self._draft) > 1 else 0.0
        costs = _guess(self._draft, first)
        costs[0] = 0.0
        return np.maximum.accumulate(costs)[: depth + 1]


def _guess(costs: list[Cost], slope: float) -> npt.NDArray[np.float64]:
    """Costs by index; between what was timed, a little below the line; beyond, by ``slope`` ns
    a step, or half of what the last two that were timed differ by.

    A single measurement may be a spike, so it counts only where it is lower than the guess.
    """
    known = [i for i, c in enumerate(costs) if c.n > 1] or [i for i, c in enumerate(costs) if c.n]
    out = np.zeros(len(costs))
    for i, c in enumerate(costs):
        if i in known:
            out[i] = c.ns
            continue
        left = max((k for k in known if k < i), default=-1)
        right = min((k for k in known if k > i), default=-1)
        if left < 0:
            guess = costs[right].ns if right >= 0 else 0.0
        elif right < 0:
            before = max((k for k in known if k < left), default=left)
            steep = (costs[left].ns - costs[before].ns) / (2.0 * max(left - before, 1))
            guess = costs[left].ns + (i - left) * max(slope, steep)
        else:
            part = (i - left) / (right - left)
            guess = _OPTIMISM * (costs[left].ns + part * (costs[right].ns - costs[left].ns))
        out[i] = min(guess, c.ns) if c.n else guess
    return out
