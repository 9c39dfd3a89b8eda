"""Taking a model apart: the trunk without its NextN head, and the head in a file of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelFileError
from ..gguf.header import Header, TensorInfo, read_header
from ..gguf.metadata import decode, elements_type, entry, metadata_of
from ..gguf.write import Progress, TensorSource, check_destination, check_space, stored, write_gguf
from .architectures import ARCHITECTURES

PROVENANCE = "llama_mtp.graft."
"""Keys that say how a file was joined begin with this."""

# Metadata that may hold one value per block: where it is an array with as many elements as there
# are blocks, the last ones are the head's.
PER_LAYER = (
    "attention.compress_ratios",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.indexer.types",
    "attention.recurrent_layers",
    "attention.rope_pattern",
    "attention.sliding_window_pattern",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
)

_BLOCK = re.compile(r"blk\.([0-9]+)\.(.*)", re.DOTALL)
_PART = re.compile(r"-00001-of-[0-9]{5}$")


@dataclass(frozen=True)
class Blocks:
    """Which blocks of a file are what.

    Attributes:
        architecture: ``general.architecture``; empty if the file does not say.
        n_trunk: blocks before the first NextN block.
        n_heads: NextN blocks whose tensors are there.
        declared: NextN blocks that the metadata declares.
    """

    architecture: str
    n_trunk: int
    n_heads: int
    declared: int


def block_of(name: str) -> tuple[int, str]:
    """Return (block, rest) of a tensor's name; block -1 where it belongs to none."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, name)


def blocks_of(header: Header) -> Blocks:
    """Say which blocks of a file are its NextN head.

    The tensors decide; the metadata may be that of a file whose head was dropped or added.

    Raises:
        ModelFileError: tensors and metadata contradict each other.
    """
    name = header.metadata.get("general.architecture")
    architecture = name if isinstance(name, str) else ""
    count = integer(header, f"{architecture}.block_count")
    declared = integer(header, f"{architecture}.nextn_predict_layers")
    heads = sorted({b for b, rest in map(block_of, header.tensors) if rest.startswith("nextn.")})
    heads = [b for b in heads if b >= 0]
    n_trunk = heads[0] if heads else count - declared
    if (
        n_trunk < 0
        or heads != list(range(n_trunk, n_trunk + len(heads)))
        or (heads and declared and (count - declared, declared) != (n_trunk, len(heads)))
    ):
        raise ModelFileError(
            f"{header.path} declares {count} blocks with {declared} NextN blocks among them, and "
            f"its NextN tensors are in the blocks {heads}. Convert or download it again."
        )
    return Blocks(architecture, n_trunk, len(heads), declared)


def trunk_metadata(header: Header, blocks: Blocks) -> dict[str, bytes]:
    """Return the metadata that the trunk has without a head, key to entry, in the file's order."""
    metadata = plain_metadata(header)
    prefix = f"{blocks.architecture}."
    count = blocks.n_trunk + max(blocks.declared, blocks.n_heads)
    metadata.pop(prefix + "nextn_predict_layers", None)
    metadata[prefix + "block_count"] = entry(prefix + "block_count", blocks.n_trunk)
    for key in (prefix + name for name in PER_LAYER):
        raw = metadata.get(key)
        if (
            raw is not None
            and isinstance(values := decode(key, raw), list)
            and (len(values) == count)
        ):
            metadata[key] = entry(key, values[: blocks.n_trunk], elements_type(key, raw))
    return metadata


def alone_metadata(header: Header, blocks: Blocks) -> dict[str, bytes]:
    """Return the metadata of a trunk's own file, key to entry.

    That is `trunk_metadata`, but where only the head slides: the architectures with sliding windows
    abort on a model in which no block does. Such a trunk goes on declaring the head that it lacks,
    which llama.cpp allows them.
    """
    key = f"{blocks.architecture}.attention.sliding_window_pattern"
    metadata, cut = plain_metadata(header), trunk_metadata(header, blocks)
    if key in metadata:
        before, after = decode(key, metadata[key]), decode(key, cut[key])
        if isinstance(before, list) and any(before) and not any(after):
            return metadata | head_counts(f"{blocks.architecture}.", blocks.n_trunk, blocks.n_heads)
    return cut


def plain_metadata(header: Header) -> dict[str, bytes]:
    """Return a file's metadata without what says how it was joined or is split into parts."""
    return {
        key: raw
        for key, raw in metadata_of(header).items()
        if not key.startswith((PROVENANCE, "split."))
    }


def trunk_tensors(header: Header, blocks: Blocks) -> list[TensorSource]:
    """Return all tensors but the head's, in the file's order."""
    return [stored(header, t) for t in header.tensors.values() if not in_head(t.name, blocks)]


def head_tensors(header: Header, blocks: Blocks) -> list[TensorInfo]:
    """Return the tensors of a head's own file: its blocks and what it shares with the trunk."""
    tensors = header.tensors.values()
    return [t for t in tensors if in_head(t.name, blocks) or block_of(t.name)[0] < 0]


def head_metadata(header: Header, blocks: Blocks) -> dict[str, bytes]:
    """Return the metadata of a head's own file, key to entry: that of the whole model."""
    counts = head_counts(f"{blocks.architecture}.", blocks.n_trunk, blocks.n_heads)
    return plain_metadata(header) | counts


def in_head(name: str, blocks: Blocks) -> bool:
    """Whether a tensor belongs to the head."""
    return block_of(name)[0] >= blocks.n_trunk


def split(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write a model as two files, and return their paths: trunk and head.

    ``NAME-trunk.gguf`` runs as any model does. ``mtp-NAME.gguf`` has the form of llama.cpp's own
    conversion with ``--mtp``: the head, the embedding and output tensors that it shares with the
    trunk, and the metadata of the whole model.

    Args:
        file: the model; of a split one, the first part.
        folder: where to write; default: where the model is.
        force: overwrite.
        progress: called as data is written, with the bytes of both files together.

    Raises:
        ModelFileError: the file is no GGUF, is damaged, or has no head.
        FileWriteError: a file cannot be written; then neither is left.
    """
    header, blocks = _open(file)
    name = stem_of(header.path)
    folder = header.path.parent if folder is None else Path(folder)
    trunk, head = folder / f"{name}-trunk.gguf", folder / f"mtp-{name}.gguf"
    for out in (trunk, head):
        check_destination(out, header.parts, force=force)

    own = [stored(header, t) for t in head_tensors(header, blocks)]
    rest = trunk_tensors(header, blocks)
    sizes = [sum(t.n_bytes for t in tensors) for tensors in (own, rest)]
    check_space(folder, sum(sizes))  # for both, before the first is written
    checked = [t.name for t in own if in_head(t.name, blocks)]

    def write_trunk(_: Path) -> None:
        write_gguf(
            trunk,
            alone_metadata(header, blocks),
            rest,
            progress=_part_of(progress, sizes[0], sum(sizes)),
        )

    # The head gets its name once the trunk has been written: a failure leaves what was there.
    write_gguf(
        head,
        head_metadata(header, blocks),
        own,
        checked=checked,
        progress=_part_of(progress, 0, sum(sizes)),
        accept=write_trunk,
    )
    return trunk, head


def strip(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model without its NextN head, and return the path.

    Args:
        file: the model; of a split one, the first part.
        out: the file to write; default: ``NAME-trunk.gguf`` beside the model.
        force: overwrite.
        progress: called as data is written.

    Raises:
        ModelFileError: the file is no GGUF, is damaged, or has no head.
        FileWriteError: the file cannot be written.
    """
    header, blocks = _open(file)
    default = header.path.with_name(f"{stem_of(header.path)}-trunk.gguf")
    out = default if out is None else Path(out)
    check_destination(out, header.parts, force=force)
    write_gguf(
        out, alone_metadata(header, blocks), trunk_tensors(header, blocks), progress=progress
    )
    return out


def head_counts(prefix: str, n_trunk: int, n_heads: int) -> dict[str, bytes]:
    """Return the two entries that declare a head; ``prefix`` is ``{arch}.``."""
    return {
        prefix + "block_count": entry(prefix + "block_count", n_trunk + n_heads),
        prefix + "nextn_predict_layers": entry(prefix + "nextn_predict_layers", n_heads),
    }


def stem_of(path: Path) -> str:
    """Return the name of a model's file without ``.gguf`` and without the number of its part."""
    return _PART.sub("", path.name.removesuffix(".gguf"))


def _open(file: str | os.PathLike[str]) -> tuple[Header, Blocks]:
    header = read_header(file)
    blocks = blocks_of(header)
    known = ARCHITECTURES.get(blocks.architecture)
    if known is not None and known.shares_kv:
        raise ModelFileError(
            f"{header.path} is a head in a file of its own already. Load its target with "
            "spec_draft_model set to it."
        )
    if not blocks.n_heads:
        raise ModelFileError(
            f"{header.path} has no NextN head: there is nothing to take off. Use it as it is."
        )
    if not any(block_of(name)[0] == 0 for name in header.tensors) or not blocks.n_trunk:
        raise ModelFileError(
            f"{header.path} holds a NextN head without its trunk. Name the file of the whole model."
        )
    return header, blocks


def integer(header: Header, key: str) -> int:
    """Return a count in the metadata, 0 where it is not there; ModelFileError if it is none."""
    value = header.metadata.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise ModelFileError(f"{header.path} has the impossible {key} {value!r}. Convert it again.")
    return value


def _part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Report one file's bytes as a part of several files'."""
    if progress is None:
        return None
    report: Callable[[int, int], None] = progress
    return lambda done, _: report(min(before + done, total), total)
