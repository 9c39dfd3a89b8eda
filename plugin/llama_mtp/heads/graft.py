"""Joining a trunk and a NextN head into one file that runs with MTP.

The trunk's metadata and tensors are taken over byte for byte. The head adds its blocks, its count,
and its entries in the arrays that hold one value per block; where it came from is recorded in the
file.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ModelFileError
from ..gguf.header import Header, TensorInfo, read_header, type_name
from ..gguf.metadata import decode, elements_type, entry
from ..gguf.quantize import is_matrix, requantize, type_for, type_number
from ..gguf.write import HeadSource, Progress, TensorSource, check_destination, stored, write_gguf
from ..measure.draft_cost import OWN_OUTPUT, output_matrix
from .architectures import ARCHITECTURES, NOT_EXECUTABLE
from .check import report_on
from .match import check_match
from .split import (
    PER_LAYER,
    PROVENANCE,
    Blocks,
    block_of,
    blocks_of,
    head_counts,
    in_head,
    integer,
    plain_metadata,
    trunk_metadata,
    trunk_tensors,
)

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
    base: str | os.PathLike[str],
    head: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str | None = None,
    output_type: str | None = None,
    replace_head: bool = False,
    verify: int = 0,
    n_threads: int | None = None,
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
        verify: before the file gets its name, load base and result and compare as many greedy
            tokens; 0: don't.
        n_threads: threads to verify with; default: the host's.
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
    out = Path(out)
    trunk = read_header(base)
    blocks = blocks_of(trunk)
    _check_base(trunk, blocks, replace_head=replace_head)
    source, inputs = open_head(Path(head), trunk)
    check_destination(out, [*trunk.parts, *inputs], force=force)
    metadata = trunk_metadata(trunk, blocks)
    notes = check_match(trunk, blocks, metadata, source)

    tensors = [_place(tensor, blocks.n_trunk) for tensor in source.tensors]
    own: list[TensorSource] = []
    if output is not None:
        own, tensors = _own_outputs(trunk, blocks.n_trunk, source.n_heads, tensors)
        notes += _fallbacks(own, output)
        own = [requantize(tensor, output) for tensor in own]
    if wanted is not None:
        notes += _fallbacks(tensors, wanted)
        tensors = [requantize(tensor, wanted) for tensor in tensors]
    tensors += own
    matrices = [t.type for t in tensors if is_matrix(t)] or [t.type for t in tensors]
    types = {type_name(kind): n for kind, n in Counter(matrices).most_common()}
    metadata = _joined_metadata(metadata, plain_metadata(trunk), blocks, source)
    metadata |= _provenance(trunk, source, types)
    every = trunk_tensors(trunk, blocks) + tensors
    _check_result(trunk, blocks, source, every)

    def accept(path: Path) -> None:
        from ..measure.compare_files import compare_greedy

        compare_greedy(trunk.path, path, n_tokens=verify, n_threads=n_threads)

    size = write_gguf(
        out,
        metadata,
        every,
        checked=frozenset(t.name for t in tensors),
        padding=PROVENANCE + "padding",
        progress=progress,
        accept=accept if verify else None,
    )
    return GraftReport(out, size, source.n_heads, types, tuple(notes))


# --- the head -------------------------------------------------------------------------------------


def open_head(path: Path, base: Header) -> tuple[HeadSource, tuple[Path, ...]]:
    """Return the head in a GGUF or a checkpoint's folder, and the files that it is read from.

    Raises:
        ModelFileError: it is unreadable or damaged, or holds no head.
    """
    if path.is_dir():
        from .hf.reader import read_head

        return read_head(path, base), tuple(path.iterdir())
    if path.suffix in (".safetensors", ".json") and path.is_file():
        raise ModelFileError(
            f"{path} is a part of a checkpoint. Name its folder instead: {path.absolute().parent}"
        )
    header = read_header(path)
    return head_of(header, base), header.parts


def head_of(header: Header, base: Header) -> HeadSource:
    """Return the head in a GGUF.

    Raises:
        ModelFileError: it holds none, or one that has no place in a file with its trunk.
    """
    blocks = blocks_of(header)
    known = ARCHITECTURES.get(blocks.architecture)
    if known is not None and known.shares_kv:
        raise ModelFileError(
            f"{header.path} is a {blocks.architecture} head, which stays in a file of its own. "
            "Load the trunk with spec_draft_model set to it."
        )
    if not blocks.n_heads:
        if blocks.declared:
            raise ModelFileError(
                f"{header.path} declares {blocks.declared} NextN blocks and has dropped their "
                "tensors. Take the head from another file of this model."
            )
        raise ModelFileError(
            f"{header.path} has no NextN head. Name a GGUF that has one, or a checkpoint's folder."
        )
    if blocks.declared and blocks.declared != blocks.n_heads:
        raise ModelFileError(
            f"{header.path} declares {blocks.declared} NextN blocks and has {blocks.n_heads}. "
            "Take the head from another file of this model."
        )
    _refuse_own_top(header, base)
    return HeadSource(
        architecture=blocks.architecture,
        n_heads=blocks.n_heads,
        n_embd=integer(header, f"{blocks.architecture}.embedding_length"),
        tensors=tuple(
            stored(header, tensor, _renumber(tensor.name, -blocks.n_trunk))
            for tensor in header.tensors.values()
            if in_head(tensor.name, blocks)
        ),
        origin=header.path.name,
        metadata=plain_metadata(header),
    )


def _refuse_own_top(header: Header, base: Header) -> None:
    """Refuse a head that needs other top-level tensors than the base has."""
    for name in _OWN_TOP:
        ours, theirs = base.tensors.get(name), header.tensors.get(name)
        if ours is None or theirs is None:
            continue
        if b"".join(stored(base, ours).chunks()) != b"".join(stored(header, theirs).chunks()):
            raise ModelFileError(
                f"{header.path} has a {name} of its own, and a joined file has one place for it. "
                "Keep the files apart, and load the trunk with spec_draft_model set to the head."
            )


def _renumber(name: str, by: int) -> str:
    block, rest = block_of(name)
    return name if block < 0 else f"blk.{block + by}.{rest}"


def _place(tensor: TensorSource, n_trunk: int) -> TensorSource:
    return replace(tensor, name=_renumber(tensor.name, n_trunk))


def _own_outputs(
    base: Header, n_trunk: int, n_heads: int, tensors: list[TensorSource]
) -> tuple[list[TensorSource], list[TensorSource]]:
    """Return an output matrix for every head, its own or a copy of the base's; and the rest.

    Raises:
        ModelFileError: the heads of this architecture read no other than the base's, or the base
            has none to copy.
    """
    architecture = str(base.metadata["general.architecture"])
    if not ARCHITECTURES[architecture].own_output:
        raise ModelFileError(
            f"A {architecture} head has no output matrix of its own in llama.cpp. Leave out "
            "--output-type."
        )
    names = [f"blk.{n_trunk + i}.{OWN_OUTPUT}" for i in range(n_heads)]
    there = {tensor.name: tensor for tensor in tensors if tensor.name in names}
    shared = output_matrix(base)
    if shared is None:
        raise ModelFileError(f"{base.path} has no output matrix to copy. Convert the model again.")
    if "output.scale" in base.tensors:
        raise ModelFileError(
            f"{base.path} has an output matrix with a scale apart, which cannot be stored anew. "
            "Leave out --output-type."
        )
    own = [there.get(name) or stored(base, shared, name) for name in names]
    return own, [tensor for tensor in tensors if tensor.name not in there]


def _fallbacks(tensors: list[TensorSource], wanted: int) -> list[str]:
    kinds = Counter(type_for(t, wanted) for t in tensors if is_matrix(t))
    return [
        f"{n} of the head's matrices are stored as {type_name(kind)}: their rows are no multiple "
        f"of a block of {type_name(wanted)}."
        for kind, n in kinds.items()
        if kind != wanted
    ]


# --- what can be joined ---------------------------------------------------------------------------


def _check_base(base: Header, blocks: Blocks, *, replace_head: bool) -> None:
    if not blocks.architecture:
        raise ModelFileError(f"{base.path} does not say its architecture. Convert it again.")
    if blocks.architecture not in ARCHITECTURES:
        why = NOT_EXECUTABLE.get(
            blocks.architecture, f"no NextN graph is known for {blocks.architecture}"
        )
        raise ModelFileError(f"{base.path} would not run with a head: {why}. Use it as it is.")
    if not blocks.n_trunk or not any(block_of(name)[0] == 0 for name in base.tensors):
        raise ModelFileError(
            f"{base.path} holds no trunk. Name the model first and the head second."
        )
    if blocks.n_heads and not replace_head:
        raise ModelFileError(
            f"{base.path} has a NextN head already. Use it as it is, or pass --replace to put "
            "another in its place."
        )


def _check_result(
    base: Header, blocks: Blocks, head: HeadSource, tensors: list[TensorSource]
) -> None:
    """Raise unless the joined file would be one that runs."""
    prefix = f"{blocks.architecture}."
    counts = {
        prefix + "block_count": blocks.n_trunk + head.n_heads,
        prefix + "nextn_predict_layers": head.n_heads,
    }
    infos = {t.name: TensorInfo(t.name, t.shape, t.type, 0) for t in tensors}
    # No entries: those of the base say nothing about the arrays of the joined file.
    joined = replace(base, metadata=base.metadata | counts, tensors=infos, entries={})
    report = report_on(joined)
    if not report.executable:
        raise ModelFileError(
            f"{head.origin} and {base.path} give no model that runs: {report.reason} "
            "Take another head."
        )


# --- the joined metadata --------------------------------------------------------------------------


def _joined_metadata(
    metadata: Mapping[str, bytes], uncut: Mapping[str, bytes], blocks: Blocks, head: HeadSource
) -> dict[str, bytes]:
    """Return the trunk's metadata with the head counted and its per-layer values appended.

    ``uncut`` is what the base says, which may have declared such a head: then it stands in for a
    head that has no metadata.
    """
    prefix = f"{blocks.architecture}."
    counts = head_counts(prefix, blocks.n_trunk, head.n_heads)
    joined: dict[str, bytes] = {}
    for key, raw in metadata.items():
        if key == prefix + "block_count":
            joined |= counts  # the two stand together, where the first stood
        elif key.removeprefix(prefix) in PER_LAYER:
            joined[key] = _extended(key, raw, uncut[key], blocks.n_trunk, head)
        else:
            joined[key] = raw
    return joined


def _extended(key: str, raw: bytes, uncut: bytes, n_trunk: int, head: HeadSource) -> bytes:
    """Return a per-layer entry with the head's values appended; one value stays one if it can."""
    ours = decode(key, raw)
    if isinstance(ours, list) and len(ours) != n_trunk:
        return raw  # not one per block, or one per block of the trunk only
    theirs: Any = None
    if key in head.metadata:
        theirs = decode(key, head.metadata[key])
        if isinstance(theirs, list):
            n_blocks = _count(head, n_trunk)
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
        if len(decode(key, uncut)) == n_trunk + head.n_heads:
            return uncut
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


def _count(head: HeadSource, n_trunk: int) -> int:
    """Blocks of the model that the head comes from; without its word, as many as here."""
    key = f"{head.architecture}.block_count"
    return int(decode(key, head.metadata[key])) if key in head.metadata else n_trunk + head.n_heads


def _provenance(base: Header, head: HeadSource, types: Mapping[str, int]) -> dict[str, bytes]:
    name = base.metadata.get("general.name")
    values = {
        "base": base.path.name,
        "base_name": name if isinstance(name, str) else "",
        "head": head.origin,
        "head_type": ", ".join(types),
        "version": __version__,
    }
    return {PROVENANCE + key: entry(PROVENANCE + key, value) for key, value in values.items()}
