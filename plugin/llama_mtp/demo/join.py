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
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGUFValueType
from gguf.quants import dequantize, quantize

from ..errors import ModelFileError

__all__ = ["TYPES", "join_smollm2", "tokens_sha256"]

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

#: Tensor types that the joined matrices can be stored in; ``KEEP`` leaves them as they are.
TYPES: dict[str, tuple[GGMLQuantizationType | None, LlamaFileType | None]] = {
    "KEEP": (None, None),
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

# The head takes on only types that lose nothing: as Q4_0 it would draft much worse.
_WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

_HEAD_TENSORS = (
    "nextn.eh_proj",
    "nextn.enorm",
    "nextn.hnorm",
    "nextn.shared_head_norm",
    "attn_norm",
    "attn_qkv",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


class _Tensor:
    """One tensor of the joined file: where it comes from and how it will be stored."""

    def __init__(self, name: str, source: Any, target: GGMLQuantizationType, n_head: int = 0):
        self.name = name
        self.shape = tuple(int(n) for n in reversed(source.shape))  # numpy order, rows first
        self.target = target
        self._source = source
        self._n_head = n_head  # heads whose rotary order changes; 0 for none
        block, size = GGML_QUANT_SIZES[target]
        if self.shape[-1] % block:
            raise ModelFileError(
                f"tensor {name} has rows of {self.shape[-1]} values, which {target.name} cannot "
                f"store in blocks of {block}; join with another type."
            )
        self.nbytes = int(np.prod(self.shape)) // block * size

    def data(self) -> Array:
        """Return the tensor as it is to be written: ``(rows, bytes)`` or a float array."""
        source: Array = self._source.data
        if self._n_head:
            source = _split_halves(source, self._n_head)
        kind = self._source.tensor_type
        if kind == self.target:
            return np.ascontiguousarray(source)
        return quantize(np.ascontiguousarray(dequantize(source, kind)), self.target)


def join_smollm2(
    base_gguf: str | os.PathLike[str],
    head_gguf: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str = "Q4_0",
    progress: Progress | None = None,
) -> Path:
    """Write ``out``: the base model as ``mimo2`` with the head as its one NextN block.

    ``base_gguf`` is a ``llama``-architecture GGUF of SmolLM2, ``head_gguf`` a file written by
    ``examples/train_head/export.py``. ``type`` is the storage type of the matrices (one of
    :data:`TYPES`); norms stay F32, the embedding table, which is only looked up, keeps its own
    type, and so does the head unless ``type`` is a float type. ``progress(done, total)`` is called
    with bytes written so far. One tensor is in memory at a time, and ``out`` appears only when it
    is complete.

    Raises :class:`~llama_mtp.errors.ModelFileError` when a file cannot be read, is not what it
    should be, or when the head was trained for another model; :class:`ValueError` for an unknown
    ``type``; :class:`OSError` when ``out`` cannot be written.
    """
    if type.upper() not in TYPES:
        raise ValueError(f"unknown tensor type {type!r}; use one of {', '.join(TYPES)}.")
    target, file_type = TYPES[type.upper()]
    base, head = _open(base_gguf, "llama"), _open(head_gguf, "mimo2")
    _check_match(base, head, base_gguf, head_gguf)
    tensors = list(_plan(base, head, target))
    total = sum(t.nbytes for t in tensors)

    out = Path(out)
    handle, temporary = tempfile.mkstemp(prefix=out.name, suffix=".part", dir=out.parent)
    os.close(handle)
    try:
        writer = GGUFWriter(temporary, "mimo2")
        _write_metadata(writer, base, head, file_type)
        for t in tensors:
            stored = np.dtype(np.float32)  # overridden by raw_dtype, except for its shape rules
            writer.add_tensor_info(t.name, t.shape, stored, t.nbytes, raw_dtype=t.target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for t in tensors:
            writer.write_tensor_data(t.data())
            done += t.nbytes
            if progress is not None:
                progress(done, total)
        writer.close()
        os.chmod(temporary, 0o644)  # mkstemp made it private; a model file need not be
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return out


def tokens_sha256(tokens: Sequence[str]) -> str:
    """Return the SHA-256 of a vocabulary, by which a head knows its base model."""
    return hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()


def _open(path: str | os.PathLike[str], architecture: str) -> GGUFReader:
    if not Path(path).is_file():
        raise ModelFileError(f"{path} does not exist or is not a file; give the path of a GGUF.")
    try:
        reader = GGUFReader(path)
        found = _value(reader, "general.architecture")
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelFileError(
            f"{path} cannot be read as GGUF ({error}); it may be truncated: fetch it again."
        ) from error
    if found != architecture:
        raise ModelFileError(
            f"{path} has the architecture {found!r} where {architecture!r} is needed; "
            "join takes the base model first and the head second."
        )
    return reader


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelFileError(f"the GGUF file lacks the metadata key {key}; use a complete file.")
    return field.contents()


def _check_match(
    base: GGUFReader,
    head: GGUFReader,
    base_path: str | os.PathLike[str],
    head_path: str | os.PathLike[str],
) -> None:
    """Raise unless the head belongs to this base: same vocabulary, width, depth and tensors."""
    mismatch = ""
    n_layer = int(_value(base, "llama.block_count"))
    if _value(head, "llama_mtp.base.tokens_sha256") != tokens_sha256(
        _value(base, "tokenizer.ggml.tokens")
    ):
        mismatch = "vocabulary"
    elif _value(head, "mimo2.embedding_length") != _value(base, "llama.embedding_length"):
        mismatch = "embedding length"
    elif _value(head, "mimo2.block_count") != n_layer + 1:
        mismatch = "number of layers"
    if mismatch:
        name = _value(head, "llama_mtp.base.name")
        raise ModelFileError(
            f"the head {head_path} was trained for {name}, whose {mismatch} differs from that of "
            f"{base_path}; join it with its own base model."
        )
    missing = {f"blk.{n_layer}.{t}.weight" for t in _HEAD_TENSORS} - {t.name for t in head.tensors}
    if missing:
        raise ModelFileError(
            f"the head {head_path} lacks {', '.join(sorted(missing))}; export it again."
        )


def _split_halves(rows: Array, n_head: int) -> Array:
    """Reorder the rows of each head from interleaved rotary pairs to split halves.

    Rows are moved whole, so this works on quantised rows as well.
    """
    pairs = rows.reshape(n_head, rows.shape[0] // n_head // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _plan(
    base: GGUFReader, head: GGUFReader, target: GGMLQuantizationType | None
) -> Iterator[_Tensor]:
    n_head = int(_value(base, "llama.attention.head_count"))
    heads = {"attn_q": n_head, "attn_k": int(_value(base, "llama.attention.head_count_kv"))}
    names = {t.name for t in base.tensors}
    for source in base.tensors:
        matrix = len(source.shape) > 1
        kind = target if matrix and target is not None else source.tensor_type
        if source.name == "token_embd.weight":
            # Looked up, never multiplied: its own type costs nothing and loses nothing.
            yield _Tensor(source.name, source, source.tensor_type)
            if "output.weight" not in names:
                yield _Tensor("output.weight", source, kind)
        elif source.name.startswith("rope_freqs"):
            continue
        else:
            part = source.name.split(".")[-2]
            yield _Tensor(source.name, source, kind, heads.get(part, 0))
    for source in head.tensors:
        matrix = len(source.shape) > 1
        kind = target if matrix and target in _WIDE else source.tensor_type
        yield _Tensor(source.name, source, kind)


def _write_metadata(
    writer: GGUFWriter, base: GGUFReader, head: GGUFReader, file_type: LlamaFileType | None
) -> None:
    """Copy tokenizer and description, and state the base's shape in the words of ``mimo2``."""
    for key, field in base.fields.items():
        if not key.startswith(("general.", "tokenizer.")) or key in (
            "general.architecture",
            "general.file_type",
        ):
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), kind, sub_type=field.types[-1])
        else:
            writer.add_key_value(key, field.contents(), kind)
    if file_type is not None:
        writer.add_file_type(file_type)
    n_layer = int(_value(base, "llama.block_count")) + 1
    n_ctx = int(_value(base, "llama.context_length"))
    n_embd = int(_value(base, "llama.embedding_length"))
    n_head = int(_value(base, "llama.attention.head_count"))
    rope_base = float(_value(base, "llama.rope.freq_base"))
    writer.add_block_count(n_layer)
    writer.add_nextn_predict_layers(1)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(int(_value(base, "llama.feed_forward_length")))
    writer.add_expert_feed_forward_length(0)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(int(_value(base, "llama.attention.head_count_kv")))
    writer.add_key_length(n_embd // n_head)
    writer.add_value_length(n_embd // n_head)
    writer.add_layer_norm_rms_eps(float(_value(base, "llama.attention.layer_norm_rms_epsilon")))
    writer.add_rope_dimension_count(int(_value(base, "llama.rope.dimension_count")))
    writer.add_rope_freq_base(rope_base)
    writer.add_rope_freq_base_swa(rope_base)
    writer.add_vocab_size(int(_value(base, "llama.vocab_size")))
    writer.add_sliding_window(n_ctx)
    writer.add_sliding_window_pattern([False] * (n_layer - 1) + [True])
    for key, field in head.fields.items():
        if key.startswith("llama_mtp."):
            writer.add_key_value(key, field.contents(), field.types[0])
