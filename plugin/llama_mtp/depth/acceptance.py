"""How often drafts agree with the target: by the class of their confidence and by their position.

Counting, with forgetting: about the last 50 verdicts of a class weigh. A text can turn, say from
code to prose, and 50 wrong drafts would be a high price for noticing. So the first picks are also
watched for a turn to the worse (Page, Continuous Inspection Schemes, 1954): where what came last is
so much likelier under a fraction of the chances, all before it counts for little.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import numpy.typing as npt

CLASSES = 8  # of confidence; the engine's MTP_CLASSES
BOUNDS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96)  # a class each from one to the next
_CENTRES = (0.1, 0.27, 0.42, 0.57, 0.72, 0.85, 0.93, 0.98)  # of the classes' probabilities

_KEEP = 0.98  # forgetting per verdict
_PRIOR = 2.0  # verdicts that the first guess counts as
_CAUTION = 0.9  # of a draft's own probability, as that first guess ...
_HOPE = 0.75  # ... and where a draft has none

_WORSE = 0.3  # of its chance that a draft is right: the turn that is watched for
_ALARM = 7.0  # logarithm of how much likelier that must be
_REST = 4.0  # verdicts that another text, or another way of sampling, counts as


class Acceptance:
    """Verdicts under one way of sampling.

    ``confident`` says whether picks have classes by their probability, or are all of class 0.
    ``like`` is the acceptance under another way of sampling: a guess, soon outvoted.
    """

    # Lists: single numbers in them change every round, and numpy is slow at that.
    __slots__ = ("_doubt", "_hits", "_position", "_predicted", "_recent", "_shares", "_tries")

    def __init__(self, depth: int, *, confident: bool, like: Acceptance | None = None) -> None:
        self._hits = [_PRIOR * (_CAUTION * p if confident else _HOPE) for p in _CENTRES]
        self._tries = [_PRIOR] * CLASSES
        self._position = [1.0] * depth  # verdicts by position, and ...
        self._predicted = [1.0] * depth  # ... what the classes alone made expect
        self._shares = [[0.0] * CLASSES, [0.0] * CLASSES]  # of classes: first picks, later ones
        self._doubt = 0.0  # logarithm of how much likelier the last verdicts are after a turn
        self._recent: list[tuple[int, bool]] = []  # those verdicts
        if like is not None:
            self._hits, self._tries = like._hits[:], like._tries[:]
            self.fade()
            self._position, self._predicted = like._position[:], like._predicted[:]
            weight = 8.0 / max(8.0, *map(max, like._shares))
            self._shares = [[n * weight for n in shares] for shares in like._shares]

    @property
    def known(self) -> bool:
        """Whether anything was drafted yet."""
        return any(self._shares[0])

    def learn(
        self,
        classes: Sequence[int],
        drafted: int,
        sampled: int,
        accepted: int,
        spare: bool | None,
    ) -> bool:
        """Count a round; its numbers are those of
        :meth:`~llama_mtp.depth.policy.DepthPolicy.observe`.

        Only rows that were asked for give a verdict. True: acceptance has turned to the worse.
        """
        for pos, c in enumerate(classes):
            shares = self._shares[pos > 0]
            if pos < 2:
                shares[:] = [n * _KEEP for n in shares]
            shares[c] += 1.0
        verdicts = [pos < accepted for pos in range(min(sampled, drafted))]
        if spare is not None and len(verdicts) == drafted == accepted < len(classes):
            verdicts.append(spare)
        turned = bool(verdicts) and self._doubts(classes[0], verdicts[0])
        hits, tries = self._hits, self._tries
        for pos, right in enumerate(verdicts):
            c = classes[pos]
            self._predicted[pos] = self._predicted[pos] * _KEEP + hits[c] / tries[c]
            self._position[pos] = self._position[pos] * _KEEP + right
            hits[c] = hits[c] * _KEEP + right
            tries[c] = tries[c] * _KEEP + 1.0
        return turned

    def _doubts(self, c: int, right: bool) -> bool:
        """Weigh the verdict of a first pick; after a turn, forget what was before it."""
        by_position = min(self._position[0] / self._predicted[0], 4.0)
        chance = min(max(by_position * self._hits[c] / self._tries[c], 0.01), 0.99)
        worse = _WORSE * chance
        self._doubt += log(worse / chance) if right else log((1.0 - worse) / (1.0 - chance))
        self._recent.append((c, right))
        if self._doubt <= 0.0:
            self._doubt = 0.0
            self._recent.clear()
        if self._doubt < _ALARM:
            return False
        self.fade()
        for k, agreed in self._recent[:-1]:  # the last is counted by the caller
            self._hits[k] += agreed
            self._tries[k] += 1.0
        self._doubt = 0.0
        self._recent.clear()
        return True

    def fade(self) -> None:
        """Let what was counted so far weigh ``_REST`` verdicts a class at most."""
        for c in range(CLASSES):
            weight = min(1.0, _REST / self._tries[c])
            self._hits[c] *= weight
            self._tries[c] *= weight

    def chances(self) -> npt.NDArray[np.float64]:
        """Chance that a pick is right, ``[depth, CLASSES]``: of its class, by position."""
        by_position = np.divide(self._position, self._predicted).clip(0.0, 4.0)
        by_class = np.divide(self._hits, self._tries)
        chance: npt.NDArray[np.float64] = np.outer(by_position, by_class).clip(0.0, 0.999)
        return chance

    def shares(self) -> npt.NDArray[np.float64]:
        """How often a pick is of each class, ``[depth, CLASSES]``."""
        first, later = map(np.asarray, self._shares)
        if not first.any():  # nobody has drafted yet
            first = np.ones(CLASSES)
        later = later + first * (2.0 / first.sum())
        by_position = np.empty((len(self._position), CLASSES))
        by_position[:] = later / later.sum()
        by_position[:1] = first / first.sum()
        return by_position

    def by_position(self) -> list[float]:
        """Chance that a pick is right at each position, whatever its class."""
        return [float(x) for x in (self.chances() * self.shares()).sum(axis=1)]
