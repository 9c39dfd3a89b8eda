"""How deep to draft: measured costs and measured acceptance in, a rule for the next round out.

The policy times every decode (:mod:`~.costs`), counts how often drafts of each confidence
agree (:mod:`~.acceptance`), and from both makes a :class:`~.rule.Rule`: draft on
while the chance that all drafts so far are right pays for the next step, then verify as many as pay
for their rows. The engine follows the rule pick by pick. It is in one of four states::

    LEARNING --> LOOKING <--> RESTING
        ^           |           ^
        |           v           |
        +------> DRAFTING ------+

Pure: no clock, no I/O, no randomness.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import Enum

from . import constants as k
from .acceptance import Acceptance
from .costs import Costs
from .rule import Rule, best_constant, best_rule, constant, look

_PLAIN = constant(0)
_FIRST_LOOK, _LOOK = look(), look(k.LOOK_WINDOW)


class State(Enum):
    """What the rounds of a way of sampling are for."""

    LEARNING = "plain rounds, to time plain decoding"
    LOOKING = "rounds that draft one token and do not verify it"
    DRAFTING = "rounds by the rule that pays most"
    RESTING = "plain rounds, because drafting does not pay"


class _Regime:
    """What drafts are worth under one way of sampling, and the state of its rounds."""

    __slots__ = ("accept", "failures", "left", "look_ns", "state")

    def __init__(self, accept: Acceptance) -> None:
        self.accept = accept
        self.state = State.LEARNING
        self.left = 1.0  # rounds, or tokens of rest, until the state is reconsidered
        self.look_ns = 0.0  # what the last look took
        self.failures = 0  # looks in a row that found that drafting does not pay


class DepthPolicy:
    """Makes the rule for each round.

    Call :meth:`choose` before a round and :meth:`observe` once it has settled. ``depth_max`` is the
    bound the session was built for; the property of the same name can be lowered and raised again
    up to it. With ``adaptive=False`` every round drafts and verifies ``depth_max``. ``confident``
    says whether picks have classes by their probability, or are all of class 0.

    Raises ValueError unless ``depth_max`` is 0 or more.
    """

    __slots__ = (
        "_adaptive", "_check", "_confident", "_constant", "_costs", "_depth_bound",
        "_depth_max", "_regime", "_regimes", "_rule", "_said",
    )  # fmt: skip

    def __init__(self, depth_max: int, *, adaptive: bool = True, confident: bool = False) -> None:
        if depth_max < 0:
            raise ValueError(f"depth_max must be 0 or more, got {depth_max}")
        self._depth_bound = self._depth_max = depth_max
        self._adaptive = adaptive
        self._constant = constant(depth_max)
        self._costs = Costs(depth_max)
        self._check = k.FIRST_CHECK  # rounds without a plain one until plain decoding is timed anew
        self._confident = confident
        self._regime = _Regime(Acceptance(depth_max, confident=confident))
        self._regimes: dict[Hashable, _Regime] = {None: self._regime}
        self._rule = _PLAIN
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
        self._constant = constant(depth)
        for regime in self._regimes.values():
            regime.state, regime.left, regime.failures = State.LEARNING, 1, 0
        self._rule = _PLAIN

    @property
    def adaptive(self) -> bool:
        """Whether the depth follows measurements, or is constant."""
        return self._adaptive

    @property
    def dropped(self) -> bool:
        """True while depth is 0 because drafting does not pay, confirmed by a second look."""
        return self._regime.state is State.RESTING and self._regime.failures > 1

    @property
    def best(self) -> int:
        """The constant depth that pays most by what was measured so far; 0 is plain decoding."""
        if not self._adaptive:
            return self._depth_max
        return self._best_constant()[0] if self._drafting() else 0

    def _drafting(self) -> bool:
        return self._regime.state in (State.DRAFTING, State.LEARNING) and self._regime.accept.known

    # ---- before and after a round

    def begin(self, sampling: Hashable) -> None:
        """A generation begins: acceptance is counted apart for each way of ``sampling``.

        What is not known of a new one is taken from the one before it. Costs are those of the
        machine, whatever is sampled. The text may be of another kind than the last one.
        """
        regime = self._regimes.pop(sampling, None)
        if regime is None:
            regime = _Regime(Acceptance(self._depth_bound, confident=self._confident))
            if len(self._regimes) >= 16:
                del self._regimes[next(iter(self._regimes))]  # the one unused for longest
        self._regimes[sampling] = regime
        if regime is not self._regime:
            self._regime = regime
            self._rule = _PLAIN
            if regime.state is State.LOOKING:
                self._rule = _LOOK
            elif regime.state is State.DRAFTING:
                self._judge()
        if self._said >= k.TEXT:
            self._said = 0
            regime.accept.fade()
            if regime.state is State.RESTING:
                self._look()

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
        costs, regime, picks = self._costs, self._regime, len(classes)
        news = costs.add_target(drafted, target_ns)
        if picks:
            costs.add_draft(picks, draft_ns)
            news = regime.accept.learn(classes, drafted, sampled, accepted, spare) or news
        else:
            costs.waste(draft_ns)
        self._said += sampled

        state = regime.state
        if state is State.RESTING:
            regime.left -= sampled
            if regime.left <= 0:
                self._look()
        elif state is State.LEARNING:
            regime.left -= 1
            if regime.left <= 0:
                self._learned()
        elif state is State.LOOKING:
            if picks or draft_ns > 0:  # the first of all rounds is plain
                regime.left -= 1
                regime.look_ns += draft_ns
            if regime.left <= 0:
                self._judge()
            else:
                self._rule = _LOOK
        else:
            regime.left -= 1
            if regime.left <= 0 or news:
                self._judge()

    def observe_replay(self, ns: int) -> None:
        """Learn from a plain round that also decoded rows which an earlier draft left behind.

        It says nothing about plain decoding: what it took beyond that is a price of drafting.
        """
        plain = self._costs.plain.ns
        if self._adaptive and ns > plain > 0:
            self._costs.waste(ns - plain)

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
        verdict = f"Depth {depth}" if self._drafting() else "Depth 0, drafting does not pay"
        rates = " ".join(f"{a:.2f}" for a in regime.accept.by_position()[:depth])
        return (
            f"{verdict}: {depth} drafted give {tokens:.2f} tokens in {ns / 1e6:.2f} ms "
            f"(acceptance {rates}), {ns / tokens / 1e6:.2f} ms a token against "
            f"{plain / 1e6:.2f} ms plain."
        )

    def _best_constant(self) -> tuple[int, float, float]:
        """The best constant depth by costs as last timed, its tokens and ns a round."""
        costs, top = self._costs, self._depth_max
        target, draft = costs.target_ns(top, sink=False), costs.draft_ns(top)
        return best_constant(target, draft, self._regime.accept.by_position())

    # ---- from state to state

    def _enter(self, state: State, left: float, rule: Rule) -> None:
        self._regime.state, self._regime.left, self._rule = state, left, rule

    def _learned(self) -> None:
        """Plain decoding is timed."""
        if self._regime.accept.known:
            self._judge()
        else:
            self._look()

    def _look(self) -> None:
        """See what drafts are worth."""
        if not self._depth_max:
            self._enter(State.RESTING, float("inf"), _PLAIN)
            return
        self._regime.look_ns = 0.0
        self._enter(State.LOOKING, k.LOOKS, _LOOK if self._regime.accept.known else _FIRST_LOOK)

    def _judge(self) -> None:
        """Draft by a new rule, or rest where that does not pay."""
        regime, costs, top = self._regime, self._costs, self._depth_max
        plain = max(costs.plain.ns, 1.0)  # not timed yet where a plugin chooses the depth
        if regime.state is State.DRAFTING and costs.plain_age >= self._check:
            self._check = min(2 * self._check, k.LAST_CHECK)
            costs.plain.restart()
            self._enter(State.LEARNING, k.PLAIN_ROUNDS, _PLAIN)
            return
        target, draft = costs.target_ns(top), costs.draft_ns(top)
        chances, shares = regime.accept.chances(), regime.accept.shares()
        _, tokens, ns = best_constant(target, draft, (chances @ shares).tolist())
        rate = max(1.0 / plain, tokens / max(ns, 1.0))
        gain, rule = best_rule(rate, target, draft, chances, shares)
        if gain > 0.0:
            regime.failures = 0
            self._enter(State.DRAFTING, k.REPLAN, rule)
        elif regime.state is not State.LOOKING:
            costs.plain.restart()
            self._enter(State.RESTING, k.LEAST_REST, _PLAIN)
        else:
            regime.failures += 1
            tokens = regime.look_ns / plain / k.LOOK_SHARE
            self._enter(State.RESTING, min(max(tokens, k.LEAST_REST), k.LONGEST_REST), _PLAIN)
