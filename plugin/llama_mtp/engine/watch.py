"""Capture: what anyone decodes, cuts or clears in the target goes through the session.

Stock code and chat handlers use the ``LlamaContext`` itself. Three methods of that one object are
replaced, and the class stays as it is.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .. import host
from ..errors import RollbackRefused
from .session import Session


def watch(target: Any, session: Session, n_outputs_max: int) -> None:
    """Hang capture and the rollback rules on this one ``LlamaContext``."""
    decode, seq_rm, clear = target.decode, target.kv_cache_seq_rm, target.kv_cache_clear

    def decode_and_capture(batch: Any) -> None:
        with session.entry:
            checked_decode(batch)

    def checked_decode(batch: Any) -> None:
        rows = batch.batch
        n = rows.n_tokens
        if n_outputs_max and n > n_outputs_max:
            n_outputs = n - ctypes.string_at(rows.logits, n).count(0)
            if n_outputs > n_outputs_max:  # the host would abort the process
                raise ValueError(
                    f"{n_outputs} rows with logits in one batch, but the context was made for "
                    f"{n_outputs_max}; construct Llama with logits_all=True to ask for more."
                )
        session.replay()
        try:
            session.expect(rows)
            decode(batch)
            session.capture(rows)
        except BaseException:  # an interrupt too
            # Some rows may be in: believe the memory, so that a recurrent state is evaluated anew.
            session.forget(host.memory_end(target))
            raise

    def rules_then_remove(seq_id: int, p0: int, p1: int) -> bool:
        with session.entry:
            return remove(seq_id, p0, p1)

    def remove(seq_id: int, p0: int, p1: int) -> bool:
        session.settle()
        start = max(p0, 0)
        if p1 < 0 and start < session.n_past:
            try:
                session.truncate(start)
                session.replay()
            except RollbackRefused:
                return False
            return True
        session.replay()
        done = bool(seq_rm(seq_id, p0, p1))
        if p1 >= 0:  # a hole in the middle: nothing that we could keep track of
            session.forget(session.n_past)
            session.load_draft(None)
        return done

    def clear_and_forget() -> None:
        with session.entry:
            session.book()
            clear()
            session.forget(0)

    target.decode = decode_and_capture
    target.kv_cache_seq_rm = rules_then_remove
    target.kv_cache_clear = clear_and_forget


def unwatch(target: Any) -> None:
    """Give the context its own methods back."""
    for name in ("decode", "kv_cache_seq_rm", "kv_cache_clear"):
        target.__dict__.pop(name, None)
