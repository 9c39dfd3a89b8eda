"""GGUF files for tests: tiny ones, changed copies, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import entry, metadata_of
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.split import PROVENANCE

HEAD = ("nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight")

BLOCK = ("attn_norm.weight", "attn_q.weight", "ffn_norm.weight", "ffn_down.weight")

TRUNK = tuple(f"blk.{layer}.{name}" for layer in range(2) for name in BLOCK)


def with_head(*blocks: int, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    return TRUNK + tuple(f"blk.{b}.{name}" for b in blocks for name in (*HEAD, *BLOCK, *extra))


def write_header(
    path: Path,
    architecture: str = "qwen35",
    tensors: tuple[str, ...] = TRUNK,
    *,
    n_layers: int = 2,
    n_heads: int | None = None,
    split: tuple[int, int, int] | None = None,
) -> Path:
    """A GGUF of 32-float tensors. `split` is (number, parts, tensors of all parts)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(n_layers)
    writer.add_embedding_length(8)
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ß" * 90, "\x00"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    writer.add_string("general.name", "Ein Name: ß")
    writer.add_bool("general.flag", True)
    writer.add_float64("general.double", 0.25)
    if n_heads is not None:
        writer.add_uint32(f"{architecture}.nextn_predict_layers", n_heads)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for name in tensors:
        writer.add_tensor(name, np.arange(32, dtype=np.float32).reshape(4, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path: Path) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """Every tensor: shape, type, data."""
    header = read_header(path)
    return {
        name: (t.shape, t.type, b"".join(stored(header, t).chunks()))
        for name, t in header.tensors.items()
    }


def metadata(path: Path) -> dict[str, bytes]:
    """Metadata without what says how the file was joined, in the file's order."""
    raw = metadata_of(read_header(path))
    return {key: value for key, value in raw.items() if not key.startswith(PROVENANCE)}


def rewrite(
    path: Path,
    out: Path,
    *,
    change: dict[str, Any] | None = None,
    drop: Callable[[str], bool] = lambda _: False,
    keep: Callable[[str], bool] = lambda _: True,
) -> Path:
    """A copy with other metadata (new values in ``change``, keys to ``drop``), fewer tensors."""
    header = read_header(path)
    raw = {key: value for key, value in metadata_of(header).items() if not drop(key)}
    raw |= {key: entry(key, value) for key, value in (change or {}).items()}
    write_gguf(out, raw, [stored(header, t) for n, t in header.tensors.items() if keep(n)])
    return out
