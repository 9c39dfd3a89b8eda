"""How often drafts agree with the target: by the class of their confidence, or by their position.

Counting, with forgetting: about the last 50 verdicts of a class weigh. A text can turn, say from
code to prose, and 50 wrong drafts would be a high price for noticing. So the first picks are also
watched for a turn to the worse (Page, Continuous Inspection Schemes, 1954).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import numpy.typing as npt

from . import constants as k

BOUNDS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96)  # of probability, between two classes
CLASSES = len(BOUNDS) + 1
_CENTRES = [(low + high) / 2 for low, high in zip((0.0, *BOUNDS), (*BOUNDS, 1.0), strict=True)]


class Acceptance:
    """Verdicts under one way of sampling.

    ``confident`` says whether picks have classes by their probability, or are all of class 0.
    """

    # Lists: single numbers in them change every round, and numpy is slow at that.
    __slots__ = ("_evidence", "_expected", "_hits", "_recent", "_right", "_shares", "_tries")

    def __init__(self, depth: int, *, confident: bool) -> None:
        self._hits = [k.PRIOR * (c if confident else k.HOPE) for c in _CENTRES]
        self._tries = [k.PRIOR] * CLASSES
        self._right = [1.0] * depth  # verdicts by position that were right, and ...
        self._expected = [1.0] * depth  # ... how many the classes alone made expect
        self._shares = [0.0] * CLASSES  # how often picks are of each class
        self._evidence = 0.0  # logarithm of how much likelier the last verdicts are after a turn
        self._recent: list[tuple[int, bool]] = []  # those verdicts, with their classes

    @property
    def known(self) -> bool:
        """Whether anything was drafted yet."""
        return any(self._shares)

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
        self._shares = [n * k.KEEP for n in self._shares]
        for c in classes:
            self._shares[c] += 1.0
        verdicts = [pos < accepted for pos in range(min(sampled, drafted))]
        if spare is not None and len(verdicts) == drafted == accepted < len(classes):
            verdicts.append(spare)
        turned = bool(verdicts) and self._watch(classes[0], verdicts[0])
        hits, tries = self._hits, self._tries
        for pos, right in enumerate(verdicts):
            c = classes[pos]
            self._expected[pos] = self._expected[pos] * k.KEEP + hits[c] / tries[c]
            self._right[pos] = self._right[pos] * k.KEEP + right
            hits[c] = hits[c] * k.KEEP + right
            tries[c] = tries[c] * k.KEEP + 1.0
        return turned

    def _watch(self, c: int, right: bool) -> bool:
        """Weigh the verdict of a first pick; after a turn, forget what was before it."""
        chance = self._right[0] / self._expected[0] * self._hits[c] / self._tries[c]
        chance = min(max(chance, 0.01), 0.99)
        self._evidence += log(k.WORSE if right else (1.0 - k.WORSE * chance) / (1.0 - chance))
        self._recent.append((c, right))
        if self._evidence <= 0.0:
            self._evidence = 0.0
            self._recent.clear()
        if self._evidence < k.ALARM:
            return False
        self.fade()
        for c, agreed in self._recent[:-1]:  # the last is counted by the caller
            self._hits[c] += agreed
            self._tries[c] += 1.0
        self._evidence = 0.0
        self._recent.clear()
        return True

    def fade(self) -> None:
        """Let what was counted so far weigh few verdicts."""
        for c, n in enumerate(self._tries):
            weight = min(1.0, k.REST / n)
            self._hits[c] *= weight
            self._tries[c] *= weight

    def chances(self) -> npt.NDArray[np.float64]:
        """Chance that a pick is right, ``[depth, CLASSES]``: of its class, by position."""
        by_position = np.divide(self._right, self._expected)
        chance: npt.NDArray[np.float64] = np.outer(by_position, np.divide(self._hits, self._tries))
        return chance.clip(0.0, 0.999)

    def shares(self) -> npt.NDArray[np.float64]:
        """How often a pick is of each class, ``[CLASSES]``."""
        shares = np.asarray(self._shares) if self.known else np.ones(CLASSES)
        return shares / shares.sum()

    def by_position(self) -> list[float]:
        """Chance that a pick is right at each position, whatever its class."""
        return [float(x) for x in self.chances() @ self.shares()]
