"""How deep to draft: measured costs and measured acceptance in, a rule for the next round out.

The policy times every decode (:mod:`~.costs`), counts how often drafts of each confidence
agree (:mod:`~.acceptance`), and from both makes a :class:`~.rule.Rule`: draft on
while the chance that all drafts so far are right pays for the next step, then verify as many as pay
for their rows. The engine follows the rule pick by pick.

While drafting does not pay, a round is plain. From time to time a burst of rounds drafts one token
without verifying it: the token that the target samples anyway is the verdict. That costs a draft
step, not a row.

Pure: no clock, no I/O, no randomness.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .acceptance import Acceptance
from .costs import Costs
from .rule import Rule, best_constant, best_rule, constant, look

_ENTER = 0.015  # drafting must promise this many tokens a round over plain before it starts ...
_LEAVE = 0.0  # ... and this many to go on: the gap keeps measurement noise from flapping
_EVIDENCE = 64  # drafting rounds after which the rate they reached is held against plain decoding
_KEEP_RATE = 1 - 1 / 128  # forgetting of that rate, per round
_REPLAN = 16  # rounds that a rule serves
_FIRST_BURST = 4  # rounds that draft unverified at the start ...
_BURST = 4  # ... and later
_BURST_WINDOW = 32  # rows of the text that later ones read; more would cost more than they tell
_FIRST_GAP, _LAST_GAP = 16, 256  # plain tokens between bursts, doubled while nothing changes
_LOOK = 0.005  # share of the time that bursts may take ...
_FRESH_LOOK = 0.01  # ... and the one at the start of a new text, of the time of the text before
_TEXT = 64  # tokens after which the next generation counts as a new text
_PLAIN_ROUNDS = 3  # for which drafting stops to time plain decoding again ...
_FIRST_CHECK, _LAST_CHECK = 16, 512  # ... after so many rounds, doubled while it costs the same
_SAME = 0.15  # relative difference of the same cost

_PLAIN = constant(0)
_FIRST_LOOK, _LOOK_AGAIN = look(), look(_BURST_WINDOW)


class _Regime:
    """What drafts are worth under one way of sampling, and whether they are being made."""

    __slots__ = (
        "accept", "burst", "burst_ns", "confirmed", "drafting", "gap", "looks", "ns", "spell",
        "tokens", "wait",
    )  # fmt: skip

    def __init__(self, accept: Acceptance) -> None:
        self.accept = accept
        self.drafting = False
        self.confirmed = False  # that drafting does not pay
        self.spell = 0  # rounds since drafting began
        self.tokens = self.ns = 0.0  # recent, of drafting rounds
        self.gap, self.wait = _FIRST_GAP, 0.0  # tokens between bursts, and to the next
        self.burst, self.burst_ns, self.looks = _FIRST_BURST, 0.0, 0

    def worth(self, plain: float) -> float:
        """How many plain tokens keep the last burst within its share of the time."""
        return self.burst_ns / plain / _LOOK


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
        "_adaptive", "_before", "_check", "_confident", "_constant", "_costs", "_depth_bound",
        "_depth_max", "_depth_min", "_due", "_regime", "_regimes", "_resumed", "_rule", "_said",
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
        self._costs = Costs(depth_max)
        self._due = 0  # rounds until the rule is made anew
        self._check = _FIRST_CHECK  # rounds without a plain one until plain decoding is timed again
        self._before = 0.0  # what it cost when that began
        self._resumed = True  # no draft was made in the previous round: the next also catches up
        self._confident = confident
        self._regime = _Regime(Acceptance(depth_max, confident=confident))
        self._regimes: dict[Hashable, _Regime] = {None: self._regime}
        self._rule = _PLAIN  # plain decoding is timed first
        self._said = 0  # tokens since a text began

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
        machine, whatever is sampled. The text may be of another kind than the last one.
        """
        regime = self._regimes.pop(sampling, None)
        if regime is None:
            like = self._regime.accept if self._costs.rounds else None
            accept = Acceptance(self._depth_bound, confident=self._confident, like=like)
            regime = _Regime(accept)
            if len(self._regimes) >= 16:
                del self._regimes[next(iter(self._regimes))]  # the one unused for longest
        self._regimes[sampling] = regime
        if regime is not self._regime:
            self._regime = regime
            self._due = 0
            if self._costs.plain.n:
                self._plan()
        if self._said >= _TEXT:
            self._begin_text()

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
        costs, picks = self._costs, len(classes)
        new = costs.add_target(drafted, target_ns)
        if picks:
            new = costs.add_draft(picks, draft_ns, caught_up=self._resumed) or new
            if picks <= self._depth_bound:
                accept = self._regime.accept
                new = accept.learn(classes, drafted, sampled, accepted, spare) or new
            self._resumed = False
        else:
            costs.waste(draft_ns)
            self._resumed = draft_ns <= 0
        self._advance(drafted, picks, target_ns + draft_ns, draft_ns, sampled, new)

    def observe_replay(self, ns: int) -> None:
        """Learn from a plain round that also decoded rows which an earlier draft left behind.

        It says nothing about plain decoding: what it took beyond that is a price of drafting.
        """
        plain = self._costs.plain
        if self._adaptive and plain.n and ns > plain.ns:
            self._costs.waste(ns - plain.ns)
            self._regime.ns += ns - plain.ns

    def explain(self) -> str:
        """Say in one sentence what is chosen and on which numbers."""
        if not self._adaptive:
            return f"Depth is constant at {self._depth_max}."
        plain, regime = self._costs.plain.ns, self._regime
        if not plain:
            return "Nothing measured yet: the first round is plain."
        depth, tokens, ns = self._best_constant()
        if not depth or not regime.accept.known:
            return f"Depth 0: plain decoding takes {plain / 1e6:.2f} ms a token."
        verdict = f"Depth {depth}" if regime.drafting else "Depth 0, drafting does not pay"
        rates = " ".join(f"{a:.2f}" for a in regime.accept.by_position()[:depth])
        text = (
            f"{verdict}: {depth} drafted give {tokens:.2f} tokens in {ns / 1e6:.2f} ms "
            f"(acceptance {rates}), {ns / tokens / 1e6:.2f} ms a token against "
            f"{plain / 1e6:.2f} ms plain"
        )
        if regime.drafting and regime.tokens > 1.0:
            text += f"; stopping by confidence, {regime.ns / regime.tokens / 1e6:.2f} ms a token"
        return text + "."

    def _best_constant(self) -> tuple[int, float, float]:
        """The best constant depth by costs as last timed, its tokens and ns a round."""
        costs, top = self._costs, self._depth_max
        target, draft = costs.target_ns(top, sink=False), costs.draft_ns(top)
        return best_constant(target, draft, self._regime.accept.by_position(), self._depth_min)

    # ---- what to do next

    def _begin_text(self) -> None:
        """Old verdicts weigh less, and where drafting rests, a look comes early if it is cheap."""
        regime, plain = self._regime, self._costs.plain.ns
        regime.accept.fade()
        resting = not regime.drafting and not regime.burst
        if resting and 0 < regime.burst_ns <= _FRESH_LOOK * self._said * plain:
            regime.wait, regime.burst, regime.burst_ns = 0.0, _BURST, 0.0
            self._plan()
        self._said = 0

    def _advance(
        self, drafted: int, picks: int, ns: int, draft_ns: int, sampled: int, new: bool
    ) -> None:
        """Book a round with the regime, and make a new rule where one is due."""
        regime = self._regime
        self._due -= 1
        self._said += sampled
        if regime.drafting:
            regime.spell += 1
            regime.tokens = regime.tokens * _KEEP_RATE + sampled
            usual = self._costs.usual(drafted, picks)
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
        regime, costs, top = self._regime, self._costs, self._depth_max
        if self._before:
            if costs.plain.n < _PLAIN_ROUNDS:
                return  # still at it
            same = abs(costs.plain.ns - self._before) < _SAME * self._before
            self._check = min(2 * self._check, _LAST_CHECK) if same else _FIRST_CHECK
            self._before = 0.0
        if top < self._depth_min or not costs.plain.n:
            self._rule = _PLAIN
            return
        if regime.burst:
            self._rule = _LOOK_AGAIN if regime.looks or regime.spell else _FIRST_LOOK
            return
        if not regime.drafting and regime.wait > 0:
            self._rule = _PLAIN
            return
        top = min(top, max(costs.reach, self._depth_min))
        target, draft = costs.target_ns(top), costs.draft_ns(top)
        chances, shares = regime.accept.chances(), regime.accept.shares()
        plain = max(float(target[0]), 1.0)
        gain, rule = best_rule(1.0 / plain, target, draft, chances, shares, self._depth_min)
        if regime.drafting:
            reached = regime.tokens / max(regime.ns, 1.0)
            behind = regime.spell >= _EVIDENCE and reached * plain < 1.0
            if gain < _LEAVE or behind:
                self._leave(plain)
            elif costs.plain_age >= self._check:
                self._before = costs.plain.ns
                costs.plain.restart()
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
            rule = best_rule(rate, target, draft, chances, shares, self._depth_min)[1]
        self._rule = rule

    def _leave(self, plain: float) -> None:
        """Acceptance or cost has moved, or is not what the look promised: drafting does not pay."""
        self._costs.plain.restart()
        regime = self._regime
        regime.drafting = False
        regime.gap = _FIRST_GAP if regime.spell > 4 * _EVIDENCE else min(2 * regime.gap, _LAST_GAP)
        regime.wait = regime.gap
        if regime.spell < _EVIDENCE:  # the look was for nothing
            regime.wait = max(regime.gap, min(regime.worth(plain), _LAST_GAP))

    def _stay_plain(self, plain: float) -> None:
        """A look has found nothing: the next one waits longer, and for what this one has cost."""
        regime = self._regime
        regime.confirmed = regime.looks > 0
        regime.looks += 1
        regime.wait = max(regime.gap, regime.worth(plain))
        regime.gap = min(2 * regime.gap, _LAST_GAP)
