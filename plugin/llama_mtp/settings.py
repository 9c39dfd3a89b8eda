"""What the user asked for, checked against the file before anything native runs.

Keyword beats environment beats default. The outcome is a :class:`Plan`, or ``None``: run as stock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import SpecTypeError
from .heads.check import HeadReport, check_head
from .heads.check_shared_kv import foreign_cells
from .hooks import SpecType
from .registry import resolve

logger = logging.getLogger("llama_mtp")

MAX_DEPTH = 64  # more rows than this in a verify batch never pay
MAX_CHECKPOINTS = 1024
# More costs prompts more and drafts are no better: tests/bench/figures/prefill.py
PREFILL_WINDOW = 128
DEPTHS = ("adaptive", "fixed")

_T = TypeVar("_T")
_D = TypeVar("_D")


@dataclass(frozen=True)
class SpecOptions:
    """The user's speculative options, every default filled in; names are llama.cpp's own."""

    spec_type: str
    n_max: int
    n_min: int
    p_min: float
    type_k: int | None
    type_v: int | None
    adaptive: bool
    checkpoints: int = 0
    draft_model: str | None = None
    allow_untested: bool = False
    prefill_window: int = PREFILL_WINDOW  # 0: the draft context reads everything

    @property
    def explicit(self) -> bool:
        """Whether the user insists: what cannot be honoured then raises."""
        return self.spec_type != "auto" or self.draft_model is not None


@dataclass(frozen=True)
class Plan:
    """A spec type that this file and these arguments allow, with its sizes."""

    spec: SpecType
    options: SpecOptions
    report: HeadReport  # on the model
    head: HeadReport  # on the file that has the head: the model's, or one of its own
    depth: int  # bound on drafts per round, clamped to what the batch sizes carry

    @property
    def recurrent(self) -> bool:
        """Whether the target has a recurrent state beside, or instead of, a KV cache."""
        return self.report.rollback != "attention"

    @property
    def n_rs_seq(self) -> int:
        """Recurrent snapshots the target needs beyond its current state."""
        return self.depth if self.report.rollback == "snapshots" else 0


def _choose(keyword: _T | None, variable: str, parse: Callable[[str], _T], default: _D) -> _T | _D:
    if keyword is not None:
        return keyword
    text = os.environ.get(variable)
    if text is None or not text.strip():
        return default
    try:
        return parse(text.strip())
    except ValueError as e:
        raise SpecTypeError(
            f"The environment variable {variable}={text!r} is not a number; correct or unset it."
        ) from e


def _switch(text: str) -> bool:
    return int(text) != 0


def read_options(
    spec_type: str | None,
    n_max: int | None,
    n_min: int | None,
    p_min: float | None,
    type_k: int | None,
    type_v: int | None,
    adaptive: bool | None,
    checkpoints: int | None = None,
    draft_model: str | None = None,
    allow_untested: bool | None = None,
    depth: str | None = None,
    prefill_window: int | None = None,
) -> SpecOptions:
    """Fill in environment and defaults; SpecTypeError for values out of range.

    ``depth`` says in a word what ``adaptive`` says: ``"adaptive"`` or ``"fixed"``.
    """
    if depth not in (None, *DEPTHS):
        raise SpecTypeError(
            f'spec_depth is "adaptive" or "fixed", got {depth!r}; spec_draft_n_max is the number.'
        )
    if adaptive is not None and depth is not None and adaptive != (depth == "adaptive"):
        raise SpecTypeError(
            f"spec_depth={depth!r} and spec_adaptive={adaptive} contradict each other; "
            "leave one of the two out."
        )
    if adaptive is None:
        adaptive = depth != "fixed"
    options = SpecOptions(
        spec_type=_choose(spec_type, "LLAMA_ARG_SPEC_TYPE", str, "auto"),
        n_max=_choose(n_max, "LLAMA_ARG_SPEC_DRAFT_N_MAX", int, 3),
        n_min=_choose(n_min, "LLAMA_ARG_SPEC_DRAFT_N_MIN", int, 0),
        p_min=_choose(p_min, "LLAMA_ARG_SPEC_DRAFT_P_MIN", float, 0.0),
        type_k=type_k,
        type_v=type_v,
        adaptive=adaptive,
        checkpoints=_choose(checkpoints, "LLAMA_ARG_CTX_CHECKPOINTS", int, 4),
        draft_model=_choose(draft_model, "LLAMA_ARG_SPEC_DRAFT_MODEL", str, None),
        allow_untested=_choose(allow_untested, "LLAMA_MTP_ALLOW_UNTESTED", _switch, False),
        prefill_window=_choose(prefill_window, "LLAMA_MTP_PREFILL_WINDOW", int, PREFILL_WINDOW),
    )
    if not isinstance(options.spec_type, str):
        raise SpecTypeError(f"spec_type must be a string, got {options.spec_type!r}.")
    if draft_model is not None and options.spec_type == "none":
        raise SpecTypeError(
            'spec_draft_model has no use with spec_type="none"; leave one of the two out.'
        )
    if not 0 <= options.n_max <= MAX_DEPTH:
        raise SpecTypeError(
            f"spec_draft_n_max must be between 0 and {MAX_DEPTH}, got {options.n_max}; "
            "3 is a good start."
        )
    if not 0 <= options.n_min <= options.n_max:
        raise SpecTypeError(
            f"spec_draft_n_min must be between 0 and spec_draft_n_max={options.n_max}, "
            f"got {options.n_min}."
        )
    if not 0.0 <= options.p_min < 1.0:
        raise SpecTypeError(
            f"spec_draft_p_min is a probability below 1, got {options.p_min}; 0 never stops early."
        )
    if not 0 <= options.checkpoints <= MAX_CHECKPOINTS:
        raise SpecTypeError(
            f"spec_checkpoints must be between 0 and {MAX_CHECKPOINTS}, got {options.checkpoints}; "
            "0 keeps none."
        )
    if options.prefill_window < 0:
        raise SpecTypeError(
            f"spec_prefill_window must not be negative, got {options.prefill_window}; "
            "0 reads everything."
        )
    return options


def make_plan(model_path: str, options: SpecOptions, stock: Mapping[str, Any]) -> Plan | None:
    """Decide whether and how to speculate.

    ``stock`` holds the keyword arguments meant for the stock class. With ``spec_type="auto"`` an
    obstacle is logged and the answer is ``None``; with an explicit type it raises SpecTypeError.

    Raises ModelFileError for a file that is no GGUF, damaged or truncated.
    """
    if options.spec_type == "none":
        return None
    spec = resolve("draft-mtp" if options.spec_type == "auto" else options.spec_type)
    if not os.path.exists(model_path):
        return None  # the stock class says so
    obstacle = _obstacle(spec, options, stock)
    if obstacle is None:
        report = check_head(model_path, allow_untested=options.allow_untested)
        head = report
        if options.draft_model is not None:
            head = check_head(
                options.draft_model, target=report, allow_untested=options.allow_untested
            )
        obstacle = f"{head.reason} {head.remedy}".strip()
        if not obstacle and options.draft_model is not None and head.shares_kv:
            obstacle = foreign_cells(report.file, head.file)
        if not spec.needs_head or not obstacle:
            return Plan(spec, options, report, head, _clamp(options.n_max, report, head, stock))
    if options.explicit:
        asked = f"spec_type={options.spec_type!r}"
        if options.draft_model is not None:
            asked = f"spec_draft_model={options.draft_model!r}"
        raise SpecTypeError(f"{asked} is not possible: {obstacle}")
    logger.info("running without MTP: %s", obstacle)
    return None


def _obstacle(spec: SpecType, options: SpecOptions, stock: Mapping[str, Any]) -> str | None:
    if options.draft_model is not None and not spec.needs_head:
        return f"{spec.name} drafts without a head; leave spec_draft_model out."
    if stock.get("draft_model") is not None:
        return "draft_model= is another source of drafts; pass one of the two."
    if stock.get("embedding"):
        return "embedding=True makes no text; make a second object for embeddings."
    if stock.get("vocab_only"):
        return "vocab_only=True loads no weights; load the model to generate text."
    return None


def _clamp(depth: int, report: HeadReport, head: HeadReport, stock: Mapping[str, Any]) -> int:
    """Bound the depth by what one decode carries (llama-batch.cpp: n_ubatch > n_rs_seq + 1)."""
    n_ctx: int = stock.get("n_ctx", 512) or report.n_ctx_train or 512
    n_batch: int = min(n_ctx, stock.get("n_batch", 512))
    n_ubatch = min(n_batch, stock.get("n_ubatch", 512))
    room = n_ubatch - 2 if report.rollback == "snapshots" else n_batch - 1
    if depth > room:
        logger.warning("spec_draft_n_max=%d lowered to %d by n_batch/n_ubatch", depth, max(room, 0))
    if head.chained:  # as llama.cpp: nobody trained a head for the positions after the last
        room = min(room, head.n_heads)
    return max(0, min(depth, room))
