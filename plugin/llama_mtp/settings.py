"""The speculative options, and the plan that follows from them, before anything native runs.

A keyword beats its environment variable, which beats the default. The outcome is a :class:`Plan`,
or ``None``: run as stock.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

from .errors import SpecTypeError
from .heads.check import HeadReport, check_head
from .heads.check_shared_kv import foreign_cells
from .hooks import SpecType
from .registry import resolve

logger = logging.getLogger("llama_mtp")

MAX_DEPTH = 64  # more rows than this in a verify batch never pay
# More costs prompts more and drafts are no better: tests/bench/figures/prefill.py
PREFILL_WINDOW = 128

# As in llama.cpp: is_truthy, is_falsey and kv_cache_types of common/arg.cpp, and ggml's numbers.
_SWITCHES = {"on": 1, "enabled": 1, "true": 1, "off": 0, "disabled": 0, "false": 0}
_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "iq4_nl": 20}
_TYPES |= {"q5_0": 6, "q5_1": 7}


class _Kind(NamedTuple):
    """The values that an option takes; both functions raise for others."""

    name: str
    take: Callable[[Any], Any]  # the value of a keyword
    parse: Callable[[str], Any] = str  # the text of a variable, into such a value


def _number(kind: type, accepted: type, end: int, name: str) -> _Kind:
    def take(value: Any) -> Any:
        if not (isinstance(value, accepted) and 0 <= kind(value) < end):
            raise ValueError
        return kind(value)

    return _Kind(name, take, kind)


def _choice(kind: type, numbers: Mapping[str, int], name: str) -> _Kind:
    choices = {**numbers, **{str(number): number for number in numbers.values()}}
    return _Kind(name, lambda value: kind(choices[f"{value}".lower()]))


_NAME = _Kind("a string", str.strip)
_PATH = _Kind("a path", os.fsdecode)
_DEPTH = _number(int, Integral, MAX_DEPTH + 1, f"a whole number from 0 to {MAX_DEPTH}")
_COUNT = _number(int, Integral, 2**31, "a whole number that is not negative")
_PROBABILITY = _number(float, Real, 1, "a probability below 1")
_SWITCH = _choice(bool, _SWITCHES, "True or False")
_TYPE = _choice(int, _TYPES, f"a cache type ({', '.join(_TYPES)}) or its ggml number")


class _Option(NamedTuple):
    """Where an option is given."""

    keyword: str  # "": its variable alone
    variable: str
    kind: _Kind

    def read(self, given: Mapping[str, Any]) -> Any:
        """Return its value, None where there is none; SpecTypeError for one that it cannot have."""
        value, text = given.get(self.keyword), os.environ.get(self.variable, "").strip()
        if value is None and not text:
            return None
        try:
            return self.kind.take(self.kind.parse(text) if value is None else value)
        except (KeyError, TypeError, ValueError):
            where, what = (self.keyword, value) if value is not None else (self.variable, text)
            raise SpecTypeError(f"{where} takes {self.kind.name}, got {what!r}.") from None


def _option(keyword: str, variable: str, kind: _Kind, default: Any = None) -> Any:
    return field(default=default, metadata={"option": _Option(keyword, variable, kind)})


@dataclass(frozen=True)
class SpecOptions:
    """The speculative options of one object: keyword, environment variable, values, default."""

    spec_type: str = _option("spec_type", "LLAMA_ARG_SPEC_TYPE", _NAME, "auto")
    n_max: int = _option("spec_draft_n_max", "LLAMA_ARG_SPEC_DRAFT_N_MAX", _DEPTH, 3)
    p_min: float = _option("spec_draft_p_min", "LLAMA_ARG_SPEC_DRAFT_P_MIN", _PROBABILITY, 0.0)
    draft_model: str | None = _option("spec_draft_model", "LLAMA_ARG_SPEC_DRAFT_MODEL", _PATH)
    type_k: int | None = _option("spec_draft_type_k", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K", _TYPE)
    type_v: int | None = _option("spec_draft_type_v", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V", _TYPE)
    adaptive: bool = _option("spec_adaptive", "LLAMA_MTP_ADAPTIVE", _SWITCH, True)
    checkpoints: int = _option("", "LLAMA_ARG_CTX_CHECKPOINTS", _COUNT, 4)
    prefill_window: int = _option("", "LLAMA_MTP_PREFILL_WINDOW", _COUNT, PREFILL_WINDOW)
    allow_untested: bool = _option("", "LLAMA_MTP_ALLOW_UNTESTED", _SWITCH, False)

    @property
    def explicit(self) -> bool:
        """Whether the user insists: what cannot be honoured then raises."""
        return self.spec_type != "auto" or self.draft_model is not None

    def keywords(self) -> dict[str, Any]:
        """Return the keywords that say the same."""
        return {o.keyword: getattr(self, name) for name, o in OPTIONS.items() if o.keyword}


OPTIONS: dict[str, _Option] = {f.name: f.metadata["option"] for f in fields(SpecOptions)}
_GONE = {
    "spec_depth": "pass spec_adaptive=False for a constant depth",
    "spec_draft_adaptive": "pass spec_adaptive=",
    "spec_draft_n_min": "leave it out",
    "spec_checkpoints": "set the environment variable LLAMA_ARG_CTX_CHECKPOINTS",
    "spec_prefill_window": "set the environment variable LLAMA_MTP_PREFILL_WINDOW",
    "spec_allow_untested": "set the environment variable LLAMA_MTP_ALLOW_UNTESTED",
}


def read_options(**given: Any) -> SpecOptions:
    """Return what keywords, environment and defaults say; None is a keyword that is not given.

    Raises TypeError for a keyword that there is not, and SpecTypeError for a value.
    """
    known = [option.keyword for option in OPTIONS.values()]
    for name in given.keys() - known:
        if name in _GONE:
            raise TypeError(f"{name}= is gone; {_GONE[name]}.")
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise TypeError(f"Llama has no argument {name}=; did you mean {nearest}=?")
    values = {name: option.read(given) for name, option in OPTIONS.items()}
    options = SpecOptions(**{name: value for name, value in values.items() if value is not None})
    if options.spec_type != "none":
        return options
    if given.get("spec_draft_model") is not None:
        raise SpecTypeError('spec_type="none" needs no spec_draft_model; leave one of the two out.')
    return replace(options, draft_model=None)


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
