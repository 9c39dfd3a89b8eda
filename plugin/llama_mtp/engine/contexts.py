"""Target and draft context in step, whoever decodes, cuts or saves them."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host
from .lock import Entry
from .native import check, ffi, lib
from .setup import Setup


class Contexts(ABC):
    """Two contexts of the host and the native session that drives them.

    Positions and counts are tokens. Every method raises ClosedError after :meth:`close`. The caller
    is inside :attr:`entry`.
    """

    def __init__(self, target: Any, draft: Any | None, setup: Setup, *, confidence: bool) -> None:
        self._handle: Any = ffi.NULL
        self.entry = Entry()
        self.setup = setup
        self._target, self._draft = target, draft
        self._handle = setup.open(target, draft, confidence=confidence)
        self._keeps_rows = True  # the host, with its next decode
        self._unread = 0  # positions that the draft context will not read

    @abstractmethod
    def book(self) -> None:
        """Book the round that is under way, before anything else happens to the contexts."""

    # ---- lifetime

    @property
    def closed(self) -> bool:
        return bool(self._handle == ffi.NULL)

    @property
    def draft_context(self) -> Any | None:
        """The host's ``LlamaContext`` of the draft; None where drafts come from elsewhere."""
        return self._draft

    def close(self) -> None:
        """Free the native session, then the draft context. Idempotent."""
        handle, self._handle = self._handle, ffi.NULL
        if handle == ffi.NULL:
            return
        alive = self._draft is not None and self._draft.ctx is not None
        lib.mtp_session_close(handle, int(alive))
        if alive and self._draft is not None:
            self._draft.close()

    # ---- numbers

    def counters(self) -> dict[str, int]:
        """The engine's counters since the session was opened (``struct mtp_counters``)."""
        with self.entry.wait():
            now = ffi.new("struct mtp_counters *")
            lib.mtp_session_counters(self._handle, now)
            return {name: int(getattr(now, name)) for name, _ in ffi.typeof(now[0]).fields}

    def memory(self) -> dict[str, int]:
        """Bytes that are held beside the host's buffers, by part; empty parts are left out."""
        now = self.counters()
        parts = {"checkpoints": now["n_checkpoint_bytes"], "hidden rows": now["n_row_bytes"]}
        return {part: size for part, size in parts.items() if size}

    @property
    def n_past(self) -> int:
        """Positions that the target holds, rows that nobody sampled left out."""
        return int(lib.mtp_n_past(self._handle))

    @property
    def live_row(self) -> int:
        """Output row with the logits of the last kept position; -1 when they are gone."""
        return int(lib.mtp_live_row(self._handle))

    # ---- the target is decoded outside of rounds

    @contextmanager
    def prompt(self, end: int) -> Iterator[None]:
        """Inside, a prompt is evaluated whose last token stands before ``end``.

        Of batches that lie wholly before the prefill window the host keeps no hidden rows.
        """
        setup = self.setup
        if setup.prefill_window and not setup.shares_kv:
            window = max(setup.prefill_window, setup.depth, lib.MTP_CHECKPOINT_TAIL)
            self._unread = end - window - 1
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
        tokens = ffi.cast("int32_t *", ctypes.addressof(batch.token.contents))
        check(lib.mtp_capture(self._handle, tokens, batch.n_tokens, batch.pos[0]), self._handle)

    # ---- going back

    def reuse(self, text: npt.NDArray[np.intc], prompt: npt.NDArray[np.intc]) -> int:
        """Keep of the target's ``text`` what ``prompt`` shares with it; how many tokens that is.

        Cuts the memory, or takes it back to the deepest checkpoint. 0: clear the target and
        evaluate the whole prompt.
        """
        self.book()
        kept = ffi.new("int32_t *")
        check(
            lib.mtp_reuse(self._handle, int32(text), len(text), int32(prompt), len(prompt), kept),
            self._handle,
        )
        return int(kept[0])

    def checkpoint_at(self, end: int) -> int:
        """Where to pause in a prompt that ends at ``end``, for :meth:`save_checkpoint`; or -1."""
        return int(lib.mtp_checkpoint_at(self._handle, end))

    def save_checkpoint(self, text: npt.NDArray[np.intc]) -> None:
        """Keep a copy of the recurrent state after ``text``, which the target holds."""
        check(lib.mtp_checkpoint(self._handle, int32(text), len(text)), self._handle)

    def settle(self) -> None:
        """End a round in the middle: both contexts are cut to the tokens that were emitted.

        A recurrent state without snapshots follows with the next round, or at :meth:`replay`.
        """
        self.book()
        check(lib.mtp_settle(self._handle), self._handle)

    def replay(self) -> None:
        """Settle, and make the target's memory what it counts as, for others to use.

        RollbackRefused where the host does not take its own state back.
        """
        self.book()
        check(lib.mtp_replay(self._handle), self._handle)

    def can_truncate(self, n_past: int) -> bool:
        return bool(lib.mtp_can_truncate(self._handle, n_past))

    def truncate(self, n_past: int) -> None:
        """Cut both contexts to ``n_past`` positions; RollbackRefused where the state is gone."""
        self.book()
        check(lib.mtp_truncate(self._handle, n_past), self._handle)

    def forget(self, n_past: int) -> None:
        """Someone replaced the target's memory, which now ends at ``n_past``."""
        self.book()
        check(lib.mtp_forget(self._handle, n_past), self._handle)

    # ---- state

    def save_draft(self) -> bytes:
        """End a round in the middle and return what waits for the draft context.

        Its memory, which the host saves, then holds nothing but true rows.
        """
        self.book()
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


def int32(tokens: npt.NDArray[np.intc]) -> Any:
    """Return a cffi ``int32_t[]`` over tokens, kept alive by it."""
    return ffi.from_buffer("int32_t[]", np.ascontiguousarray(tokens, dtype=np.int32))
