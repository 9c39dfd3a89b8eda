"""Whether a GGUF holds a NextN head that can be executed, decided from its header alone.

libllama aborts the process on a head that is declared and not there, or that it has no graph for.
So this is asked before anything native runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..gguf.model import Gguf, StrPath
from .architectures import ARCHITECTURES, NOT_EXECUTABLE, Architecture, Rollback, rollback_of
from .check_aborts import refuse_what_aborts

NARROW = "llama_mtp.narrow."
"""Keys of a head with a part of the vocabulary only begin with this."""

_HEAD = ("nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight")
_RUN_STOCK = 'Use spec_type="none", or a spec type that needs no head.'
_GET_HEAD = "Use a GGUF that was converted with its MTP layers, if the model has them."


@dataclass(frozen=True)
class HeadReport:
    """What `check_head` found.

    Attributes:
        architecture: ``general.architecture``; empty if the file does not say.
        n_layer_trunk: layers without the NextN blocks; 0 if unknown.
        n_heads: NextN blocks that the file declares.
        n_embd: width of the hidden rows of the trunk; 0 if unknown.
        n_ctx_train: tokens of context that the model was trained on; 0 if unknown.
        missing: tensors of the head that should be there and are not.
        executable: the head can be drafted with.
        reason: why not, in one sentence; empty if executable.
        remedy: what to do, in one sentence; empty if executable.
        rollback: how the trunk forgets rejected tokens (see `.architectures`), known with
            and without a head.
        gathers: the draft context must hand out its hidden rows masked.
        mrope: positions may have gaps.
        chained: every head drafts one position.
        shares_kv: the head reads the KV cache of its target.
        untested: no release of this package has run the architecture's head.
        narrow: the head has a part of the model's vocabulary only.
        file: what was checked.
    """

    architecture: str
    n_layer_trunk: int
    n_heads: int
    n_embd: int
    n_ctx_train: int
    missing: tuple[str, ...]
    executable: bool
    reason: str
    remedy: str
    rollback: Rollback
    gathers: bool
    mrope: bool
    chained: bool
    shares_kv: bool
    untested: bool
    narrow: bool
    file: Gguf = field(compare=False, repr=False)


def check_head(
    file: Gguf | StrPath, *, target: HeadReport | None = None, allow_untested: bool = False
) -> HeadReport:
    """Say whether the NextN head of a GGUF can be executed, and if not, why.

    A file without a head is no error: the report says so.

    Args:
        file: the model; of a split one, the first part.
        target: the report on the model that a head in a file of its own belongs to.
        allow_untested: let pass a head that no release of this package has run.

    Raises:
        ModelFileError: the file is unreadable, no GGUF, damaged or truncated, or has values that
            libllama aborts on.
    """
    model = Gguf.open(file, like=None if target is None else target.file)
    refuse_what_aborts(model)
    name, heads = model.architecture, model.declared
    untested = bool(heads) and name not in ARCHITECTURES and name not in NOT_EXECUTABLE
    known = ARCHITECTURES.get(name, Architecture(gathers=untested))
    missing = () if name in NOT_EXECUTABLE else _missing(model, known)
    reason, remedy = _obstacle(model, missing, target, allow_untested)
    return HeadReport(
        architecture=name,
        n_layer_trunk=heads.start,
        n_heads=len(heads),
        n_embd=model.number("embedding_length") or 0,
        n_ctx_train=model.number("context_length") or 0,
        missing=missing,
        executable=not reason,
        reason=reason and f"{reason}.",
        remedy=remedy,
        rollback=rollback_of(name),
        gathers=known.gathers,
        mrope=known.mrope,
        chained=known.chained and len(heads) > 1,
        shares_kv=known.shares_kv,
        untested=untested,
        narrow=any(key.startswith(NARROW) for key in model.metadata),
        file=model,
    )


def _missing(model: Gguf, architecture: Architecture) -> tuple[str, ...]:
    """The tensors that the head's graph uses and the file lacks."""
    if architecture.shares_kv:
        return ()
    missing = []
    for block in model.declared:
        prefix = f"blk.{block}."
        present = {t.removeprefix(prefix) for t in model.tensors if t.startswith(prefix)}
        wanted = [t for t in (*_HEAD, *architecture.requires) if t not in present]
        lacks = [[t for t in one if t not in present] for one in architecture.one_of]
        fewest: list[str] = min(lacks, key=len, default=[])
        wanted += fewest
        # The block's own layers differ too much to list: one projection of each kind stands for
        # them, and the loader, which knows them all, refuses the rest with a message.
        for kind in ("attn_", "ffn_"):
            matrices = (t for t in present if t.startswith(kind) and t.endswith(".weight"))
            if all("norm" in t for t in matrices) and not any(t.startswith(kind) for t in wanted):
                wanted.append(f"{kind}*.weight")
        missing += [prefix + t for t in wanted]
    return tuple(missing)


def _obstacle(
    model: Gguf, missing: tuple[str, ...], target: HeadReport | None, allow_untested: bool
) -> tuple[str, str]:
    """Reason and remedy; both empty if nothing is in the way."""
    name, n_heads = model.architecture, len(model.declared)
    if not name:
        return "the file does not say its architecture", "Convert or download the model again."
    if n_heads == 0:
        return f"the file has no NextN head (no {name}.nextn_predict_layers)", _GET_HEAD
    if name in NOT_EXECUTABLE:
        return NOT_EXECUTABLE[name], _RUN_STOCK
    architecture = ARCHITECTURES.get(name)
    if architecture is None and not allow_untested:
        return (
            f"the file declares {n_heads} NextN layers, and no release of llama-mtp has run the "
            f"architecture {name}",
            "Look for a newer llama-mtp, set LLAMA_MTP_ALLOW_UNTESTED=1 (libllama may abort), or "
            f"use {_RUN_STOCK[4:]}",
        )
    if n_heads > 1 and not (architecture and (architecture.chained or architecture.shares_kv)):
        return (
            f"the file declares {n_heads} NextN layers, and llama.cpp executes one for {name}",
            _RUN_STOCK,
        )
    if target is not None:
        if reason := _foreign(model, architecture, target):
            return reason, "Pass the head that was made for this model."
    elif architecture and architecture.shares_kv:
        return (
            f"a {name} file is a head without the model it belongs to",
            f"Load the {architecture.target} model, and pass this file as spec_draft_model.",
        )
    elif not model.has_trunk:
        return (
            "the file holds a NextN head without the model it belongs to",
            "Load the GGUF of the model, and pass this file as spec_draft_model.",
        )
    indexer, key = (model.number(f"attention.{part}key_length") or 0 for part in ("indexer.", ""))
    if name == "deepseek4" and indexer == key:
        return (
            f"indexer and keys are both {key} wide, and llama.cpp then divides by zero in the "
            "head's context",
            _RUN_STOCK,
        )
    if name == "glm4moe" and f"{name}.rope.dimension_sections" in model.metadata:
        return (
            "the file has positions in three dimensions (M-RoPE), and llama.cpp's NextN graph for "
            f"{name} aborts on them",
            _RUN_STOCK,
        )
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        return (
            f"the file declares {n_heads} NextN layer{'s' * (n_heads > 1)} and lacks {shown}, "
            "dropped perhaps when it was quantised or split",
            _GET_HEAD,
        )
    return "", ""


def _foreign(model: Gguf, architecture: Architecture | None, target: HeadReport) -> str:
    """Why a head in a file of its own does not belong to the target; empty if it may."""
    name = model.architecture
    wanted = (architecture and architecture.target) or name
    if target.architecture != wanted:
        return f"a {name} head belongs to a {wanted} model, and this one is {target.architecture}"
    key = "embedding_length_out" if architecture and architecture.shares_kv else "embedding_length"
    width = model.number(key) or 0
    if width != target.n_embd:
        return f"the head reads hidden rows of {width} floats, and the model has {target.n_embd}"
    return ""
