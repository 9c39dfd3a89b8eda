"""Metadata as it lies in a GGUF file: a mapping from key to *entry*, the bytes of key, type, value.

Copied raw, what is not understood is not lost; only the few keys that change are decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from gguf.constants import GGUFValueType

from .header import Header

_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


def entry(key: str, value: Any, kind: int | None = None) -> bytes:
    """Return the entry of one metadata key as it lies in a file.

    ``value`` is a bool, int, float, str, or a sequence of one of these; ``kind`` is a
    ``gguf.GGUFValueType`` (of the elements, if a sequence). The default is BOOL, UINT32 (INT32 for
    negative numbers), FLOAT32 or STRING by the Python type.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        kind = _kind_of([value]) if kind is None else kind
        return packed_text(key) + struct.pack("<I", kind) + _pack(kind, [value])
    kind = _kind_of(value) if kind is None else kind
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    return packed_text(key) + head + _pack(kind, value)


def decode(key: str, raw: bytes) -> Any:
    """Return the value of an entry: a scalar, a str, or a list of these."""
    return _unpack(raw, len(packed_text(key)))[0]


def elements_type(key: str, raw: bytes) -> int:
    """Return the GGUF type of an entry's value; of an array's elements."""
    at = len(packed_text(key))
    kind, element = struct.unpack_from("<II", raw, at)
    return int(element if kind == GGUFValueType.ARRAY else kind)


def metadata_of(header: Header) -> dict[str, bytes]:
    """Return the metadata of a file, key to entry, in the file's order."""
    with header.path.open("rb") as file:
        metadata = {}
        for key, (start, end) in header.entries.items():
            file.seek(start)
            metadata[key] = file.read(end - start)
    return metadata


def _kind_of(values: Sequence[Any]) -> int:
    if any(isinstance(v, str) for v in values):
        return GGUFValueType.STRING
    if any(isinstance(v, float) for v in values):
        return GGUFValueType.FLOAT32
    if all(isinstance(v, bool) for v in values):
        return GGUFValueType.BOOL
    return GGUFValueType.INT32 if any(v < 0 for v in values) else GGUFValueType.UINT32


def packed_text(text: str) -> bytes:
    """Return a string as GGUF files hold it: its length in bytes, and UTF-8."""
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack(kind: int, values: Sequence[Any]) -> bytes:
    if kind == GGUFValueType.STRING:
        return b"".join(packed_text(value) for value in values)
    return struct.pack(f"<{len(values)}{_FORMATS[GGUFValueType(kind)]}", *values)


def _unpack(raw: bytes, at: int) -> tuple[Any, int]:
    kind = struct.unpack_from("<I", raw, at)[0]
    at += 4
    if kind != GGUFValueType.ARRAY:
        values, at = _unpack_values(raw, at, kind, 1)
        return values[0], at
    kind, count = struct.unpack_from("<IQ", raw, at)
    return _unpack_values(raw, at + 12, kind, count)


def _unpack_values(raw: bytes, at: int, kind: int, count: int) -> tuple[list[Any], int]:
    if kind == GGUFValueType.STRING:
        texts = []
        for _ in range(count):
            end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
            texts.append(raw[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        return texts, at
    code = f"<{count}{_FORMATS[GGUFValueType(kind)]}"
    return list(struct.unpack_from(code, raw, at)), at + struct.calcsize(code)
