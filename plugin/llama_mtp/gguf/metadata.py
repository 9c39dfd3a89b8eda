"""Metadata as it lies in a GGUF file: a mapping from key to *entry*, the bytes of key, type, value.

Copied raw, what is not understood is not lost; only the few keys that change are decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from .header import Header
from .types import SCALARS, ValueType


def entry(key: str, value: Any, kind: int | None = None) -> bytes:
    """Return the entry of one metadata key as it lies in a file.

    ``value`` is a bool, int, float, str, or a sequence of one of these; ``kind`` is the number of a
    GGUF value type (of the elements, if a sequence). The default is BOOL, UINT32 (INT32 for
    negative numbers), FLOAT32 or STRING by the Python type.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        kind = _kind_of([value]) if kind is None else kind
        return packed_text(key) + struct.pack("<I", kind) + _pack(kind, [value])
    kind = _kind_of(value) if kind is None else kind
    head = struct.pack("<IIQ", ValueType.ARRAY, kind, len(value))
    return packed_text(key) + head + _pack(kind, value)


def decode(key: str, raw: bytes) -> Any:
    """Return the value of an entry: a scalar, a str, or a list of these."""
    at = len(packed_text(key))
    (kind,) = struct.unpack_from("<I", raw, at)
    if kind != ValueType.ARRAY:
        return _unpack(raw, at + 4, kind, 1)[0]
    kind, count = struct.unpack_from("<IQ", raw, at + 4)
    return _unpack(raw, at + 16, kind, count)


def elements_type(key: str, raw: bytes) -> int:
    """Return the GGUF type of an entry's value; of an array's elements."""
    kind, element = struct.unpack_from("<II", raw, len(packed_text(key)))
    return int(element if kind == ValueType.ARRAY else kind)


def metadata_of(header: Header) -> dict[str, bytes]:
    """Return the metadata of a file, key to entry, in the file's order."""
    metadata = {}
    with header.path.open("rb") as file:
        for key, (start, end) in header.entries.items():
            file.seek(start)
            metadata[key] = file.read(end - start)
    return metadata


def packed_text(text: str) -> bytes:
    """Return a string as GGUF files hold it: its length in bytes, and UTF-8."""
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _kind_of(values: Sequence[Any]) -> int:
    if any(isinstance(v, str) for v in values):
        return ValueType.STRING
    if any(isinstance(v, float) for v in values):
        return ValueType.FLOAT32
    if all(isinstance(v, bool) for v in values):
        return ValueType.BOOL
    return ValueType.INT32 if any(v < 0 for v in values) else ValueType.UINT32


def _pack(kind: int, values: Sequence[Any]) -> bytes:
    if kind == ValueType.STRING:
        return b"".join(packed_text(value) for value in values)
    return struct.pack(f"<{len(values)}{SCALARS[kind].format[1:]}", *values)


def _unpack(raw: bytes, at: int, kind: int, count: int) -> list[Any]:
    if kind != ValueType.STRING:
        return list(struct.unpack_from(f"<{count}{SCALARS[kind].format[1:]}", raw, at))
    texts = []
    for _ in range(count):
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        texts.append(raw[at + 8 : end].decode("utf-8", "surrogateescape"))
        at = end
    return texts
