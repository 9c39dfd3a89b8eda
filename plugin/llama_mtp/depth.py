"""How deep to draft: measured costs and measured acceptance in, a rule for the next round out.

A decode of k rows costs whatever this machine, model and quantisation make it cost: two rows can be
cheaper than one, three dearer than four. So nothing about the curve is assumed. The policy times
every row count it uses, counts how often drafts of each confidence agree, and from both makes a
:class:`Rule`: draft on while the chance that all drafts so far are right pays for the next step,
then verify as many as pay for their rows. The engine follows the rule pick by pick.

The price of time is a rate, tokens per nanosecond: a step is worth taking when the tokens it brings
exceed what its time would bring elsewhere. At the best rate that any rule reaches, the rule that
gains most per round is the one that reaches it (Dinkelbach, On Nonlinear Fractional Programming,
1967).

While drafting does not pay, a round is plain. From time to time a burst of rounds drafts one token
without verifying it: the token that the target samples anyway is the verdict. That costs a draft
step, not a row.

Pure: no clock, no I/O, no randomness.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

CLASSES = 8  # of confidence; the engine's MTP_CLASSES
_CENTRES = (0.1, 0.27, 0.42, 0.57, 0.72, 0.85, 0.93, 0.98)  # of the classes' probabilities

_ENTER = 0.015  # drafting must promise this many tokens a round over plain before it starts ...
_LEAVE = 0.0  # ... and this many to go on: the gap keeps measurement noise from flapping
_EVIDENCE = 64  # drafting rounds after which the rate they reached is held against plain decoding
_COST_MEMORY = 24  # decodes that a cost estimate averages over
_KEEP = 0.98  # forgetting of acceptance per verdict: about the last 50 count
_KEEP_WASTE = 0.999  # of what drafting wasted, per plain round: a reason to try again, in time
_KEEP_RATE = 1 - 1 / 128  # of the rate, per round
_PRIOR = 2.0  # verdicts that the first guess at an acceptance counts as
_CAUTION = 0.9  # of a draft's own probability, as that first guess ...
_HOPE = 0.75  # ... and where a draft has none
_FIRST_SLOPE = 0.05  # of a plain decode: a guess at one more row, before any was timed
_OPTIMISM = 0.9  # a row count between two timed ones is taken to cost this part of their line
_STALE = 768  # rounds, for each row count, in which one that nobody tests looks half as dear ...
_UNKNOWN = 96  # ... and where nobody ever has
_REPLAN = 16  # rounds that a rule serves
_LONG = 64  # rounds after which a row count counts as long not tested
_FIRST_BURST = 4  # rounds that draft unverified at the start ...
_BURST = 4  # ... and later
_FIRST_GAP, _LAST_GAP = 16, 256  # plain tokens between bursts, doubled while nothing changes
_LOOK = 0.005  # share of the time that bursts may take
_PLAIN_ROUNDS = 3  # for which drafting stops to time plain decoding again ...
_FIRST_CHECK, _LAST_CHECK = 16, 512  # ... after so many rounds, doubled while it costs the same
_SAME = 0.15  # relative difference of the same cost
_GRID = np.linspace(0.0, 1.0, 17)  # chances that all drafts so far are right


class _Cost:
    """A running cost in nanoseconds: the mean of medians of three, each step bounded.

    The median removes lone spikes, the bound keeps two in a row from doing harm.
    """

    __slots__ = ("n", "ns", "_a", "_b")

    def __init__(self) -> None:
        self.n = 0
        self.ns = self._a = self._b = 0.0

    def add(self, x: float) -> None:
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
        self.ns = ns + step / (n - 1 if n < _COST_MEMORY else _COST_MEMORY)

    def restart(self) -> None:
        """Measure anew; until then ``ns`` is what it was."""
        self.n = 0


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
    """

    depth: int
    accept: Floats
    go: Floats
    price: Floats

    def ask(self) -> int:
        """How many drafts to ask of a drafter that has no confidence (class 0 throughout)."""
        chance = 1.0
        for k in range(self.depth):
            if chance < self.go[k]:
                return k
            chance *= float(self.accept[k, 0])
        return self.depth

    def keep(self, classes: Sequence[int]) -> int:
        """How many of the picks to verify, by their classes."""
        best, value, chance, total = 0, 0.0, 1.0, 0.0
        for k, c in enumerate(classes):
            chance *= float(self.accept[k, c])
            total += chance
            if total - self.price[k + 1] >= value:
                best, value = k + 1, total - float(self.price[k + 1])
        return best


def constant(depth: int) -> Rule:
    """Draft and verify ``depth`` tokens, whatever they promise."""
    return _rule(depth)


def _rule(
    depth: int,
    accept: npt.ArrayLike = 1.0,
    go: npt.ArrayLike = 0.0,
    price: npt.ArrayLike = 0.0,
) -> Rule:
    def floats(x: npt.ArrayLike, *shape: int) -> Floats:
        return np.ascontiguousarray(np.broadcast_to(x, shape), dtype=np.float32)

    return Rule(depth, floats(accept, depth, CLASSES), floats(go, depth), floats(price, depth + 1))


_PLAIN = _rule(0)
_LOOK_ONLY = _rule(1, price=[0.0, np.inf])


class _Regime:
    """What drafts are worth under one way of sampling, and whether they are being made."""

    __slots__ = (
        "burst", "burst_ns", "confirmed", "drafting", "gap", "hits", "looks", "ns", "position",
        "predicted", "shares", "spell", "tokens", "tries", "wait",
    )  # fmt: skip

    def __init__(self, depth: int, *, confident: bool, like: _Regime | None = None) -> None:
        # Lists: single numbers in them change every round, and numpy is slow at that.
        self.hits = [_PRIOR * (_CAUTION * p if confident else _HOPE) for p in _CENTRES]
        self.tries = [_PRIOR] * CLASSES
        self.position = [1.0] * depth  # verdicts by position, and ...
        self.predicted = [1.0] * depth  # ... what the classes alone made expect
        self.shares = [[0.0] * CLASSES, [0.0] * CLASSES]  # of the classes: first picks, later ones
        self.drafting = False
        self.confirmed = False  # that drafting does not pay
        self.spell = 0  # rounds since drafting began
        self.tokens = self.ns = 0.0  # recent, of drafting rounds
        self.gap, self.wait = _FIRST_GAP, 0.0  # tokens between bursts, and to the next
        self.burst, self.burst_ns, self.looks = _FIRST_BURST, 0.0, 0
        if like is not None:  # another temperature: a guess, soon outvoted
            weights = [min(1.0, 2 * _PRIOR / n) for n in like.tries]
            self.hits = [h * w for h, w in zip(like.hits, weights, strict=True)]
            self.tries = [n * w for n, w in zip(like.tries, weights, strict=True)]
            self.position, self.predicted = like.position[:], like.predicted[:]
            weight = 8.0 / max(8.0, *map(max, like.shares))
            self.shares = [[n * weight for n in shares] for shares in like.shares]


class DepthPolicy:
    """Makes the rule for each round.

    Call :meth:`choose` before a round and :meth:`observe` once it has settled. ``depth_max`` is the
    bound the session was built for; the property of the same name can be lowered and raised again
    up to it. Drafts shorter than ``depth_min`` are not worth verifying. With ``adaptive=False``
    every round drafts and verifies ``depth_max``. ``confident`` says whether picks have classes by
    their probability, or are all of class 0.

    Raises ValueError unless ``0 <= depth_min <= depth_max``.
    """

    __slots__ = (
        "_adaptive", "_before", "_check", "_clock", "_confident", "_constant", "_depth_bound",
        "_depth_max", "_depth_min", "_draft", "_due", "_made", "_measured", "_regime", "_regimes",
        "_resumed", "_rule", "_target", "_wasted",
    )  # fmt: skip

    def __init__(
        self,
        depth_max: int,
        depth_min: int = 0,
        *,
        adaptive: bool = True,
        confident: bool = False,
    ) -> None:
        if not 0 <= depth_min <= depth_max:
            raise ValueError(
                f"need 0 <= depth_min <= depth_max, got depth_min={depth_min} and "
                f"depth_max={depth_max}; lower spec_draft_n_min or raise spec_draft_n_max"
            )
        self._depth_bound = self._depth_max = depth_max
        self._depth_min = max(depth_min, 1)
        self._adaptive = adaptive
        self._constant = constant(depth_max if depth_max >= self._depth_min else 0)
        self._target = [_Cost() for _ in range(depth_max + 1)]  # [d]: a target decode of d + 1 rows
        self._measured = [0] * (depth_max + 1)  # [d]: the round in which it was last timed
        self._draft = [_Cost() for _ in range(depth_max + 1)]  # [d]: drafting d tokens
        self._wasted = 0.0  # recent ns in which the drafter found nothing, or left rows to replay
        self._made = 1.0  # recent rounds that verified drafts
        self._clock = 0  # rounds so far
        self._due = 0  # rounds until the rule is made anew
        self._check = _FIRST_CHECK  # rounds without a plain one until plain decoding is timed again
        self._before = 0.0  # what it cost when that began
        self._resumed = True  # no draft was made in the previous round: the next also catches up
        self._confident = confident
        self._regime = _Regime(depth_max, confident=confident)
        self._regimes: dict[Hashable, _Regime] = {None: self._regime}
        self._rule = _PLAIN  # plain decoding is timed first

    # ---- settings

    @property
    def depth_max(self) -> int:
        """The deepest choice; settable from 0 to the constructed bound (ValueError otherwise)."""
        return self._depth_max

    @depth_max.setter
    def depth_max(self, depth: int) -> None:
        if not 0 <= depth <= self._depth_bound:
            raise ValueError(
                f"depth must be between 0 and {self._depth_bound}, got {depth}; "
                "construct with a larger spec_draft_n_max to go deeper"
            )
        if depth == self._depth_max:
            return
        self._depth_max = depth
        self._constant = constant(depth if depth >= self._depth_min else 0)
        for regime in self._regimes.values():
            regime.drafting = regime.confirmed = False
            regime.gap, regime.burst, regime.burst_ns = _FIRST_GAP, _FIRST_BURST, 0.0
        self._plan()

    @property
    def adaptive(self) -> bool:
        """Whether the depth follows measurements, or is constant."""
        return self._adaptive

    @property
    def dropped(self) -> bool:
        """True while depth is 0 because drafting does not pay, confirmed by a second look."""
        return self._regime.confirmed

    @property
    def best(self) -> int:
        """The constant depth that pays most by what was measured so far; 0 is plain decoding."""
        if not self._adaptive:
            return self._depth_max
        return self._best_constant()[0] if self._regime.drafting else 0

    # ---- before and after a round

    def begin(self, sampling: Hashable) -> None:
        """A generation begins: acceptance is counted apart for each way of ``sampling``.

        What is not known of a new one is taken from the one before it. Costs are those of the
        machine, whatever is sampled.
        """
        regime = self._regimes.pop(sampling, None)
        if regime is None:
            like = self._regime if self._clock else None
            regime = _Regime(self._depth_bound, confident=self._confident, like=like)
            if len(self._regimes) >= 16:
                del self._regimes[next(iter(self._regimes))]  # the one unused for longest
        self._regimes[sampling] = regime
        if regime is not self._regime:
            self._regime = regime
            self._due = 0
            if self._target[0].n:
                self._plan()

    def choose(self) -> Rule:
        """Return the rule for the next round."""
        return self._rule if self._adaptive else self._constant

    def observe(
        self,
        drafted: int,
        target_ns: int,
        classes: Sequence[int],
        draft_ns: int,
        sampled: int,
        accepted: int,
        spare: bool | None = None,
    ) -> None:
        """Learn from a settled round.

        ``classes`` are those of the picks, made in ``draft_ns`` (catch-up included); the first
        ``drafted`` of them were verified in ``target_ns``. The consumer asked for ``sampled`` rows,
        of which the first ``accepted`` agreed with the draft. ``spare`` says whether the pick after
        those would have been right too, where that is known. Picks whose row was never asked for
        have no verdict and change nothing.
        """
        if not self._adaptive:
            return
        self._clock += 1
        new = False  # a first measurement, or one of what was long not tested: think again
        if drafted <= self._depth_bound:
            cost = self._target[drafted]
            cost.add(target_ns if target_ns > 0 else 1)  # a coarse clock may say 0
            new = cost.n <= 3 or self._clock - self._measured[drafted] > _LONG
            self._measured[drafted] = self._clock
        picks = len(classes)
        if drafted:
            self._made = self._made * _KEEP + 1.0
            self._wasted *= _KEEP
        else:
            self._wasted *= _KEEP_WASTE
        if picks:
            if picks <= self._depth_bound:
                # After plain rounds the draft catches up on their tokens: not the price of a draft.
                cost = self._draft[picks]
                if not self._resumed or cost.n < 2:
                    cost.add(draft_ns)
                    new = new or cost.n <= 2
                self._learn(classes, drafted, sampled, accepted, spare)
            self._resumed = False
        else:
            self._wasted += draft_ns
            self._resumed = draft_ns <= 0
        self._advance(drafted, picks, target_ns + draft_ns, draft_ns, sampled, new)

    def observe_replay(self, ns: int) -> None:
        """Learn from a plain round that also decoded rows which an earlier draft left behind.

        It says nothing about plain decoding: what it took beyond that is a price of drafting.
        """
        plain = self._target[0]
        if self._adaptive and plain.n and ns > plain.ns:
            self._wasted += ns - plain.ns
            self._regime.ns += ns - plain.ns

    def explain(self) -> str:
        """Say in one sentence what is chosen and on which numbers."""
        if not self._adaptive:
            return f"Depth is constant at {self._depth_max}."
        plain, regime = self._target[0].ns, self._regime
        if not plain:
            return "Nothing measured yet: the first round is plain."
        depth, tokens, ns = self._best_constant()
        if not depth or not any(regime.shares[0]):
            return f"Depth 0: plain decoding takes {plain / 1e6:.2f} ms a token."
        verdict = f"Depth {depth}" if regime.drafting else "Depth 0, drafting does not pay"
        rates = " ".join(f"{a:.2f}" for a in self._mean_accept()[:depth])
        text = (
            f"{verdict}: {depth} drafted give {tokens:.2f} tokens in {ns / 1e6:.2f} ms "
            f"(acceptance {rates}), {ns / tokens / 1e6:.2f} ms a token against "
            f"{plain / 1e6:.2f} ms plain"
        )
        if regime.drafting and regime.tokens > 1.0:
            text += f"; stopping by confidence, {regime.ns / regime.tokens / 1e6:.2f} ms a token"
        return text + "."

    # ---- estimates

    def _learn(
        self,
        classes: Sequence[int],
        drafted: int,
        sampled: int,
        accepted: int,
        spare: bool | None,
    ) -> None:
        """Count verdicts by class and by position; only rows that were asked for give one."""
        regime = self._regime
        for pos, c in enumerate(classes):
            shares = regime.shares[pos > 0]
            if pos < 2:
                shares[:] = [n * _KEEP for n in shares]
            shares[c] += 1.0
        verdicts = [pos < accepted for pos in range(min(sampled, drafted))]
        if spare is not None and len(verdicts) == drafted == accepted < len(classes):
            verdicts.append(spare)
        hits, tries = regime.hits, regime.tries
        for pos, right in enumerate(verdicts):
            c = classes[pos]
            regime.predicted[pos] = regime.predicted[pos] * _KEEP + hits[c] / tries[c]
            regime.position[pos] = regime.position[pos] * _KEEP + right
            hits[c] = hits[c] * _KEEP + right
            tries[c] = tries[c] * _KEEP + 1.0

    def _accept(self) -> npt.NDArray[np.float64]:
        """Chance that a pick is right, ``[depth_bound, CLASSES]``: of its class, by position."""
        regime = self._regime
        by_position = np.divide(regime.position, regime.predicted).clip(0.0, 4.0)
        by_class = np.divide(regime.hits, regime.tries)
        chance: npt.NDArray[np.float64] = np.outer(by_position, by_class).clip(0.0, 0.999)
        return chance

    def _shares(self) -> npt.NDArray[np.float64]:
        """How often a pick is of each class, ``[depth_bound, CLASSES]``."""
        first, later = map(np.asarray, self._regime.shares)
        if not first.any():  # nobody has drafted yet
            first = np.ones(CLASSES)
        later = later + first * (2.0 / first.sum())
        by_position = np.empty((self._depth_bound, CLASSES))
        by_position[:] = later / later.sum()
        by_position[:1] = first / first.sum()
        return by_position

    def _mean_accept(self) -> list[float]:
        return [float(x) for x in (self._accept() * self._shares()).sum(axis=1)]

    def _waste(self) -> float:
        """Ns of fruitless drafting and of replays for each round that does draft."""
        return self._wasted / self._made if self._wasted > 1.0 else 0.0

    def _target_ns(self) -> npt.NDArray[np.float64]:
        """What a decode of 1, 2, ... rows is taken to cost, in ns, replays included.

        An estimate that nobody has tested for long sinks, so that it is tested where it comes
        cheapest: in a round whose drafts are likely right. Only two rows, the cheapest to try, are
        ever thought cheaper than one without having been timed.
        """
        costs = _guess(self._target, _FIRST_SLOPE * self._target[0].ns)
        for d in range(1, len(costs)):
            age = (self._clock - self._measured[d]) / (len(costs) - 1)
            known = self._target[d].n > 0
            costs[d] *= 1.0 - 0.5 * min(1.0, age / (_STALE if known else _UNKNOWN))
            if not known and d > 1:
                costs[d] = max(costs[d], costs[0])
        costs[1:] += self._waste()
        return costs

    def _draft_ns(self) -> npt.NDArray[np.float64]:
        """What drafting 0, 1, 2, ... tokens costs, in ns."""
        first = self._draft[1].ns if len(self._draft) > 1 else 0.0
        costs = _guess(self._draft, first)
        costs[0] = 0.0
        return np.maximum.accumulate(costs)

    def _best_constant(self) -> tuple[int, float, float]:
        """The constant depth with the most tokens per ns, its tokens and ns a round."""
        target, draft = self._target_ns(), self._draft_ns()
        best, tokens, agreed = (0, 1.0, float(target[0])), 1.0, 1.0
        rate = 0.0
        for depth, a in enumerate(self._mean_accept()[: self._depth_max], 1):
            agreed *= a
            tokens += agreed
            ns = float(target[depth] + draft[depth])
            if depth >= self._depth_min and tokens > rate * ns:
                best, rate = (depth, tokens, ns), tokens / max(ns, 1.0)
        return best

    def _gains(
        self, rate: float, target: npt.NDArray[np.float64], draft: npt.NDArray[np.float64]
    ) -> tuple[float, Rule]:
        """Tokens that the best rule gains per round over a plain one at ``rate``, and that rule.

        Backwards from the last pick, over the chance P that all picks before it are right.
        """
        n = self._depth_max
        accept, shares = self._accept(), self._shares()
        price = rate * (target[: n + 1] - target[0])
        price[1 : self._depth_min] = np.inf
        steps = rate * np.diff(draft[: n + 1])
        rows = np.diff(np.where(np.isinf(price), 0.0, price))  # too few are made good by more
        go = np.full(n, 2.0)
        later = np.zeros(len(_GRID))  # gain of picks k + 1, k + 2, ... by P
        for k in range(n - 1, -1, -1):
            chance = _GRID[:, None] * accept[k][None, :]
            after = np.interp(chance, _GRID, np.maximum(later, 0.0))
            kept = np.maximum(chance - rows[k] + after, 0.0)
            later = (kept * shares[k][None, :]).sum(axis=1) - steps[k]
            pays = np.flatnonzero(later > 0.0)
            if len(pays):
                i = int(pays[0])
                low, high = later[i - 1] if i else 0.0, later[i]
                part = -low / (high - low) if i else 0.0
                go[k] = _GRID[max(i - 1, 0)] + part * _GRID[1]
        gain = float(later[-1]) if n else 0.0
        go[:1] = 0.0  # whether to draft at all is asked once per plan, not once per round
        return gain, _rule(n, accept[:n], go, price)

    # ---- what to do next

    def _advance(
        self, drafted: int, picks: int, ns: int, draft_ns: int, sampled: int, new: bool
    ) -> None:
        """Book a round with the regime, and make a new rule where one is due."""
        regime = self._regime
        self._due -= 1
        if regime.drafting:
            regime.spell += 1
            regime.tokens = regime.tokens * _KEEP_RATE + sampled
            usual = self._target[drafted].ns + self._draft[picks].ns
            regime.ns = regime.ns * _KEEP_RATE + min(ns, 2.0 * usual)  # a spike is no trend
        elif regime.burst:
            if picks or draft_ns:  # the first of all rounds is plain
                regime.burst -= 1
                regime.burst_ns += draft_ns
                self._due = 0
            new = new or not regime.burst
        else:
            regime.wait -= sampled
            if regime.wait <= 0:
                regime.burst, regime.burst_ns = _BURST, 0.0
                self._due = 0
        if self._due <= 0 or new:
            self._plan()

    def _plan(self) -> None:
        """Decide whether to draft, and by which rule."""
        self._due = _REPLAN
        regime, top = self._regime, self._depth_max
        if self._before:
            if self._target[0].n < _PLAIN_ROUNDS:
                return  # still at it
            same = abs(self._target[0].ns - self._before) < _SAME * self._before
            self._check = min(2 * self._check, _LAST_CHECK) if same else _FIRST_CHECK
            self._before = 0.0
        if top < self._depth_min or not self._target[0].n:
            self._rule = _PLAIN
            return
        if regime.burst:
            self._rule = _LOOK_ONLY
            return
        if not regime.drafting and regime.wait > 0:
            self._rule = _PLAIN
            return
        target, draft = self._target_ns(), self._draft_ns()
        plain = max(float(target[0]), 1.0)
        gain, rule = self._gains(1.0 / plain, target, draft)
        if regime.drafting:
            reached = regime.tokens / max(regime.ns, 1.0)
            behind = regime.spell >= _EVIDENCE and reached * plain < 1.0
            if gain < _LEAVE or behind:
                self._leave()
            elif self._clock - self._measured[0] >= self._check:
                self._before = self._target[0].ns
                self._target[0].restart()
                self._rule, self._due = _PLAIN, _PLAIN_ROUNDS
                return
        elif gain > _ENTER:
            regime.drafting, regime.confirmed = True, False
            regime.spell, regime.tokens, regime.ns = 0, 0.0, 0.0
        else:
            self._stay_plain(plain)
        if not regime.drafting:
            self._rule = _PLAIN
            return
        if regime.spell >= _EVIDENCE:
            rate = max(1.0 / plain, regime.tokens / max(regime.ns, 1.0))
            rule = self._gains(rate, target, draft)[1]
        self._rule = rule

    def _leave(self) -> None:
        """Acceptance or cost has moved: drafting no longer pays."""
        self._target[0].restart()
        regime = self._regime
        regime.drafting = False
        regime.gap = _FIRST_GAP if regime.spell > 4 * _EVIDENCE else min(2 * regime.gap, _LAST_GAP)
        regime.wait = regime.gap

    def _stay_plain(self, plain: float) -> None:
        """A look has found nothing: the next one waits longer, and for what this one has cost."""
        regime = self._regime
        regime.confirmed = regime.looks > 0
        regime.looks += 1
        regime.wait = max(regime.gap, regime.burst_ns / plain / _LOOK)
        regime.gap = min(2 * regime.gap, _LAST_GAP)


def _guess(costs: list[_Cost], slope: float) -> npt.NDArray[np.float64]:
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
