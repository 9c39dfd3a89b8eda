"""Joining a trunk and a NextN head into one file that runs with MTP.

The trunk's metadata and tensors are taken over byte for byte. The head adds its blocks, its count,
and its entries in the arrays that hold one value per block; where it came from is recorded in the
file.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ModelFileError
from ..gguf.header import TensorInfo
from ..gguf.metadata import decode, elements_type, entry
from ..gguf.model import Gguf, StrPath, block_of
from ..gguf.quantize import is_matrix, requantize, type_for, type_number
from ..gguf.types import type_name
from ..gguf.write import Progress, TensorSource, check_destination, stored, write_gguf
from .architectures import ARCHITECTURES, NOT_EXECUTABLE, OWN_OUTPUT
from .check import check_head
from .match import check_match
from .source import HeadSource
from .split import PER_LAYER, PROVENANCE, head_counts, plain_metadata, trunk_metadata

# Tensors outside the blocks that a deepseek4 head has its own of. One file has one place for them.
_OWN_TOP = ("output_hc_fn.weight", "output_hc_base.weight", "output_hc_scale.weight")


@dataclass(frozen=True)
class GraftReport:
    """What `graft` wrote.

    Attributes:
        path: the file.
        n_bytes: its size.
        n_heads: NextN blocks in it.
        head_types: ggml type of the head's matrices to how many have it.
        notes: what was not as asked, or could not be checked; a sentence each.
    """

    path: Path
    n_bytes: int
    n_heads: int
    head_types: dict[str, int]
    notes: tuple[str, ...] = ()


def graft(
    base: Gguf | StrPath,
    head: StrPath,
    out: StrPath,
    *,
    type: str | None = None,
    output_type: str | None = None,
    replace_head: bool = False,
    verify: Callable[[Path, Path], None] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> GraftReport:
    """Write ``base`` with the NextN head of ``head`` as one file.

    Args:
        base: the trunk: a GGUF of any quantisation; of a split one, the first part.
        head: a GGUF with the head (of the whole model, of the head alone as llama.cpp's ``--mtp``
            writes it, or of nothing but the head's tensors), or the folder of a Hugging Face
            checkpoint.
        out: the file to write.
        type: store the head's matrices in this type (see `quantize.TYPES`); default: as they are.
            Norms, routers and the like keep theirs.
        output_type: give every head an output matrix of its own in this type: its own stored anew,
            or else a copy of the base's. A draft step then reads that one; the text is the base's.
        replace_head: where the base has a head already, put the new one in its place.
        verify: called with base and result before the result gets its name; raises to refuse it.
        force: overwrite ``out``.
        progress: called as data is written.

    Raises:
        ModelFileError: a file is damaged, the two do not belong together, or the result would not
            run.
        FileWriteError: ``out`` cannot be written, or must not be.
        ValueError: a type is unknown.
    """
    wanted = None if type is None else type_number(type)
    output = None if output_type is None else type_number(output_type)
    out, trunk = Path(out), Gguf.open(base)
    _check_base(trunk, replace_head=replace_head)
    source = open_head(Path(head), trunk)
    check_destination(out, [*trunk.parts, *source.files], force=force)
    metadata = trunk_metadata(trunk)
    notes = check_match(trunk, metadata, source)

    n_trunk = trunk.heads.start
    tensors = [replace(t, name=_renumber(t.name, n_trunk)) for t in source.tensors]
    own: list[TensorSource] = []
    if output is not None:
        own, tensors = _own_outputs(trunk, source.n_heads, tensors)
        notes += _fallbacks(own, output)
        own = [requantize(tensor, output) for tensor in own]
    if wanted is not None:
        notes += _fallbacks(tensors, wanted)
        tensors = [requantize(tensor, wanted) for tensor in tensors]
    tensors += own
    matrices = [t.type for t in tensors if is_matrix(t)] or [t.type for t in tensors]
    types = {type_name(kind): n for kind, n in Counter(matrices).most_common()}
    every = _trunk_sources(trunk) + tensors
    _check_result(trunk, source, every)
    size = write_gguf(
        out,
        _joined_metadata(trunk, metadata, source) | _provenance(trunk, source, types),
        every,
        checked=frozenset(t.name for t in tensors),
        padding=PROVENANCE + "padding",
        progress=progress,
        accept=None if verify is None else lambda path: verify(trunk.path, path),
    )
    return GraftReport(out, size, source.n_heads, types, tuple(notes))


# --- the head -------------------------------------------------------------------------------------


def open_head(path: Path, base: Gguf) -> HeadSource:
    """Return the head in a GGUF or in the folder of a Hugging Face checkpoint.

    Raises:
        ModelFileError: it is unreadable or damaged, or holds no head.
    """
    if path.is_dir():
        from .hf.reader import read_head

        return read_head(path, base)
    if path.suffix in (".safetensors", ".json") and path.is_file():
        raise ModelFileError(
            f"{path} is a part of a checkpoint. Name its folder instead: {path.absolute().parent}"
        )
    return head_of(Gguf.open(path, like=base), base)


def head_of(model: Gguf, base: Gguf) -> HeadSource:
    """Return the head in a GGUF.

    Raises:
        ModelFileError: it holds none, or one that has no place in a file with its trunk.
    """
    heads, declared = model.heads, model.declared
    known = ARCHITECTURES.get(model.architecture)
    if known is not None and known.shares_kv:
        raise ModelFileError(
            f"{model.path} is a {model.architecture} head, which stays in a file of its own. "
            "Load the trunk with spec_draft_model set to it."
        )
    if not heads and declared:
        raise ModelFileError(
            f"{model.path} declares {len(declared)} NextN blocks and has dropped their tensors. "
            "Take the head from another file of this model."
        )
    if not heads:
        raise ModelFileError(
            f"{model.path} has no NextN head. Name a GGUF that has one, or a checkpoint's folder."
        )
    for name in _OWN_TOP:
        ours, theirs = base.tensors.get(name), model.tensors.get(name)
        if ours and theirs and _data(base, ours) != _data(model, theirs):
            raise ModelFileError(
                f"{model.path} has a {name} of its own, and a joined file has one place for it. "
                "Keep the files apart, and load the trunk with spec_draft_model set to the head."
            )
    return HeadSource(
        architecture=model.architecture,
        n_heads=len(heads),
        n_embd=model.number("embedding_length") or 0,
        tensors=tuple(
            stored(model, t, _renumber(t.name, -heads.start)) for t in model.head_tensors
        ),
        origin=model.path.name,
        files=model.parts,
        metadata=plain_metadata(model),
        n_blocks=declared.stop,
    )


def _data(model: Gguf, tensor: TensorInfo) -> bytes:
    return b"".join(stored(model, tensor).chunks())


def _renumber(name: str, by: int) -> str:
    block, rest = block_of(name)
    return name if block < 0 else f"blk.{block + by}.{rest}"


def _trunk_sources(base: Gguf) -> list[TensorSource]:
    return [stored(base, tensor) for tensor in base.trunk_tensors]


def _own_outputs(
    base: Gguf, n_heads: int, tensors: Sequence[TensorSource]
) -> tuple[list[TensorSource], list[TensorSource]]:
    """Return an output matrix for every head, its own or a copy of the base's; and the rest.

    Raises:
        ModelFileError: the heads of this architecture read no other than the base's, or the base
            has none to copy.
    """
    if not ARCHITECTURES[base.architecture].own_output:
        raise ModelFileError(
            f"A {base.architecture} head has no output matrix of its own in llama.cpp. Leave out "
            "--output-type."
        )
    if base.output is None:
        raise ModelFileError(f"{base.path} has no output matrix to copy. Convert the model again.")
    if "output.scale" in base.tensors:
        raise ModelFileError(
            f"{base.path} has an output matrix with a scale apart, which cannot be stored anew. "
            "Leave out --output-type."
        )
    names = [f"blk.{base.heads.start + i}.{OWN_OUTPUT}" for i in range(n_heads)]
    there = {tensor.name: tensor for tensor in tensors if tensor.name in names}
    own = [there.get(name) or stored(base, base.output, name) for name in names]
    return own, [tensor for tensor in tensors if tensor.name not in there]


def _fallbacks(tensors: Sequence[TensorSource], wanted: int) -> list[str]:
    kinds = Counter(type_for(t, wanted) for t in tensors if is_matrix(t))
    return [
        f"{n} of the head's matrices are stored as {type_name(kind)}: their rows are no multiple "
        f"of a block of {type_name(wanted)}."
        for kind, n in kinds.items()
        if kind != wanted
    ]


# --- what can be joined ---------------------------------------------------------------------------


def _check_base(base: Gguf, *, replace_head: bool) -> None:
    heads = base.heads  # raises for a file that contradicts itself
    if not base.architecture:
        raise ModelFileError(f"{base.path} does not say its architecture. Convert it again.")
    if base.architecture not in ARCHITECTURES:
        why = NOT_EXECUTABLE.get(
            base.architecture, f"no NextN graph is known for {base.architecture}"
        )
        raise ModelFileError(f"{base.path} would not run with a head: {why}. Use it as it is.")
    if not base.has_trunk:
        raise ModelFileError(
            f"{base.path} holds no trunk. Name the model first and the head second."
        )
    if heads and not replace_head:
        raise ModelFileError(
            f"{base.path} has a NextN head already. Use it as it is, or pass --replace to put "
            "another in its place."
        )


def _check_result(base: Gguf, head: HeadSource, tensors: Sequence[TensorSource]) -> None:
    """Raise unless the joined file would be one that runs."""
    counts = {"block_count": base.heads.start + head.n_heads, "nextn_predict_layers": head.n_heads}
    metadata = base.metadata | {f"{base.architecture}.{name}": n for name, n in counts.items()}
    infos = {t.name: TensorInfo(t.name, t.shape, t.type, 0) for t in tensors}
    # No entries: those of the base say nothing about the arrays of the joined file.
    report = check_head(replace(base, metadata=metadata, tensors=infos, entries={}))
    if not report.executable:
        raise ModelFileError(
            f"{head.origin} and {base.path} give no model that runs: {report.reason} "
            "Take another head."
        )


# --- the joined metadata --------------------------------------------------------------------------


def _joined_metadata(
    base: Gguf, metadata: Mapping[str, bytes], head: HeadSource
) -> dict[str, bytes]:
    """Return the trunk's metadata with the head counted and its per-layer values appended."""
    prefix = f"{base.architecture}."
    joined: dict[str, bytes] = {}
    for key, raw in metadata.items():
        if key == prefix + "block_count":
            joined |= head_counts(base, head.n_heads)  # the two stand where the first stood
        elif key.removeprefix(prefix) in PER_LAYER:
            joined[key] = _extended(base, key, raw, head)
        else:
            joined[key] = raw
    return joined


def _extended(base: Gguf, key: str, raw: bytes, head: HeadSource) -> bytes:
    """Return a per-layer entry with the head's values appended; one value stays one if it can."""
    n_trunk = base.heads.start
    ours = decode(key, raw)
    if isinstance(ours, list) and len(ours) != n_trunk:
        return raw  # not one per block, or one per block of the trunk only
    theirs: Any = None
    if key in head.metadata:
        theirs = decode(key, head.metadata[key])
        if isinstance(theirs, list):
            n_blocks = head.n_blocks or n_trunk + head.n_heads
            if len(theirs) == n_blocks - head.n_heads != head.n_heads:
                return raw  # one per block of the trunk only, in the head's file as well
            if len(theirs) not in (n_blocks, head.n_heads):
                raise ModelFileError(
                    f"{head.origin} has {len(theirs)} values of {key} for {n_blocks} blocks. "
                    "Convert or download it again."
                )
            theirs = theirs[-head.n_heads :]
        else:
            theirs = [theirs] * head.n_heads
    if not isinstance(ours, list):
        if theirs is None or all(value == ours for value in theirs):
            return raw
        ours = [ours] * n_trunk
    if theirs is None:
        # A base that lost the tensors of such a head still says what a silent head does not.
        if len(base.array(key)) == n_trunk + head.n_heads:
            return base.entry(key)
        raise ModelFileError(
            f"{head.origin} does not say {key} for its blocks, and the trunk has one for each. "
            "Take a head with its metadata: the whole model's GGUF, or llama.cpp's --mtp output."
        )
    try:
        return entry(key, ours + theirs, elements_type(key, raw))
    except (struct.error, AttributeError) as error:  # text among numbers, or what does not fit
        raise ModelFileError(
            f"{head.origin} has {theirs} as {key} for its blocks, which does not go with what "
            "the trunk has. Take a head of the same model."
        ) from error


def _provenance(base: Gguf, head: HeadSource, types: Mapping[str, int]) -> dict[str, bytes]:
    values = {
        "base": base.path.name,
        "base_name": base.text("general.name"),
        "head": head.origin,
        "head_type": ", ".join(types),
        "version": __version__,
    }
    return {PROVENANCE + key: entry(PROVENANCE + key, value) for key, value in values.items()}
