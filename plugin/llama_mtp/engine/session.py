"""One object's speculation: rounds through the native engine, their depth, and what they cost.

The engine owns the truth about both contexts; this module owns its lifetime, asks the policy and
the hooks once per round, and books the outcome.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host
from ..depth.policy import DepthPolicy
from ..depth.rule import Rule, constant
from ..errors import BusyError, ClosedError
from ..heads.architectures import Rollback
from ..heads.narrow_vocabulary import Vocabulary
from ..hooks import Drafter, DraftRequest, SpecSettings, Verdict
from ..registry import plugin_manager
from ..settings import Plan
from .checkpoints import TAIL, Checkpoints
from .native import api_names, check, compare_vocabularies, ffi, lib, open_session
from .stats import SpecStats

logger = logging.getLogger("llama_mtp")

_ROLLBACK: dict[Rollback, int] = {
    "attention": lib.MTP_ROLLBACK_ATTENTION,
    "snapshots": lib.MTP_ROLLBACK_SNAPSHOTS,
    "checkpoint": lib.MTP_ROLLBACK_CHECKPOINT,
}


class Entry:
    """One thread at a time: a second one gets BusyError, the first may come in again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._closing = False

    def __enter__(self) -> None:
        if self._closing:
            raise ClosedError()
        if not self._lock.acquire(blocking=False):
            raise BusyError()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def last(self) -> Iterator[None]:
        """Let nobody in any more, and come in when the thread that is inside has left."""
        self._closing = True
        with self._lock:
            yield


class Session:
    """Target, draft context and drafter of one ``Llama`` object.

    Positions and counts are tokens. Every method raises ClosedError after :meth:`close` and
    BusyError when another thread is inside.
    """

    def __init__(
        self,
        plan: Plan,
        target: Any,
        draft: Any | None,
        n_batch: int,
        n_ubatch: int,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._handle: Any = ffi.NULL
        self.entry = Entry()
        self._draft = draft
        model = target.model.model
        n_vocab = target.model.n_vocab()
        rollback, head, options = plan.report.rollback, plan.head, plan.options
        # On a device the pick comes back as 4 bytes; its probability would cost a row of logits.
        confident = options.adaptive and draft is not None and not host.offloads(target)
        self._n_embd = int(host.C.llama_model_n_embd_out(model))
        self._handle = open_session(
            host.address_table(api_names()),
            host.batch_layout(),
            {
                "target": ffi.cast("void *", target.ctx),
                "draft": ffi.cast("void *", draft.ctx) if draft is not None else ffi.NULL,
                "n_vocab": n_vocab,
                "n_embd": self._n_embd,
                "n_ctx": target.n_ctx(),
                "n_batch": n_batch,
                "n_ubatch": n_ubatch,
                "n_draft_max": plan.depth,
                "n_rs_seq": host.C.llama_n_rs_seq(target.ctx),
                "rollback": _ROLLBACK[rollback],
                "gathers": int(head.gathers),
                "gaps": int(head.mrope),
                "confidence": int(confident or options.p_min > 0.0),
                "n_draft_min": 0,
                "drafting": lib.MTP_DRAFTING_SHARED_KV
                if head.shares_kv
                else lib.MTP_DRAFTING_CHAINED
                if head.chained
                else lib.MTP_DRAFTING_ONE_HEAD,
                "n_heads": max(1, head.n_heads),
                "all_outputs": int(head.untested),
                "prefill_window": min(options.prefill_window, target.n_ctx()),
                **({} if vocabulary is None else _narrow(vocabulary)),
            },
        )
        self.recurrent = plan.recurrent
        window = 0 if head.shares_kv else options.prefill_window
        self._window = max(window, plan.depth, TAIL) + 1 if window else 0
        self._unread = 0  # positions that the draft context will not read
        self._keeps_rows = True  # the host, with its next decode
        self._target = target
        self.checkpoints = Checkpoints(target, options.checkpoints if self.recurrent else 0)
        self.stats = SpecStats()
        self.policy = DepthPolicy(plan.depth, adaptive=options.adaptive, confident=confident)
        self._native_rule = ffi.new("struct mtp_rule *", {"p_min": options.p_min})
        self._loaded: Rule | None = None  # into it
        self._settings = SpecSettings(
            plan.spec.name, plan.depth, options.p_min, target.n_ctx(), n_vocab
        )
        self._drafter: Drafter | None = plan.spec.factory and plan.spec.factory(self._settings)
        self._hooks = plugin_manager().hook
        self._ask_depth = bool(self._hooks.mtp_choose_depth.get_hookimpls())
        self._observed = bool(self._hooks.mtp_round_finished.get_hookimpls())
        self._told = False
        self._observer_failed = False
        self._step = ffi.new("struct mtp_step *")
        self._counters = ffi.new("struct mtp_counters *")
        self._before = ffi.new("struct mtp_counters *")
        self._rows_left = 0
        self._open_round = False
        self._proposed = False
        self._end = self._settings.n_ctx + 1  # positions that the text is to have
        self._classes: Sequence[int] = ()  # of the picks of a drafter, which has no confidence
        self._python_ns = 0
        # Before its model is freed, whatever order the garbage collector prefers.
        target.model._exit_stack.callback(self.close)
        self._tell(self._hooks.mtp_session_opened, settings=self._settings)

    def _tell(self, hook: Any, **record: Any) -> None:
        """Call an observer. A plugin that raises is reported once and costs nobody a token."""
        try:
            hook(**record)
        except Exception:
            if not self._observer_failed:
                self._observer_failed = True
                logger.exception("a plugin failed in %s; generation goes on without it", hook.name)

    # ---- lifetime

    @property
    def closed(self) -> bool:
        return bool(self._handle == ffi.NULL)

    def close(self) -> None:
        """Free the native session, then the draft context. Idempotent."""
        if self.closed:
            return
        handle, self._handle = self._handle, ffi.NULL
        alive = self._draft is not None and self._draft.ctx is not None
        lib.mtp_session_close(handle, int(alive))
        if alive and self._draft is not None:
            self._draft.close()
        self._tell(self._hooks.mtp_session_closed, settings=self._settings)

    # ---- one token

    def next(
        self,
        sampler: Any,
        last: int,
        pos: int,
        context: npt.NDArray[np.intc],
        proposed: Sequence[int] | None = None,
    ) -> int:
        """Return the token after ``last``, which stands at ``pos`` and ends ``context``.

        ``sampler`` is the address (a cffi ``void *``) of the caller's ``llama_sampler`` chain,
        stepped exactly once. Tokens that the caller ``proposed`` are the drafts of a new round.
        """
        start = time.perf_counter_ns()
        step, handle = self._step, self._handle
        if proposed is not None:
            self.settle()  # not replayed: the round that follows does that
        if self._rows_left:
            native = time.perf_counter_ns()
            check(lib.mtp_next(handle, sampler, last, pos, ffi.NULL, step), handle)
        else:
            self.finish_round()
            self.checkpoints.cut(pos)
            self._proposed = proposed is not None
            rule = self._rule(context)
            useful = self._end - pos - 2  # the last token that is wanted needs no draft
            if self._drafter is None and proposed is None:
                load = self._load(rule, useful)
                native = time.perf_counter_ns()
                check(lib.mtp_next(handle, sampler, last, pos, load, step), handle)
            else:
                if proposed is None:
                    tokens, draft_ns = self._ask_drafter(context, min(rule.ask(), useful))
                    self._classes = (0,) * len(tokens)
                    n = rule.keep(self._classes)
                else:
                    room = self._room(self._settings.n_max, pos)
                    tokens, draft_ns = self._usable(proposed, room), 0
                    n = len(tokens)
                native = time.perf_counter_ns()
                check(lib.mtp_verify(handle, last, pos, tokens, n, len(tokens)), handle)
                self._open_round = True
                check(lib.mtp_sample(handle, sampler, step), handle)
                step.draft_ns = draft_ns
            self._open_round = True
        done = time.perf_counter_ns()
        self._rows_left = step.rows_left
        self._python_ns += native - start + time.perf_counter_ns() - done
        return int(step.token)

    @property
    def depth_bound(self) -> int:
        """The most drafts that a round was built for."""
        return self._settings.n_max

    @contextmanager
    def constant_depth(self, depth: int) -> Iterator[None]:
        """Draft ``depth`` tokens in every round of the block; the policy sees nothing of it."""
        constant = DepthPolicy(self._settings.n_max, adaptive=False)
        constant.depth_max = depth
        self.finish_round()
        policy, self.policy = self.policy, constant
        try:
            yield
        finally:
            if not self.closed:
                self.finish_round()
            self.policy = policy

    def accept_by_coin(self, chances: Sequence[float], seed: int = 1) -> None:
        """For measurements: a seeded coin accepts the draft at position i with ``chances[i]``.

        The last chance serves all deeper positions; none lets the model decide again. What a round
        costs can so be read at any acceptance. The text is nonsense.
        """
        if chances:
            logger.warning("a coin accepts the drafts from now on: the text is nonsense")
        check(lib.mtp_accept_by_coin(self._handle, list(chances), len(chances), seed), self._handle)

    def _rule(self, context: npt.NDArray[np.intc]) -> Rule:
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
        native = self._native_rule
        native.depth = depth
        if rule is not self._loaded:
            native.window = rule.window
            for name in ("accept", "go", "price"):
                values = getattr(rule, name)
                ffi.memmove(getattr(native, name), values, values.nbytes)
            self._loaded = rule
        return native

    def _ask_drafter(self, context: npt.NDArray[np.intc], depth: int) -> tuple[list[int], int]:
        assert self._drafter is not None
        room = self._room(depth, len(context) - 1)
        if not room or lib.mtp_replays_only(self._handle):
            return [], 0
        start = time.perf_counter_ns()
        draft = self._drafter.draft(DraftRequest(_read_only(context), room))
        tokens = self._usable(draft.tokens, room)
        return tokens, time.perf_counter_ns() - start

    def _room(self, depth: int, pos: int) -> int:
        """Return how many of ``depth`` drafts fit the context after position ``pos``."""
        return max(0, min(depth, self._settings.n_ctx - pos - 1))

    def _usable(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return at most ``room`` of the tokens, up to the first invalid id."""
        usable = []
        for token in tokens[:room]:
            if not 0 <= token < self._settings.n_vocab:
                break
            usable.append(int(token))
        return usable

    def finish_round(self) -> None:
        """Book the round that is over: statistics, depth policy, observers."""
        if not self._open_round:
            return
        self._open_round = False
        self._rows_left = 0
        step, now, before = self._step, self._counters, self._before
        lib.mtp_session_counters(self._handle, now)
        target_ns = now.target_ns - before.target_ns
        draft_ns = now.draft_ns - before.draft_ns
        sample_ns = now.sample_ns - before.sample_ns
        rollback_ns = now.rollback_ns - before.rollback_ns
        rest_ns = now.total_ns - before.total_ns - target_ns - draft_ns - sample_ns
        native_ns, python_ns = rest_ns - rollback_ns, self._python_ns
        drafter = self._drafter is not None
        classes = self._classes if drafter else ffi.unpack(step.classes, step.n_picks)
        self.stats.observe_round(
            step.n_drafted,
            step.n_sampled,
            step.n_accepted,
            target_ns=target_ns,
            picks=len(classes),
            draft_ns=draft_ns + (step.draft_ns if drafter else 0),
            sample_ns=sample_ns,
            rollback_ns=rollback_ns,
            native_overhead_ns=native_ns,
            python_ns=python_ns,
            target_decodes=now.n_target_decodes - before.n_target_decodes,
            draft_decodes=now.n_draft_decodes - before.n_draft_decodes,
        )
        self._python_ns = 0
        self._counters, self._before = before, now
        if step.n_replayed and not step.n_drafted:
            self.policy.observe_replay(step.target_ns + step.draft_ns)
        elif not self._proposed:  # the caller's guesses say nothing about the drafter's
            beside = rest_ns + python_ns  # what a round takes beside its decodes is a cost too
            self.policy.observe(
                step.n_drafted,
                step.target_ns + beside,
                classes,
                step.draft_ns,
                step.n_sampled,
                step.n_accepted,
                bool(step.spare) if step.spare >= 0 else None,
            )
        if self.policy.dropped and not self._told:
            self._told = True
            logger.warning("drafting does not pay here and is off. %s", self.policy.explain())
        if self._observed:
            self._tell(
                self._hooks.mtp_round_finished,
                verdict=Verdict(
                    step.n_drafted, step.n_accepted, step.n_sampled, step.target_ns, step.draft_ns
                ),
            )

    def begin_generation(
        self, context: npt.NDArray[np.intc], sampling: Hashable, wanted: int | None = None
    ) -> None:
        """Start counting a generation, and cut the draft context to what ``context`` says.

        Acceptance is counted apart for each way of ``sampling``. No more is drafted than
        ``wanted`` tokens after the context, the first of which takes no round, have use for.
        """
        n_ctx = self._settings.n_ctx
        self._end = n_ctx + 1 if wanted is None else min(len(context) + wanted, n_ctx + 1)
        self.stats.begin()
        self.policy.begin(sampling)
        lib.mtp_session_counters(self._handle, self._before)
        self.align(context)

    # ---- the target was decoded, cut or replaced outside a round

    @contextmanager
    def prompt(self, end: int) -> Iterator[None]:
        """Inside, a prompt is evaluated whose last token stands before ``end``.

        Of batches that lie wholly before the prefill window the host keeps no hidden rows.
        """
        if self._window:
            self._unread = end - self._window
        try:
            yield
        finally:
            self._unread = 0
            if not self.closed:
                self._keep_rows(True)

    def _keep_rows(self, on: bool) -> None:
        if on == self._keeps_rows:
            return
        check(lib.mtp_keep_rows(self._handle, on), self._handle)
        self._keeps_rows = on
        if on:
            host.plan_anew(self._target)

    def expect(self, batch: Any) -> None:
        """The host is about to decode ``batch`` (a ``llama_batch``): with hidden rows, if read."""
        self._keep_rows(batch.pos[batch.n_tokens - 1] >= self._unread)

    def capture(self, batch: Any) -> None:
        """Take the hidden rows of a decode that the host just did (a ``llama_batch``)."""
        handle = self._handle
        self.checkpoints.cut(batch.pos[0])
        tokens = ffi.cast("int32_t *", ctypes.addressof(batch.token.contents))
        check(lib.mtp_capture(handle, tokens, batch.n_tokens, batch.pos[0]), handle)

    def memory(self) -> dict[str, int]:
        """Bytes that are held beside the host's buffers, by part; empty parts are left out."""
        now = ffi.new("struct mtp_counters *")
        lib.mtp_session_counters(self._handle, now)
        parts = {"checkpoints": self.checkpoints.n_bytes, "hidden rows": now.n_row_bytes}
        return {part: size for part, size in parts.items() if size}

    @property
    def n_past(self) -> int:
        """Positions that the target holds, rows that nobody sampled left out."""
        return int(lib.mtp_n_past(self._handle))

    @property
    def live_row(self) -> int:
        """Output row with the logits of the last kept position; -1 when they are gone."""
        return int(lib.mtp_live_row(self._handle))

    def settle(self) -> None:
        """End a round in the middle: both contexts are cut to the tokens that were emitted.

        A recurrent state without snapshots follows with the next round, or at :meth:`replay`.
        """
        self.finish_round()
        check(lib.mtp_settle(self._handle), self._handle)

    def replay(self) -> None:
        """Settle, and make the target's memory what it counts as, for others to use.

        RollbackRefused where the host does not take its own state back.
        """
        self.finish_round()
        check(lib.mtp_replay(self._handle), self._handle)

    def can_truncate(self, n_past: int) -> bool:
        return bool(lib.mtp_can_truncate(self._handle, n_past))

    def lacks_row(self, n_past: int) -> bool:
        """Whether the draft needs the token before ``n_past`` evaluated again after a cut there."""
        return bool(lib.mtp_lacks_row(self._handle, n_past))

    def truncate(self, n_past: int) -> None:
        """Cut both contexts to ``n_past`` positions; RollbackRefused where the state is gone."""
        self.finish_round()
        self.checkpoints.cut(n_past)
        check(lib.mtp_truncate(self._handle, n_past), self._handle)

    def forget(self, n_past: int) -> None:
        """Someone replaced the target's memory, which now ends at ``n_past``."""
        self.finish_round()
        self.checkpoints.clear()
        check(lib.mtp_forget(self._handle, n_past), self._handle)

    def save_checkpoint(self, history: npt.NDArray[np.intc]) -> None:
        """Keep the recurrent state after ``history``, and the hidden row that the draft needs."""
        row: npt.NDArray[np.float32] | None = None
        if self._draft is not None:
            row = np.empty(self._n_embd, dtype=np.float32)
            check(lib.mtp_row_get(self._handle, ffi.from_buffer("float[]", row)), self._handle)
        self.checkpoints.save(history, row)

    def restore(self, prompt: Sequence[int]) -> int:
        """Take both contexts back to the deepest checkpoint inside ``prompt``; its length, or 0.

        After 0 the target's memory is not to be used before it is cleared.
        """
        kept = self.checkpoints.find(prompt)
        if kept is None:
            return 0
        self.settle()
        # Before the memory changes: an interrupt in between then shows as two ends that differ.
        check(lib.mtp_forget(self._handle, kept.n_past), self._handle)
        self.align(kept.history)
        if not self.checkpoints.restore(kept):
            self.forget(0)
            return 0
        if kept.row is not None:
            row = ffi.from_buffer("float[]", kept.row)
            check(lib.mtp_row_set(self._handle, row), self._handle)
        return kept.n_past

    def align(self, context: npt.NDArray[np.intc]) -> None:
        """Cut the draft context to the prefix that it has in common with ``context``."""
        tokens = ffi.from_buffer("int32_t[]", np.ascontiguousarray(context, dtype=np.int32))
        check(lib.mtp_align(self._handle, tokens, len(context)), self._handle)

    # ---- state

    @property
    def draft_context(self) -> Any | None:
        """The host's ``LlamaContext`` of the draft; None where drafts come from elsewhere."""
        return self._draft

    def save_draft(self) -> bytes:
        """End a round in the middle and return what waits for the draft context.

        Its memory, which the host saves, then holds nothing but true rows.
        """
        self.finish_round()
        handle, size = self._handle, ffi.new("size_t *")
        check(lib.mtp_state_size(handle, size), handle)
        data = bytearray(size[0])
        check(lib.mtp_state_get(handle, ffi.from_buffer(data), size[0]), handle)
        return bytes(data)

    def check_draft(self, queue: bytes) -> None:
        """Raise NativeError, with the reason, where :meth:`load_draft` would."""
        check(lib.mtp_state_check(self._handle, ffi.from_buffer(queue), len(queue)), self._handle)

    def load_draft(self, queue: bytes | None) -> None:
        """After :meth:`forget`: take over ``queue``, whose memory the draft context has back.

        Without one the draft context is emptied and starts at the end of the target's text.
        """
        data = ffi.NULL if queue is None else ffi.from_buffer(queue)
        check(lib.mtp_state_set(self._handle, data, len(queue or b"")), self._handle)


def different_vocabulary(a: Any, b: Any, narrow: Vocabulary | None = None) -> str | None:
    """Say where the vocabularies of two ``LlamaModel`` part; None when they are the same.

    ``narrow`` says which tokens of ``a`` those of ``b`` are to be, where it has only some.
    """
    if narrow is not None and len(narrow.stand_ins) != a.n_vocab():
        return f"one has {a.n_vocab()} tokens, the other is for {len(narrow.stand_ins)}"
    return compare_vocabularies(
        host.address_table(api_names()),
        host.batch_layout(),
        host.vocabulary_of(a),
        host.vocabulary_of(b),
        None if narrow is None else narrow.tokens,
    )


def _narrow(vocabulary: Vocabulary) -> dict[str, Any]:
    """The fields of ``mtp_session_params`` for a head with a part of the vocabulary."""
    return {
        "n_draft_vocab": len(vocabulary.tokens),
        "draft_tokens": ffi.from_buffer("int32_t[]", vocabulary.tokens),
        "stand_ins": ffi.from_buffer("int32_t[]", vocabulary.stand_ins),
    }


def shared_prefix(a: npt.NDArray[np.intc], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their start."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != np.asarray(b[:n], dtype=np.intc))
    return int(differs[0]) if len(differs) else n


def _read_only(context: npt.NDArray[np.intc]) -> npt.NDArray[np.int32]:
    view: npt.NDArray[np.int32] = context.view()
    view.flags.writeable = False
    return view
