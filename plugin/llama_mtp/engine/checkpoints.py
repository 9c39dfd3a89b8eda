"""Checkpoints: copies of the recurrent state near the ends of prompts.

The attention part of a hybrid model's memory can be cut to any length, its recurrent part cannot:
it holds the state after the last token and a few snapshots. So a chat whose last turn changed would
be read again from its first token. A checkpoint is the recurrent part alone, as it was after the
first ``n`` tokens. Going back to it means to put it back and to cut the attention part to ``n``.

That is right only while the attention cells below ``n`` are the ones that were there when the
checkpoint was made. Hence the one rule: where the memory is cut below ``n``, or written to below
it, or replaced, the checkpoint is gone. Those that are left are prefixes of what the memory holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host

logger = logging.getLogger("llama_mtp")

MAX_BYTES = 512 * 2**20  # of all checkpoints of one object together

# A checkpoint stands this many tokens before the prompt's end, as in llama.cpp's server. The same
# prompt again then has tokens left to evaluate, and what a chat template ends a prompt with (the
# opening of a thought, say) need not come back in the next turn.
TAIL = 4

# Nearer to the one before it, reading the tokens again costs less than a copy and one more decode.
MIN_STEP = 32

_PARTIAL = host.C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


@dataclass(frozen=True)
class Checkpoint:
    """The recurrent state after ``history``, and the hidden row that the draft needs next."""

    history: npt.NDArray[np.intc]
    state: npt.NDArray[np.uint8]
    row: npt.NDArray[np.float32] | None = None  # (n_embd,)

    @property
    def n_past(self) -> int:
        return len(self.history)

    @property
    def n_bytes(self) -> int:
        return self.state.nbytes + (self.row.nbytes if self.row is not None else 0)


@dataclass
class CheckpointStats:
    """What checkpoints did since construction; times include the host's wait for the device."""

    saved: int = 0
    restored: int = 0
    tokens_kept: int = 0  # that restoring spared the target
    save_ns: int = 0
    restore_ns: int = 0


class Checkpoints:
    """The checkpoints of one context, shallowest first: at most ``limit``, and ``max_bytes``."""

    def __init__(self, target: Any, limit: int, max_bytes: int = MAX_BYTES) -> None:
        self._target = target
        self.limit = limit
        self.max_bytes = max_bytes
        self.stats = CheckpointStats()
        self._kept: list[Checkpoint] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def positions(self) -> list[int]:
        """Lengths of the histories that can be gone back to."""
        return [c.n_past for c in self._kept]

    @property
    def n_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(c.n_bytes for c in self._kept)

    # ---- what makes them stale

    def cut(self, n_past: int) -> None:
        """The memory is about to change from position ``n_past`` on."""
        while self._kept and self._kept[-1].n_past > n_past:
            self._kept.pop()

    def clear(self) -> None:
        """The memory was emptied or replaced."""
        self._kept.clear()

    # ---- making and using them

    def wanted(self, n_past: int) -> bool:
        """Whether a checkpoint after ``n_past`` tokens is worth making."""
        last = self._kept[-1].n_past if self._kept else 0
        return self.limit > 0 and n_past - last >= MIN_STEP

    def save(
        self, history: npt.NDArray[np.intc], row: npt.NDArray[np.float32] | None = None
    ) -> None:
        """Copy the state that the settled target has after ``history``, and keep ``row`` with it.

        Nothing is kept where the history has images, or where one state is too large.
        """
        if bool((history < 0).any()) or host.memory_end(self._target) != len(history):
            return
        start = time.perf_counter_ns()
        ctx = self._target.ctx
        size = int(host.C.llama_state_seq_get_size_ext(ctx, 0, _PARTIAL))
        total = size + (row.nbytes if row is not None else 0)
        if total > self.max_bytes:
            logger.info("no checkpoints: a recurrent state of %d bytes is too large", size)
            self.limit = 0
        if size <= 0 or total > self.max_bytes or self.limit <= 0:
            self.clear()
            return
        self.cut(len(history) - 1)
        while self._kept and (
            len(self._kept) >= self.limit or self.n_bytes + total > self.max_bytes
        ):
            self._kept.pop(0)
        state = np.empty(size, dtype=np.uint8)
        data = host.pointer_to(state)
        if host.C.llama_state_seq_get_data_ext(ctx, data, size, 0, _PARTIAL) != size:
            return
        self._kept.append(Checkpoint(history.copy(), state, row))
        self.stats.saved += 1
        self.stats.save_ns += time.perf_counter_ns() - start

    def find(self, prompt: Sequence[int]) -> Checkpoint | None:
        """Return the deepest checkpoint that leaves at least one token of ``prompt``."""
        tokens = np.asarray(prompt, dtype=np.intc)
        for kept in reversed(self._kept):
            n = kept.n_past
            if n < len(tokens) and np.array_equal(kept.history, tokens[:n]):
                return kept
        return None

    def restore(self, kept: Checkpoint) -> bool:
        """Take the target back to a checkpoint.

        False: the host did not do it, and the target's memory has to be cleared.
        """
        start = time.perf_counter_ns()
        self.cut(kept.n_past)
        end = host.memory_end(self._target)
        state, ctx, n = kept.state, self._target.ctx, kept.n_past
        # State first: the removal that follows then lies behind the recurrent part's last position
        # and concerns attention cells only (llama-memory-hybrid.cpp asks the recurrent part first).
        data = host.pointer_to(state)
        size = host.C.llama_state_seq_set_data_ext(ctx, data, len(state), 0, _PARTIAL)
        done = (
            int(size) == len(state)
            and bool(host.C.llama_memory_seq_rm(self._target.memory, 0, n, -1))
            and host.memory_end(self._target) == n  # the smaller of both parts' ends
        )
        if done:
            self.stats.restored += 1
            self.stats.tokens_kept += n
            self.stats.restore_ns += time.perf_counter_ns() - start
        else:
            logger.warning("a checkpoint at %d of %d was refused; reading all again", n, end)
        return done
