"""Taking a model apart: the trunk without its NextN head, and the head in a file of its own."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ModelFileError
from ..gguf.header import TensorInfo
from ..gguf.metadata import decode, elements_type, entry, metadata_of
from ..gguf.model import Gguf, StrPath, block_of
from ..gguf.write import Progress, check_destination, check_space, stored, write_gguf
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

_PART = re.compile(r"-00001-of-[0-9]{5}$")


def plain_metadata(model: Gguf) -> dict[str, bytes]:
    """Return a file's metadata without what says how it was joined or is split into parts."""
    return {
        key: raw
        for key, raw in metadata_of(model).items()
        if not key.startswith((PROVENANCE, "split."))
    }


def trunk_metadata(model: Gguf) -> dict[str, bytes]:
    """Return the metadata that the trunk has without a head, key to entry, in the file's order."""
    metadata = plain_metadata(model)
    prefix, n_trunk = f"{model.architecture}.", model.heads.start
    n_blocks = n_trunk + max(len(model.declared), len(model.heads))
    metadata.pop(prefix + "nextn_predict_layers", None)
    metadata[prefix + "block_count"] = entry(prefix + "block_count", n_trunk)
    for key in metadata.keys() & {prefix + name for name in PER_LAYER}:
        values = decode(key, metadata[key])
        if isinstance(values, list) and len(values) == n_blocks:
            metadata[key] = entry(key, values[:n_trunk], elements_type(key, metadata[key]))
    return metadata


def head_metadata(model: Gguf) -> dict[str, bytes]:
    """Return the metadata of a head's own file, key to entry: that of the whole model."""
    return plain_metadata(model) | head_counts(model, len(model.heads))


def head_counts(model: Gguf, n_heads: int) -> dict[str, bytes]:
    """Return the two entries that declare heads after a model's trunk."""
    counts = {"block_count": model.heads.start + n_heads, "nextn_predict_layers": n_heads}
    keys = {f"{model.architecture}.{name}": n for name, n in counts.items()}
    return {key: entry(key, n) for key, n in keys.items()}


def head_file_tensors(model: Gguf) -> list[TensorInfo]:
    """Return the tensors of a head's own file: its blocks and what it shares with the trunk."""
    trunk = range(model.heads.start)
    return [t for t in model.tensors.values() if block_of(t.name)[0] not in trunk]


def stem_of(path: Path) -> str:
    """Return the name of a model's file without ``.gguf`` and without the number of its part."""
    return _PART.sub("", path.name.removesuffix(".gguf"))


def split(
    file: Gguf | StrPath,
    folder: StrPath | None = None,
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
    model = _open(file)
    name = stem_of(model.path)
    folder = model.path.parent if folder is None else Path(folder)
    trunk, head = folder / f"{name}-trunk.gguf", folder / f"mtp-{name}.gguf"
    for out in (trunk, head):
        check_destination(out, model.parts, force=force)

    own = [stored(model, t) for t in head_file_tensors(model)]
    rest = [stored(model, t) for t in model.trunk_tensors]
    sizes = [sum(t.n_bytes for t in tensors) for tensors in (own, rest)]
    check_space(folder, sum(sizes))  # for both, before the first is written

    def part_of(before: int) -> Progress:
        def report(done: int, _: int) -> None:
            if progress is not None:
                progress(min(before + done, sum(sizes)), sum(sizes))

        return report

    def write_trunk(_: Path) -> None:
        write_gguf(trunk, _alone_metadata(model), rest, progress=part_of(sizes[0]))

    # The head gets its name once the trunk has been written: a failure leaves what was there.
    write_gguf(
        head,
        head_metadata(model),
        own,
        checked=[t.name for t in model.head_tensors],
        progress=part_of(0),
        accept=write_trunk,
    )
    return trunk, head


def strip(
    file: Gguf | StrPath,
    out: StrPath | None = None,
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
    model = _open(file)
    default = model.path.with_name(f"{stem_of(model.path)}-trunk.gguf")
    out = default if out is None else Path(out)
    check_destination(out, model.parts, force=force)
    tensors = [stored(model, t) for t in model.trunk_tensors]
    write_gguf(out, _alone_metadata(model), tensors, progress=progress)
    return out


def _alone_metadata(model: Gguf) -> dict[str, bytes]:
    """Return the metadata of a trunk's own file, key to entry.

    That is `trunk_metadata`, but where only the head slides: the architectures with sliding windows
    abort on a model in which no block does. Such a trunk goes on declaring the head that it lacks,
    which llama.cpp allows them.
    """
    key = f"{model.architecture}.attention.sliding_window_pattern"
    before = model.array(key)
    if len(before) == model.heads.stop and any(before) and not any(before[: model.heads.start]):
        return head_metadata(model)
    return trunk_metadata(model)


def _open(file: Gguf | StrPath) -> Gguf:
    model = Gguf.open(file)
    known = ARCHITECTURES.get(model.architecture)
    if known is not None and known.shares_kv:
        raise ModelFileError(
            f"{model.path} is a head in a file of its own already. Load its target with "
            "spec_draft_model set to it."
        )
    if not model.heads:
        raise ModelFileError(
            f"{model.path} has no NextN head: there is nothing to take off. Use it as it is."
        )
    if not model.has_trunk:
        raise ModelFileError(
            f"{model.path} holds a NextN head without its trunk. Name the file of the whole model."
        )
    return model
