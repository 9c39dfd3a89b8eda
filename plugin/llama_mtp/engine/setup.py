"""What a session is opened for, and how the native engine is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host
from ..depth.acceptance import BOUNDS
from ..hooks import SpecType
from .native import ffi, function_names, lib, open_session

_ROLLBACK = {
    "attention": lib.MTP_ROLLBACK_ATTENTION,
    "snapshots": lib.MTP_ROLLBACK_SNAPSHOTS,
    "checkpoint": lib.MTP_ROLLBACK_CHECKPOINT,
}


@dataclass(frozen=True)
class Setup:
    """What a session is opened for. Sizes are tokens.

    Attributes:
        spec: the spec type.
        depth: bound on the drafts of a round.
        p_min: a draft less likely than this ends a round's drafts.
        adaptive: the depth follows measurements.
        prefill_window: most tokens of a prompt that the draft context reads; 0: all.
        n_batch, n_ubatch: of the target.
        rollback: how the target takes tokens back: ``attention``, ``snapshots``, ``checkpoint``.
        n_checkpoints: copies of a recurrent state to keep.
        n_heads: NextN heads that are drafted with.
        chained, shares_kv, gathers, gaps, all_outputs: of the head, see ``struct
            mtp_session_params``.
        draft_tokens, stand_ins: int32 arrays of a head with a part of the vocabulary, or None.
    """

    spec: SpecType
    depth: int
    p_min: float
    adaptive: bool
    prefill_window: int
    n_batch: int
    n_ubatch: int
    rollback: str
    n_checkpoints: int
    n_heads: int = 1
    chained: bool = False
    shares_kv: bool = False
    gathers: bool = False
    gaps: bool = False
    all_outputs: bool = False
    draft_tokens: npt.NDArray[np.int32] | None = None
    stand_ins: npt.NDArray[np.int32] | None = None

    @property
    def recurrent(self) -> bool:
        """Whether the target has a recurrent state."""
        return self.rollback != "attention"

    def open(self, target: Any, draft: Any | None, *, confidence: bool) -> Any:
        """Open the native session of two ``LlamaContext``; its owner closes it.

        With ``confidence`` every draft has a class by its probability.
        """
        narrow: dict[str, Any] = {}
        if self.draft_tokens is not None:
            narrow = {
                "n_draft_vocab": len(self.draft_tokens),
                "draft_tokens": ffi.from_buffer("int32_t[]", self.draft_tokens),
                "stand_ins": ffi.from_buffer("int32_t[]", self.stand_ins),
            }
        drafting = lib.MTP_DRAFTING_ONE_HEAD
        if self.shares_kv:
            drafting = lib.MTP_DRAFTING_SHARED_KV
        elif self.chained:
            drafting = lib.MTP_DRAFTING_CHAINED
        return open_session(
            host.address_table(function_names()),
            host.batch_layout(),
            {
                "target": ffi.cast("void *", target.ctx),
                "draft": ffi.cast("void *", draft.ctx) if draft is not None else ffi.NULL,
                "n_vocab": target.model.n_vocab(),
                "n_embd": host.n_embd_out(target.model),
                "n_ctx": target.n_ctx(),
                "n_batch": self.n_batch,
                "n_ubatch": self.n_ubatch,
                "n_draft_max": self.depth,
                "n_rs_seq": host.n_rs_seq(target),
                "rollback": _ROLLBACK[self.rollback],
                "gathers": int(self.gathers),
                "gaps": int(self.gaps),
                "confidence": int(confidence),
                "class_bounds": BOUNDS,
                "drafting": drafting,
                "n_heads": max(1, self.n_heads),
                "all_outputs": int(self.all_outputs),
                "prefill_window": min(self.prefill_window, target.n_ctx()),
                "n_checkpoints": self.n_checkpoints,
                **narrow,
            },
        )
