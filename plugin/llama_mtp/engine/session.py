"""One object's speculation: rounds through the native engine, their depth, and what they cost.

The engine owns the truth about target and draft; this module owns the engine's lifetime, asks the
policy and the plugins once per round, and books the outcome.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host
from ..depth.policy import DepthPolicy
from ..depth.rule import Rule, constant
from ..errors import BusyError, ClosedError
from ..hooks import Drafter, DraftRequest, SpecSettings, Verdict
from ..registry import plugin_manager
from .contexts import Contexts, int32
from .generation import Generation
from .native import check, ffi, lib
from .setup import Setup
from .stats import SpecStats

logger = logging.getLogger("llama_mtp")


class Session(Contexts):
    """The rounds of one ``Llama`` object, over its two contexts and its drafter."""

    def __init__(self, target: Any, draft: Any | None, setup: Setup) -> None:
        self._settings = SpecSettings(
            setup.spec.name, setup.depth, setup.p_min, target.n_ctx(), target.model.n_vocab()
        )
        # Before anything is opened: a plugin's factory may raise.
        self._drafter: Drafter | None = setup.spec.factory and setup.spec.factory(self._settings)
        # On a device the pick comes back as 4 bytes; its probability would cost a row of logits.
        confident = setup.adaptive and draft is not None and not host.offloads(target)
        super().__init__(target, draft, setup, confidence=confident or setup.p_min > 0.0)
        self.stats = SpecStats()
        self.policy = DepthPolicy(setup.depth, adaptive=setup.adaptive, confident=confident)
        self.current: Generation | None = None  # whose text the target holds
        self._hooks = plugin_manager().hook
        self._ask_depth = bool(self._hooks.mtp_choose_depth.get_hookimpls())
        self._observed = bool(self._hooks.mtp_round_finished.get_hookimpls())
        self._told: set[str] = set()  # what the user was told once

        self._rule = ffi.new("struct mtp_rule *", {"p_min": setup.p_min})
        self._loaded: Rule | None = None  # into it
        self._drafts = ffi.new("int32_t[]", lib.MTP_MAX_DEPTH)
        self._step = ffi.new("struct mtp_step *")
        self._now, self._before = (ffi.new("struct mtp_counters *") for _ in range(2))
        self._round = _Round()
        self._recount = True
        # Before its model is freed, whatever order the garbage collector prefers.
        target.model._exit_stack.callback(self.close)
        self._tell(self._hooks.mtp_session_opened, settings=self._settings)

    def close(self) -> None:
        """Free the native session, then the draft context. Idempotent."""
        if not self.closed:
            super().close()
            self._tell(self._hooks.mtp_session_closed, settings=self._settings)

    def _tell(self, hook: Any, **record: Any) -> None:
        """Call an observer. A plugin that raises is reported once and costs nobody a token."""
        try:
            hook(**record)
        except Exception:
            if "observer" not in self._told:
                self._told.add("observer")
                logger.exception("a plugin failed in %s; generation goes on without it", hook.name)

    def _warn_once(self, about: str, text: str, *arguments: Any) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.warning(text, *arguments)

    # ---- a generation

    def begin(self, generation: Generation, context: npt.NDArray[np.intc]) -> None:
        """Make a generation the current one; the target holds the tokens of ``context``.

        The draft context forgets what says otherwise. A draft that had failed is tried again.
        """
        self.book()
        self.stats.begin(generation.stats)
        self.policy.begin(generation.sampling)
        self._step.replays_next = 0
        check(lib.mtp_begin(self._handle, int32(context), len(context)), self._handle)
        self._recount = True
        self.current = generation

    def next(
        self,
        generation: Generation,
        last: int,
        pos: int,
        context: npt.NDArray[np.intc],
        proposed: Sequence[int] | None = None,
    ) -> int:
        """Return the token after ``last``, which stands at ``pos`` and ends ``context``.

        The generation is the current one. Its chain is stepped exactly once. Tokens that the
        caller ``proposed`` are the drafts of a new round.
        """
        start = time.perf_counter_ns()
        handle, step = self._handle, self._step
        rule = drafts = ffi.NULL
        n_drafts = draft_ns = 0
        new_round = proposed is not None or not self._round.rows_left
        if new_round:
            self.book()
            if self._recount:  # what was decoded since the last round belongs to none
                lib.mtp_session_counters(handle, self._before)
                self._recount = False
            rule, drafts, n_drafts, draft_ns = self._plan(generation, context, proposed)
        native, address = time.perf_counter_ns(), generation.address
        check(lib.mtp_next(handle, address, last, pos, rule, drafts, n_drafts, step), handle)
        done = time.perf_counter_ns()
        this = self._round
        if new_round:
            this.open, this.proposed, this.draft_ns = True, proposed is not None, draft_ns
        this.rows_left = step.rows_left
        this.python_ns += native - start - draft_ns + time.perf_counter_ns() - done
        return int(step.token)

    def finish(self, generation: Generation) -> None:
        """Book the last round of a generation that ends, or was collected.

        It is not rolled back: what comes next may want to go further back in one step. Where
        another thread is inside, that one books it.
        """
        if self.current is not generation:
            return
        try:
            with self.entry:
                if self.current is generation:
                    self.book()
        except (BusyError, ClosedError):
            pass

    def _plan(
        self,
        generation: Generation,
        context: npt.NDArray[np.intc],
        proposed: Sequence[int] | None,
    ) -> tuple[Any, Any, int, int]:
        """Return rule, drafts, their number and the ns that making them took, for the engine."""
        if proposed is not None:
            rule = self._load(constant(self.setup.depth), self.setup.depth)
            return rule, self._drafts, self._put(proposed), 0
        useful = generation.end - len(context) - 1  # the last token that is wanted needs no draft
        chosen = self._choose(context)
        rule = self._load(chosen, useful)
        if self._drafter is None or rule == ffi.NULL:
            return rule, ffi.NULL, 0, 0
        start = time.perf_counter_ns()
        n = 0
        if not self._step.replays_next:
            most = min(chosen.depth, useful)
            n = self._put(self._drafter.draft(DraftRequest(_read_only(context), most)).tokens)
        return rule, self._drafts, n, time.perf_counter_ns() - start

    def _choose(self, context: npt.NDArray[np.intc]) -> Rule:
        most = self.policy.depth_max
        if most and self._ask_depth:
            answer = self._hooks.mtp_choose_depth(request=DraftRequest(_read_only(context), most))
            if answer is not None:
                return constant(max(0, min(int(answer), most)))
        return self.policy.choose()

    def _load(self, rule: Rule, most: int) -> Any:
        """Return the rule, for ``most`` drafts, as the engine reads it; NULL for a plain round."""
        depth = min(rule.depth, most)
        if depth <= 0:
            return ffi.NULL
        native = self._rule
        native.depth = depth
        if rule is not self._loaded:
            native.window = rule.window
            for name in ("accept", "go", "price"):
                values = getattr(rule, name)
                ffi.memmove(getattr(native, name), values, values.nbytes)
            self._loaded = rule
        return native

    def _put(self, tokens: Sequence[int]) -> int:
        """Write drafts for the engine, up to the first that is no token; return how many."""
        n = 0
        for token in tokens[: lib.MTP_MAX_DEPTH]:
            if not 0 <= token < self._settings.n_vocab:
                break
            self._drafts[n] = int(token)
            n += 1
        return n

    def book(self) -> None:
        """Book the round that is over: statistics, depth policy, observers."""
        this = self._round
        if not this.open:
            return
        self._round = _Round()
        step, now, before = self._step, self._now, self._before
        lib.mtp_session_counters(self._handle, now)
        target_ns = now.target_ns - before.target_ns
        draft_ns = now.draft_ns - before.draft_ns
        sample_ns = now.sample_ns - before.sample_ns
        rollback_ns = now.rollback_ns - before.rollback_ns
        rest_ns = now.total_ns - before.total_ns - target_ns - draft_ns - sample_ns
        classes = ffi.unpack(step.classes, step.n_picks)
        self.stats.observe_round(
            step.n_drafted,
            step.n_sampled,
            step.n_accepted,
            target_ns=target_ns,
            picks=step.n_picks,
            draft_ns=draft_ns + this.draft_ns,
            sample_ns=sample_ns,
            rollback_ns=rollback_ns,
            native_overhead_ns=rest_ns - rollback_ns,
            python_ns=this.python_ns,
            target_decodes=now.n_target_decodes - before.n_target_decodes,
            draft_decodes=now.n_draft_decodes - before.n_draft_decodes,
        )
        self._now, self._before = before, now
        round_draft_ns = step.draft_ns + this.draft_ns
        if step.n_replayed and not step.n_drafted:
            self.policy.observe_replay(step.target_ns + round_draft_ns)
        elif not this.proposed:  # the caller's guesses say nothing about the drafter's
            self.policy.observe(
                step.n_drafted,
                # what a round takes beside its decodes is a cost too
                step.target_ns + rest_ns + this.python_ns,
                classes,
                round_draft_ns,
                step.n_sampled,
                step.n_accepted,
                bool(step.spare) if step.spare >= 0 else None,
            )
        if now.n_draft_failures and (reason := self._draft_error()):
            self._warn_once("dead", "going on without drafts: %s", reason)
        if self.policy.dropped:
            self._warn_once(
                "dropped", "drafting does not pay here and is off. %s", self.policy.explain()
            )
        if self._observed:
            self._tell(
                self._hooks.mtp_round_finished,
                verdict=Verdict(
                    step.n_drafted, step.n_accepted, step.n_sampled, step.target_ns, round_draft_ns
                ),
            )

    def _draft_error(self) -> str:
        return str(ffi.string(lib.mtp_draft_error(self._handle)).decode())

    # ---- settings and measurements

    @property
    def depth_max(self) -> int:
        """Most drafts a round; settable up to the bound that the session was opened for."""
        return self.policy.depth_max

    @depth_max.setter
    def depth_max(self, depth: int) -> None:
        with self.entry.wait():
            self.policy.depth_max = depth

    @contextmanager
    def constant_depth(self, depth: int) -> Iterator[None]:
        """Draft ``depth`` tokens in every round of the block; the policy sees nothing of it."""
        steady = DepthPolicy(self.setup.depth, adaptive=False)
        steady.depth_max = depth
        with self.entry.wait():
            self.book()
            policy, self.policy = self.policy, steady
        try:
            yield
        finally:
            try:
                with self.entry.wait():
                    self.book()
            except ClosedError:
                pass
            self.policy = policy

    def accept_by_coin(self, chances: Sequence[float], seed: int = 1) -> None:
        """For measurements: a seeded coin accepts the draft at position i with ``chances[i]``.

        The last chance serves all deeper positions; none lets the model decide again. What a round
        costs can so be read at any acceptance. The text is nonsense.
        """
        if chances:
            logger.warning("a coin accepts the drafts from now on: the text is nonsense")
        with self.entry:
            check(
                lib.mtp_accept_by_coin(self._handle, list(chances), len(chances), seed),
                self._handle,
            )


@dataclass
class _Round:
    """What the Python side knows of the round that is under way."""

    open: bool = False
    rows_left: int = 0
    proposed: bool = False  # by the caller
    draft_ns: int = 0  # that a drafter of a plugin took
    python_ns: int = 0


def shared_prefix(a: npt.NDArray[np.intc], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their start."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != np.asarray(b[:n], dtype=np.intc))
    return int(differs[0]) if len(differs) else n


def _read_only(context: npt.NDArray[np.intc]) -> npt.NDArray[np.int32]:
    view: npt.NDArray[np.int32] = context.view()
    view.flags.writeable = False
    return view
