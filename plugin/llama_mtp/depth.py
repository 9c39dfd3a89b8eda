"""How deep to draft: measured costs and measured acceptance in, a depth out.

A decode of k rows costs whatever this machine, model and quantisation make it cost: two rows can be
cheaper than one, three dearer than four. So nothing about the curve is assumed. The policy times
every row count it uses, counts how often each draft position agrees, and takes the depth with the
most expected tokens per expected nanosecond, depth 0 (plain decoding) included. What it does not
use it tries again in short bursts, at intervals that double while they change nothing.

Pure: no clock, no I/O, no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_ENTER = 1.03  # drafting must promise this much over plain decoding before it starts ...
_LEAVE = 1.005  # ... and this much to go on: the gap keeps measurement noise from flapping
_COST_MEMORY = 24  # decodes that a cost estimate averages over
_KEEP = 0.98  # forgetting of acceptance per verdict: about the last 50 count
_PRIOR_HITS, _PRIOR_TRIES = 1.5, 2.0  # a new position is worth a try
_OPTIMISM = 0.9  # an unmeasured row count is taken to cost this part of what its neighbours suggest
_FIRST_WAIT = 32  # tokens to the first re-probe
_LAST_WAIT = 1024  # most plain tokens between probes
_LAST_CHECK = 256  # most drafting rounds between looks at the other depths
_BURST = 4  # rounds of a probe ...
_BURST_MOST = 12  # ... which goes on to this many while its outcome is open
_DOUBT = 0.3  # relative error that one measurement may have
_SETTLED = 64  # drafting rounds after which a return to drafting counts as a success
_MAX_LOSS = 32  # a probe that costs one plain token waits for this many before the next


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
        ns = self.ns
        step, most = x - ns, 0.5 * ns
        if step > most:
            step = most
        elif step < -most:
            step = -most
        self.ns = ns + step / (n - 1 if n < _COST_MEMORY else _COST_MEMORY)

    def hopeful(self) -> float:
        """What it may be instead, in ns: the fewer the measurements, the lower."""
        return self.ns * (1.0 - _DOUBT / math.sqrt(self.n)) if self.n else 0.0

    def refresh(self) -> None:
        """Let the next few measurements weigh more than the old ones."""
        if self.n > 3:
            self.n = 3
            self._a = self._b = self.ns


class DepthPolicy:
    """Chooses how many tokens the next round drafts.

    Call :meth:`choose` before a round and :meth:`observe` once it has settled. ``depth_max`` is the
    bound the session was built for; the property of the same name can be lowered and raised again
    up to it. Drafts shorter than ``depth_min`` are not worth verifying: the choice is 0 or at least
    ``depth_min``. With ``adaptive=False`` the choice is always ``depth_max``.

    Raises ValueError unless ``0 <= depth_min <= depth_max``.
    """

    __slots__ = (
        "_accept", "_adaptive", "_best", "_burst_accepted", "_burst_left", "_burst_loss", "_check",
        "_confirmed", "_depth_bound", "_depth_max", "_depth_min", "_draft", "_hits", "_made",
        "_plan", "_probed", "_resumed", "_round", "_spell", "_target", "_tries", "_turn", "_wait",
        "_wait_plain", "_wasted",
    )  # fmt: skip

    def __init__(self, depth_max: int, depth_min: int = 0, *, adaptive: bool = True) -> None:
        if not 0 <= depth_min <= depth_max:
            raise ValueError(
                f"need 0 <= depth_min <= depth_max, got depth_min={depth_min} and "
                f"depth_max={depth_max}; lower spec_draft_n_min or raise spec_draft_n_max"
            )
        self._depth_bound = self._depth_max = depth_max
        self._depth_min = max(depth_min, 1)
        self._adaptive = adaptive
        self._target = [_Cost() for _ in range(depth_max + 1)]  # [d]: a target decode of d + 1 rows
        self._draft = [_Cost() for _ in range(depth_max + 1)]  # [d]: drafting d tokens
        self._draft[0].n = _COST_MEMORY  # drafting nothing costs nothing; never measured
        self._round = [0.0] * (depth_max + 1)  # [d]: expected ns of a round at depth d
        self._hits = [_PRIOR_HITS] * depth_max
        self._tries = [_PRIOR_TRIES] * depth_max
        self._accept = [_PRIOR_HITS / _PRIOR_TRIES] * depth_max
        self._wasted = 0.0  # recent ns in which the drafter found nothing, or left rows to replay
        self._made = 1.0  # recent rounds in which it did
        self._best = depth_max
        self._plan: list[int] = self._calibration()  # depths still to be tried, last one first
        self._wait: float = 1.0  # rounds (tokens at depth 0) until the next burst
        self._wait_plain: float = _FIRST_WAIT  # the same when next at depth 0
        self._check = _FIRST_WAIT  # the same while drafting
        self._spell = 0  # rounds since drafting was (re)started
        self._turn = 0  # bursts so far: while drafting, every third looks at plain decoding
        self._burst_accepted = 0
        self._burst_loss = 0.0
        self._burst_left = 0  # rounds by which the burst may grow
        self._probed = (0, 0)  # depths of the latest two bursts that drafted
        self._resumed = False  # the previous round was plain: the next draft also catches up
        self._confirmed = False

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
        self._confirmed = False
        self._plan = self._calibration()
        self._burst_accepted, self._burst_loss, self._burst_left = 0, 0.0, 0
        self._wait, self._wait_plain, self._check = 1.0, _FIRST_WAIT, _FIRST_WAIT
        self._best = depth if depth >= self._depth_min else 0

    @property
    def adaptive(self) -> bool:
        """Whether the depth follows measurements, or is constant."""
        return self._adaptive

    @property
    def dropped(self) -> bool:
        """True while depth is 0 because drafting does not pay, confirmed by a second try."""
        return self._confirmed

    @property
    def best(self) -> int:
        """The depth that pays most by what was measured so far; 0 is plain decoding."""
        return self._best if self._adaptive else self._depth_max

    # ---- before and after a round

    def choose(self, limit: int | None = None) -> int:
        """Return how many tokens to draft now: 0, or ``depth_min`` to ``depth_max``.

        ``limit`` is the most this round has room for (``None``: no limit).
        """
        if not self._adaptive:
            depth = self._depth_max
            if limit is not None and limit < depth:
                depth = limit
            return depth if depth >= self._depth_min else 0
        depth = self._plan[-1] if self._plan else self._best
        if limit is not None and limit < depth:
            return self._pick(limit)
        return depth

    def observe(
        self,
        rows: int,
        target_ns: int,
        drafted: int,
        draft_ns: int,
        sampled: int,
        accepted: int,
    ) -> None:
        """Learn from a settled round.

        ``rows`` were decoded by the target in ``target_ns``; ``drafted`` tokens were proposed in
        ``draft_ns`` (catch-up included); the consumer asked for ``sampled`` verify rows, of which
        the first ``accepted`` agreed with the draft. Drafts whose row was never asked for have no
        verdict and change nothing.
        """
        if not self._adaptive:
            return
        bound = self._depth_bound
        new = False  # a first measurement: guesses at other depths change with it
        if 0 < rows <= bound + 1:
            cost = self._target[rows - 1]
            cost.add(target_ns if target_ns > 0 else 1)  # a coarse clock may say 0
            new = cost.n <= 3
        if drafted:
            self._made = self._made * _KEEP + 1.0
            self._wasted *= _KEEP
            if drafted <= bound:
                cost = self._draft[drafted]
                # After plain rounds the draft catches up on their tokens: not the price of a draft.
                if not self._resumed or cost.n < 3:
                    cost.add(draft_ns)
                    new = new or cost.n <= 3
                self._learn(drafted, sampled, accepted)
            self._resumed = False
        else:
            self._wasted += draft_ns
            self._resumed = draft_ns <= 0
        if new:
            self._fill()
        else:
            if 0 < rows <= bound + 1:
                self._round[rows - 1] = self._target[rows - 1].ns + self._draft[rows - 1].ns
            if drafted != rows - 1 and drafted <= bound:
                self._round[drafted] = self._target[drafted].ns + self._draft[drafted].ns
        self._next(drafted, sampled, accepted)

    def observe_replay(self, ns: int) -> None:
        """Learn from a plain round that also decoded rows which an earlier draft left behind.

        It says nothing about plain decoding: what it took beyond that is a price of drafting.
        """
        plain = self._target[0]
        if self._adaptive and plain.n and ns > plain.ns:
            self._wasted += ns - plain.ns

    def explain(self) -> str:
        """Say in one sentence what is chosen and on which numbers."""
        if not self._adaptive:
            return f"Depth is constant at {self._depth_max}."
        if not self._round[0]:
            return f"Nothing measured yet: starting at depth {self._depth_max}."
        plain = self._round[0]
        depth, _ = self._best_draft(self._depth_max, self._accept, self._round)
        if not depth:
            return f"Depth 0: plain decoding takes {plain / 1e6:.2f} ms a token."
        tokens = self._tokens(depth)
        ns = self._round[depth] + self._waste()
        rates = " ".join(f"{a:.2f}" for a in self._accept[:depth])
        verdict = f"Depth {depth}" if self._best else "Depth 0, drafting does not pay"
        return (
            f"{verdict}: {depth} drafted give {tokens:.2f} tokens in {ns / 1e6:.2f} ms "
            f"(acceptance {rates}), {ns / tokens / 1e6:.2f} ms a token against "
            f"{plain / 1e6:.2f} ms plain."
        )

    # ---- estimates

    def _learn(self, drafted: int, sampled: int, accepted: int) -> None:
        """Count verdicts per position; only rows that were asked for give one."""
        hits, tries = self._hits, self._tries
        for pos in range(sampled if sampled < drafted else drafted):
            h = hits[pos] = hits[pos] * _KEEP + (pos < accepted)
            n = tries[pos] = tries[pos] * _KEEP + 1.0
            self._accept[pos] = h / n

    def _fill(self) -> None:
        """Set the cost of every depth, guessing unmeasured ones from their measured neighbours."""
        targets = _guess(self._target)
        drafts = _guess(self._draft)
        self._round = [t + d for t, d in zip(targets, drafts, strict=True)]

    def _waste(self) -> float:
        """Ns of fruitless drafting and of replays for each round that does draft."""
        return self._wasted / self._made if self._wasted > 1.0 else 0.0

    def _tokens(self, depth: int) -> float:
        """Expected tokens of a round at ``depth``, correction or bonus included."""
        total = agreed = 1.0
        for a in self._accept[:depth]:
            agreed *= a
            total += agreed
        return total

    def _rate(self, depth: int) -> float:
        """Expected tokens per ns at ``depth``."""
        waste = self._waste() if depth else 0.0
        return self._tokens(depth) / (self._round[depth] + waste + 1.0)

    def _best_draft(
        self, top: int, accept: Sequence[float], costs: Sequence[float], skip: Sequence[int] = ()
    ) -> tuple[int, float]:
        """Return the best depth from ``depth_min`` to ``top`` and its tokens per ns, or 0, 0.0."""
        low, waste = self._depth_min, self._waste()
        best, best_rate, tokens, agreed = 0, 0.0, 1.0, 1.0
        for depth in range(1, top + 1):
            agreed *= accept[depth - 1]
            tokens += agreed
            if depth >= low and depth not in skip:
                rate = tokens / (costs[depth] + waste + 1.0)  # never zero
                if rate > best_rate:
                    best, best_rate = depth, rate
        return best, best_rate

    def _pick(self, top: int) -> int:
        """The depth up to ``top`` with the most tokens per ns, plain decoding favoured a little."""
        if not self._round[0]:
            return top if top >= self._depth_min else 0
        depth, rate = self._best_draft(top, self._accept, self._round)
        return depth if rate * self._round[0] > (_LEAVE if self._best else _ENTER) else 0

    def _hope(self, skip: Sequence[int]) -> tuple[int, float]:
        """The best depth not in ``skip`` if what is little known turns out well."""
        accept = [(h + 2.0) / (n + 2.0) for h, n in zip(self._hits, self._tries, strict=True)]
        pairs = zip(self._target, self._draft, self._round, strict=True)
        costs = [t.hopeful() + d.hopeful() if t.n > 1 and d.n > 1 else c for t, d, c in pairs]
        return self._best_draft(self._depth_max, accept, costs, skip)

    # ---- what to try next

    def _calibration(self) -> list[int]:
        """Two tries each of plain decoding and of up to five depths, in the order of popping."""
        top, low = self._depth_max, self._depth_min
        if top < low:
            return []
        depths = {top, *(d for d in ((1, 2, 3, 4) if top < 6 else (1, 2, 3, 7)) if low <= d <= top)}
        order = sorted(depths, reverse=True)
        order.insert(1, 0)
        return (order * 2)[::-1]

    def _next(self, drafted: int, sampled: int, accepted: int) -> None:
        """Advance a burst or the wait for one, and decide afresh between bursts."""
        plan, was = self._plan, self._best
        if plan:
            plan.pop()
            self._burst_accepted += accepted
            if drafted <= self._depth_bound:
                self._burst_loss += self._round[drafted] - sampled * self._round[0]
            # Costly and fruitless from the first round on: that is answer enough.
            if not was and not self._burst_accepted and self._burst_loss > 2 * self._round[0]:
                plan.clear()
            if plan:
                return
            best = self._pick(self._depth_max)
            if best == was and self._burst_left and (was or self._burst_accepted):
                probed = self._probed[1]
                others = [d for d in range(1, self._depth_max + 1) if d != probed]
                hope, rate = self._hope(others)[1], self._rate(best)
                if hope > rate:  # undecided: a little more of the same
                    self._burst_left -= 2
                    self._plan = [probed] * 2
                    return
            self._best = best
            self._after_burst(was, best)
            return
        self._best = best = self._pick(self._depth_max)
        if was and not best:  # acceptance or cost has moved: leave drafting
            if self._spell >= _SETTLED:
                self._wait_plain = _FIRST_WAIT
            self._wait = self._wait_plain
            self._check = _FIRST_WAIT
            return
        if best:
            self._spell += 1
            self._confirmed = False
            self._wait -= 1
        else:
            self._wait -= sampled
        if self._wait <= 0 and self._depth_max >= self._depth_min:
            self._start_burst(best)

    def _start_burst(self, best: int) -> None:
        self._burst_accepted, self._burst_loss = 0, 0.0
        if best and self._turn % 3 == 0:
            self._turn += 1
            self._target[0].refresh()
            self._plan = [0, 0, 0]
            self._burst_left = 0
            return
        self._turn += 1
        # Old verdicts on positions that are no longer tested should not outweigh the new ones.
        tries, hits = self._tries, self._hits
        for pos in range(best, self._depth_max):
            hits[pos] = _PRIOR_HITS if best else _PRIOR_TRIES * hits[pos] / tries[pos]
            tries[pos] = _PRIOR_TRIES
        self._fill()
        depth, rate = 0, 0.0
        for skip in ((best, *self._probed), (best, self._probed[1]), (best,)):
            if not depth:
                depth, rate = self._hope(skip)
        if not depth:
            self._wait = _LAST_CHECK
            return
        if not best and rate * self._round[0] < 1.0:  # even hope does not pay: look, but rarely
            self._wait_plain = _LAST_WAIT
        self._probed = (self._probed[1], depth)
        self._burst_left = _BURST_MOST - _BURST
        self._target[depth].refresh()
        self._draft[depth].refresh()
        self._plan = [depth] * _BURST

    def _after_burst(self, was: int, best: int) -> None:
        if best:
            self._confirmed = False
            if not was:
                self._spell = 0
            self._check = min(self._check * 2, _LAST_CHECK) if best == was else _FIRST_WAIT
            self._wait = self._check
            return
        if was:  # calibration, or a look at plain decoding, says that drafting does not pay
            self._check = _FIRST_WAIT
        else:
            self._confirmed = True
            due = _MAX_LOSS * self._burst_loss / (self._round[0] + 1.0)
            self._wait_plain = min(max(2 * self._wait_plain, due), _LAST_WAIT)
        self._wait = self._wait_plain


def _guess(costs: list[_Cost]) -> list[float]:
    """Costs by index; what was measured less than twice, a little below its neighbours' line.

    A single measurement may be a spike, so it counts only where it is lower than the guess.
    """
    known = [i for i, c in enumerate(costs) if c.n > 1] or [i for i, c in enumerate(costs) if c.n]
    if not known:
        return [0.0] * len(costs)
    out = []
    for i, c in enumerate(costs):
        if i in known:
            out.append(c.ns)
            continue
        left = max((k for k in known if k < i), default=known[0])
        right = min((k for k in known if k > i), default=left)
        part = (i - left) / (right - left) if right > left else 0.0
        guess = _OPTIMISM * (costs[left].ns + part * (costs[right].ns - costs[left].ns))
        out.append(min(guess, c.ns) if c.n else guess)
    return out
