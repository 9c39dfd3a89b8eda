"""A GGUF taken apart, so that every field of it can be given a lie.

A file is a list of pieces: bytes, or a number of zero bytes, which are left as a hole on the disk.
So a string of gigabytes costs nothing to write.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Pieces = list[bytes | int]

STRING, ARRAY = 8, 9
PACKED = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF value type: how packed


def u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def string(text: bytes, length: int | None = None) -> bytes:
    return u64(len(text) if length is None else length) + text


@dataclass
class Key:
    """A metadata entry: its name, its GGUF value type, and the bytes that follow."""

    name: bytes
    kind: int
    payload: Pieces


@dataclass
class Tensor:
    """A tensor's entry; ``n_dims`` and ``offset`` follow from the others unless they are given."""

    name: bytes
    dims: list[int]
    kind: int = 0
    n_dims: int | None = None
    offset: int | None = None
    size: int = 128  # bytes of data that are really there


@dataclass
class Gguf:
    """A whole file; the counts follow from the lists unless they are given."""

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    tail: Pieces = field(default_factory=list)

    def pieces(self) -> Pieces:
        out: Pieces = [
            self.magic,
            u32(self.version),
            u64(len(self.tensors) if self.n_tensors is None else self.n_tensors),
            u64(len(self.keys) if self.n_keys is None else self.n_keys),
        ]
        for key in self.keys:
            out += [string(key.name), u32(key.kind), *key.payload]
        end = 0
        for t in self.tensors:
            offset = -(-end // 32) * 32
            out += [string(t.name), u32(len(t.dims) if t.n_dims is None else t.n_dims)]
            out += [u64(n) for n in t.dims]
            out += [u32(t.kind), u64(offset if t.offset is None else t.offset)]
            end = offset + t.size
        if self.tensors:
            header = size_of(out)
            out += [-header % 32, end]
        return out + self.tail


def scalar(name: str, kind: int, value: object) -> Key:
    return Key(name.encode(), kind, [struct.pack("<" + PACKED[kind], value)])


def number(name: str, value: int) -> Key:
    """A uint32, as most numbers in a GGUF are."""
    return Key(name.encode(), 4, [u32(value)])


def text(name: str, value: str | bytes) -> Key:
    return Key(
        name.encode(), STRING, [string(value if isinstance(value, bytes) else value.encode())]
    )


def strings(name: str, values: Sequence[bytes]) -> Key:
    body = b"".join(string(value) for value in values)
    return Key(name.encode(), ARRAY, [u32(STRING), u64(len(values)), body])


def numbers(name: str, kind: int, values: Sequence[float]) -> Key:
    body = struct.pack(f"<{len(values)}{PACKED[kind]}", *values)
    return Key(name.encode(), ARRAY, [u32(kind), u64(len(values)), body])


def size_of(pieces: Pieces) -> int:
    return sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)


def write(path: Path, pieces: Pieces) -> Path:
    """Write the pieces; the zeros between them take no room on the disk."""
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.seek(piece, 1)
            else:
                file.write(piece)
        file.truncate(size_of(pieces))
    return path


BLOCK = ("attn_norm.weight", "attn_q.weight", "ffn_norm.weight", "ffn_down.weight")
HEAD = ("nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight")


def model(arch: str = "qwen35", n_trunk: int = 2, n_heads: int = 1) -> Gguf:
    """The header of a small sound model, with zeros for data."""
    n_layers = n_trunk + n_heads
    keys = [
        text("general.architecture", arch),
        text("general.name", "sound"),
        number(f"{arch}.block_count", n_layers),
        number(f"{arch}.embedding_length", 8),
        number(f"{arch}.context_length", 64),
        number(f"{arch}.attention.head_count", 2),
        number(f"{arch}.attention.head_count_kv", 2),
        number(f"{arch}.feed_forward_length", 8),
        scalar(f"{arch}.attention.layer_norm_rms_epsilon", 6, 1e-6),
        text("tokenizer.ggml.model", "llama"),
        strings("tokenizer.ggml.tokens", [b"<unk>", b"<s>", b"</s>", b"a", "ß".encode()]),
        numbers("tokenizer.ggml.scores", 6, [0.0, -1.0, -2.0, -3.0, -4.0]),
        numbers("tokenizer.ggml.token_type", 5, [2, 3, 3, 1, 1]),
        strings("tokenizer.ggml.merges", [b"a b", b"c d"]),
    ]
    if n_heads:
        keys.append(number(f"{arch}.nextn_predict_layers", n_heads))
    names = [f"blk.{il}.{name}" for il in range(n_trunk) for name in BLOCK]
    names += [f"blk.{il}.{name}" for il in range(n_trunk, n_layers) for name in (*HEAD, *BLOCK)]
    return Gguf(keys, [Tensor(name.encode(), [8, 4]) for name in names])


def split(whole: Gguf, n_parts: int) -> list[Gguf]:
    """The same model in parts; the keys stand in the first."""
    parts = []
    for part in range(n_parts):
        keys = [
            scalar("split.no", 2, part),
            scalar("split.count", 2, n_parts),
            scalar("split.tensors.count", 5, len(whole.tensors)),
        ]
        keys = [*whole.keys, *keys] if part == 0 else keys
        parts.append(Gguf(keys, whole.tensors[part::n_parts]))
    return parts


def part_name(prefix: str, part: int, n_parts: int) -> str:
    return f"{prefix}-{part + 1:05}-of-{n_parts:05}.gguf"


def parse(content: bytes) -> Gguf:
    """Take a sound file apart. Its data are one piece of the tail, in their places."""
    at = 4

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        return content[at - n : at]

    def number_of(n: int) -> int:
        return int.from_bytes(take(n), "little")

    def payload(kind: int) -> bytes:
        if kind == STRING:
            length = number_of(8)
            return string(take(length))
        if kind == ARRAY:
            element, count = number_of(4), number_of(8)
            return u32(element) + u64(count) + b"".join(payload(element) for _ in range(count))
        return take(struct.calcsize("<" + PACKED[kind]))

    version, n_tensors, n_keys = number_of(4), number_of(8), number_of(8)
    keys = []
    for _ in range(n_keys):
        name = take(number_of(8))
        kind = number_of(4)
        keys.append(Key(name, kind, [payload(kind)]))
    tensors = []
    for _ in range(n_tensors):
        name = take(number_of(8))
        dims = [number_of(8) for _ in range(number_of(4))]
        tensors.append(Tensor(name, dims, number_of(4), offset=number_of(8), size=0))
    data = content[at + -at % 32 :]
    return Gguf(keys, tensors, version=version, tail=[data])
