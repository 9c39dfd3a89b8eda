"""A simulator of rounds whose true costs and acceptance are known.

The policy sees times with noise and spikes; what a text took is told in true milliseconds. Chance
is bound to the text: whether a draft of token 1000 is right depends on the seed and on the 1000,
so two policies meet the same luck and few seeds tell them apart.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

# ms of a target decode of 1, 2, 3, ... rows, and a draft step's part of a one-row decode
CURVES: dict[str, tuple[list[float], float]] = {
    "flat": ([10.0, 10.1, 10.2, 10.3, 10.5, 10.7, 10.9, 11.1], 0.1),
    "wide-bf16": ([23.0, 27.8, 33.5, 38.2, 40.2, 41.5, 42.7, 43.9], 0.06),
    "two-rows-cheaper": ([21.2, 16.1, 19.1, 24.9, 34.0, 34.0, 34.0, 34.0], 0.06),
    "small-bf16": ([7.0, 8.4, 10.2, 11.7, 12.7, 13.6, 14.6, 15.5], 0.2),
    "small-f16": ([6.7, 9.7, 10.0, 10.4, 12.5, 14.0, 15.5, 16.9], 0.2),
    "steep": ([5.4, 12.8, 15.7, 18.0, 20.9, 21.1, 21.4, 21.6], 0.2),
    "four-rows-cheaper": ([2.5, 4.3, 5.7, 4.0, 6.5, 7.1, 7.7, 8.3], 0.2),
    "two-rows-as-two": ([5.3, 11.4, 13.8, 16.3, 21.1, 22.2, 23.4, 24.5], 0.2),
    "inflated-bf16": ([33.3, 53.0, 61.2, 67.4, 69.9, 73.7, 80.0, 86.2], 0.12),
    "bumps": ([46.8, 79.5, 89.5, 94.7, 137.0, 146.0, 140.0, 132.0], 0.06),
    "every-row-a-decode": ([10.0 * k for k in range(1, 9)], 0.06),
}


@dataclass(frozen=True)
class Head:
    """How often drafts are right: by class of confidence where it has ``shares`` of classes, and
    by position in the round otherwise. ``fading``: what is kept of it from position to position."""

    right: Sequence[float]
    shares: Sequence[float] | None = None
    fading: float = 1.0

    def expected(self, pos: int) -> float:
        """Chance that a pick at ``pos`` is right, when those before it are."""
        if self.shares is None:
            return self.right[min(pos, len(self.right) - 1)]
        return float(np.dot(self.shares, self.right)) * self.fading**pos


HEADS: dict[str, Head] = {
    "weak": Head([0.31, 0.44, 0.27]),
    "middling": Head([0.60, 0.55, 0.50]),
    "strong": Head([0.90, 0.94, 0.96]),
    "tiring": Head([0.85, 0.6, 0.35]),
    "hopeless": Head([0.0]),
    "knowing": Head(
        [0.1, 0.3, 0.4, 0.6, 0.7, 0.85, 0.93, 0.98], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2]
    ),
    "doubting": Head(
        [0.1, 0.3, 0.4, 0.6, 0.7, 0.85, 0.93, 0.98], [0.5, 0.3, 0.1, 0.05, 0.02, 0.01, 0.01, 0.01]
    ),
    "fading": Head(
        [0.1, 0.3, 0.4, 0.6, 0.7, 0.85, 0.93, 0.98],
        [0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3],
        fading=0.75,
    ),
    "modest": Head([0.8] * 8, [0.3, 0.3, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0]),
    "bluffing": Head([0.35] * 8, [0.0] * 6 + [0.3, 0.7]),
    "right": Head([1.0] * 8, [0.0] * 7 + [1.0]),
    "wrong": Head([0.0] * 8, [0.0] * 7 + [1.0]),
}


@dataclass(frozen=True)
class Machine:
    """What decodes cost. ``read``: part of a draft step that each waiting token adds to it.
    ``copy``: ms of a checkpoint, where a refused draft is undone by one; None: rows are removed."""

    rows: Sequence[float]
    draft: float
    read: float = 0.0
    copy: float | None = None

    @staticmethod
    def of(curve: str, **more: Any) -> Machine:
        return Machine(*CURVES[curve], **more)

    def slower(self, factor: float) -> Machine:
        return replace(self, rows=[factor * ms for ms in self.rows])

    def round_ms(self, depth: int) -> float:
        """A round that drafts and verifies ``depth`` and has nothing else to do."""
        copy = self.copy or 0.0 if depth else 0.0
        return self.rows[depth] + copy + depth * self.draft * self.rows[0]

    def best(self, head: Head, depth_max: int) -> tuple[float, int]:
        """Least expected ms a token over the constant depths, and that depth; 0 is plain."""
        best, tokens, agreed = (self.round_ms(0), 0), 1.0, 1.0
        for depth in range(1, depth_max + 1):
            agreed *= head.expected(depth - 1)
            tokens += agreed
            best = min(best, (self.round_ms(depth) / tokens, depth))
        return best


class Simulator:
    """Rounds of a text. ``finds``: how often the drafter finds anything."""

    def __init__(self, machine: Machine, head: Head, seed: int, *, finds: float = 1.0) -> None:
        self.machine, self.head, self.finds = machine, head, finds
        self.tokens = 0
        self.spent = 0.0
        self.depths: list[int] = []  # verified, by round
        self.picks: list[int] = []
        self._waiting = 100  # tokens that the draft has not read; a prompt at first
        self._behind = 0  # rows to decode again
        rng = np.random.default_rng(seed)
        self._luck = rng.random((3, 1 << 14)).tolist()  # by token: class, right, found
        noise = np.exp(rng.normal(0.0, 0.1, 1 << 12))
        self._noise = np.where(rng.random(1 << 12) < 0.01, 10.0 * noise, noise).tolist()
        self._drawn = 0
        self._class_bounds = self._cumulated(head)
        self._rule: Any = None
        self._accept: list[list[float]] = []
        self._go: list[float] = []
        self._price: list[float] = []

    @staticmethod
    def _cumulated(head: Head) -> list[float]:
        return list(accumulate(head.shares))[:-1] if head.shares else []

    def turn(self, head: Head) -> None:
        """From here on drafts are those of another head (or of another kind of text)."""
        self.head, self._class_bounds = head, self._cumulated(head)

    def _ns(self, ms: float) -> int:
        self._drawn = (self._drawn + 1) & 0xFFF
        return int(ms * 1e6 * self._noise[self._drawn])

    def run(self, policy: Any, tokens: int) -> float:
        """Generate at least ``tokens`` more and return the true ms a token."""
        first, before = self.tokens, self.spent
        while self.tokens - first < tokens:
            self._round(policy)
        return (self.spent - before) / (self.tokens - first)

    def _round(self, policy: Any) -> None:
        machine, rule = self.machine, policy.choose()
        if rule is not self._rule:  # lists are faster to read
            self._rule, self._accept = rule, rule.accept.tolist()
            self._go, self._price = rule.go.tolist(), rule.price.tolist()
        if self._behind:
            ms = machine.rows[self._behind] + (machine.copy or 0.0)
            self._behind = 0
            policy.observe_replay(self._ns(ms))
            self._book(0, 0, 1, ms)
            return
        classes, right, draft_ms = self._draft(rule)
        depth = self._verified(classes)
        accepted = 0
        while accepted < depth and right[accepted]:
            accepted += 1
        spare = right[depth] if accepted == depth < len(right) else None
        target_ms = machine.rows[depth]
        if machine.copy is not None and depth:
            target_ms += machine.copy
            if accepted < depth:
                self._behind = 1 + accepted
        policy.observe(
            depth, self._ns(target_ms), classes, self._ns(draft_ms) if draft_ms else 0,
            accepted + 1, accepted, spare,
        )  # fmt: skip
        self._book(depth, len(classes), accepted + 1, target_ms + draft_ms)

    def _draft(self, rule: Any) -> tuple[list[int], list[bool], float]:
        """The picks' classes, whether they are right, and what they took in ms."""
        classes: list[int] = []
        right: list[bool] = []
        if not rule.depth:
            return classes, right, 0.0
        step = self.machine.draft * self.machine.rows[0]
        waiting = min(self._waiting, rule.window or 128)
        self._waiting = 0
        by_class, by_right, by_found = self._luck
        if by_found[self.tokens & 0x3FFF] >= self.finds:
            return classes, right, step
        head, bounds, chance, fading = self.head, self._class_bounds, 1.0, 1.0
        at = self.tokens
        while len(classes) < rule.depth and chance >= self._go[len(classes)]:
            pos = len(classes)
            c = bisect(bounds, by_class[at & 0x3FFF]) if bounds else 0
            true = head.right[c] if bounds else head.right[min(pos, len(head.right) - 1)]
            chance *= self._accept[pos][c]
            classes.append(c)
            right.append(by_right[at & 0x3FFF] < true * fading)
            fading *= head.fading
            at += 1
        return classes, right, step * (len(classes) + self.machine.read * waiting)

    def _book(self, depth: int, picks: int, tokens: int, ms: float) -> None:
        self.depths.append(depth)
        self.picks.append(picks)
        self.tokens += tokens
        self.spent += ms
        if not picks:
            self._waiting += tokens

    def _verified(self, classes: Sequence[int]) -> int:
        """How many of the picks the engine verifies."""
        accept, price = self._accept, self._price
        best, value, chance, total = 0, -price[0], 1.0, 0.0
        for k, c in enumerate(classes):
            chance *= accept[k][c]
            total += chance
            if total - price[k + 1] >= value:
                best, value = k + 1, total - price[k + 1]
        return best
