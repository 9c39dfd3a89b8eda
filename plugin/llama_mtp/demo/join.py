"""Join SmolLM2 and a trained NextN head into one GGUF that the host can run with MTP.

SmolLM2 ships as a ``llama`` model, an architecture without an MTP graph. The host's ``mimo2``
architecture computes the same function and has one, so the base is rewritten as ``mimo2``:

* the rows of ``attn_q`` and ``attn_k`` go from interleaved to split-half rotary order,
* the tied embedding is written a second time as ``output.weight``,
* every feed-forward network stays dense, and
* only the NextN layer is marked as sliding-window (``mimo2`` wants one), with the whole training
  context as its window, so that nothing is ever masked.

The head file holds the tensors of the NextN block under the names they get in the joined file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFileError
from ..gguf.header import TOKENS
from ..gguf.metadata import entry, metadata_of
from ..gguf.model import Gguf, StrPath
from ..gguf.quantize import requantize, type_number
from ..gguf.write import Chunk, Progress, TensorSource, stored, write_gguf

TYPES: dict[str, int | None] = {
    "KEEP": None,
    **{"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2},
}
"""Types that the joined matrices can be stored in, and their ``general.file_type``."""

# The head takes on only types that lose nothing: as Q4_0 it would draft much worse.
_WIDE = ("F32", "F16", "BF16")

_HEAD_TENSORS = (
    *("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"),
    *("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)


def join_smollm2(
    base_gguf: StrPath,
    head_gguf: StrPath,
    out: StrPath,
    *,
    type: str = "Q4_0",
    progress: Progress | None = None,
) -> Path:
    """Write ``out``: the base model as ``mimo2`` with the head as its one NextN block.

    ``base_gguf`` is a ``llama``-architecture GGUF of SmolLM2, ``head_gguf`` a file written by
    ``examples/train_head/export.py``. ``type`` is the storage type of the matrices (one of
    :data:`TYPES`); norms stay F32, the embedding table, which is only looked up, keeps its own
    type, and so does the head unless ``type`` is a float type. ``progress(done, total)`` is called
    with bytes written so far. ``out`` appears only when it is complete.

    Raises :class:`~llama_mtp.errors.ModelFileError` when a file cannot be read, is not what it
    should be, or when the head was trained for another model; :class:`ValueError` for an unknown
    ``type``; :class:`~llama_mtp.errors.FileWriteError` when ``out`` cannot be written.
    """
    name = type.upper()
    if name not in TYPES:
        raise ValueError(f"unknown tensor type {type!r}; use one of {', '.join(TYPES)}.")
    base, head, out = _open(base_gguf, "llama"), _open(head_gguf, "mimo2"), Path(out)
    _check_match(base, head)
    wanted = None if TYPES[name] is None else type_number(name)
    tensors = [
        *_base_tensors(base, wanted),
        *_stored_in(
            [stored(head, tensor) for tensor in head.tensors.values()],
            wanted if name in _WIDE else None,
        ),
    ]
    write_gguf(out, _metadata(base, head, TYPES[name]), tensors, progress=progress)
    return out


def tokens_sha256(tokens: Sequence[str]) -> str:
    """Return the SHA-256 of a vocabulary, by which a head knows its base model."""
    return hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()


def _open(path: StrPath, architecture: str) -> Gguf:
    model = Gguf.open(path)
    if model.architecture != architecture:
        raise ModelFileError(
            f"{path} has the architecture {model.architecture!r} where {architecture!r} is needed; "
            "join takes the base model first and the head second."
        )
    return model


def _number(model: Gguf, name: str) -> Any:
    value = model.metadata.get(f"{model.architecture}.{name}")
    if not isinstance(value, int | float):
        raise ModelFileError(
            f"{model.path} lacks the number {model.architecture}.{name}; use a complete file."
        )
    return value


def _check_match(base: Gguf, head: Gguf) -> None:
    """Raise unless the head belongs to this base: same vocabulary, width, depth and tensors."""
    n_layer = _number(base, "block_count")
    mismatch = ""
    if head.text("llama_mtp.base.tokens_sha256") != tokens_sha256(base.array(TOKENS)):
        mismatch = "vocabulary"
    elif _number(head, "embedding_length") != _number(base, "embedding_length"):
        mismatch = "embedding length"
    elif _number(head, "block_count") != n_layer + 1:
        mismatch = "number of layers"
    if mismatch:
        raise ModelFileError(
            f"the head {head.path} was trained for {head.text('llama_mtp.base.name')}, whose "
            f"{mismatch} differs from that of {base.path}; join it with its own base model."
        )
    missing = {f"blk.{n_layer}.{t}.weight" for t in _HEAD_TENSORS} - head.tensors.keys()
    if missing:
        raise ModelFileError(
            f"the head {head.path} lacks {', '.join(sorted(missing))}; export it again."
        )


def _base_tensors(base: Gguf, wanted: int | None) -> Iterator[TensorSource]:
    heads = {
        "attn_q": _number(base, "attention.head_count"),
        "attn_k": _number(base, "attention.head_count_kv"),
    }
    for tensor in base.tensors.values():
        source = stored(base, tensor)
        if tensor.name == "token_embd.weight":
            # Looked up, never multiplied: its own type costs nothing and loses nothing.
            yield source
            if "output.weight" not in base.tensors:
                yield from _stored_in([replace(source, name="output.weight")], wanted)
        elif not tensor.name.startswith("rope_freqs"):
            part = tensor.name.split(".")[-2]
            if part in heads:
                source = _split_halves(source, heads[part])
            yield from _stored_in([source], wanted)


def _stored_in(tensors: Sequence[TensorSource], wanted: int | None) -> list[TensorSource]:
    return [t if wanted is None else requantize(t, wanted) for t in tensors]


def _split_halves(tensor: TensorSource, n_head: int) -> TensorSource:
    """Reorder the rows of each head from interleaved rotary pairs to split halves.

    Rows are moved whole, so this works on quantised rows as well.
    """

    def chunks() -> Iterator[Chunk]:
        rows = np.frombuffer(b"".join(tensor.chunks()), np.uint8)
        pairs = rows.reshape(n_head, tensor.shape[1] // n_head // 2, 2, -1)
        yield pairs.swapaxes(1, 2).tobytes()

    return replace(tensor, chunks=chunks, path=None, offset=0)


def _metadata(base: Gguf, head: Gguf, file_type: int | None) -> dict[str, bytes]:
    """Copy tokenizer and description, and state the base's shape in the words of ``mimo2``."""
    described = metadata_of(base)
    copied = {k: raw for k, raw in described.items() if k.startswith(("general.", "tokenizer."))}
    copied.pop("general.file_type", None)
    copied["general.architecture"] = entry("general.architecture", "mimo2")
    if file_type is not None:
        copied["general.file_type"] = entry("general.file_type", file_type)
    n_embd, n_head = (_number(base, name) for name in ("embedding_length", "attention.head_count"))
    n_layer, n_ctx = _number(base, "block_count") + 1, _number(base, "context_length")
    values = {
        "block_count": n_layer,
        "nextn_predict_layers": 1,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "feed_forward_length": _number(base, "feed_forward_length"),
        "expert_feed_forward_length": 0,
        "attention.head_count": n_head,
        "attention.head_count_kv": _number(base, "attention.head_count_kv"),
        "attention.key_length": n_embd // n_head,
        "attention.value_length": n_embd // n_head,
        "attention.layer_norm_rms_epsilon": _number(base, "attention.layer_norm_rms_epsilon"),
        "rope.dimension_count": _number(base, "rope.dimension_count"),
        "rope.freq_base": _number(base, "rope.freq_base"),
        "rope.freq_base_swa": _number(base, "rope.freq_base"),
        "vocab_size": _number(base, "vocab_size"),
        "attention.sliding_window": n_ctx,
        "attention.sliding_window_pattern": [False] * (n_layer - 1) + [True],
    }
    provenance = {k: raw for k, raw in metadata_of(head).items() if k.startswith("llama_mtp.")}
    shape = {f"mimo2.{name}": entry(f"mimo2.{name}", value) for name, value in values.items()}
    return copied | shape | provenance
