"""The numbers by which a GGUF file names types of metadata and of tensors.

The ``gguf`` package has them too, but its import takes longer than reading a header.
"""

from __future__ import annotations

import struct
from enum import IntEnum


class ValueType(IntEnum):
    """GGUF value types, those that are named in this package."""

    UINT16 = 2
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct("<" + code) for number, code in enumerate("BbHhIif?__Qqd") if code != "_"
}
"""GGUF value type: how it is packed; all but strings and arrays."""

# ggml type: name, and elements and bytes of one block, from ggml.c. A type that is not listed is
# newer than this table, or was removed: only the host can judge it.
_TENSORS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

BLOCKS: dict[int, tuple[int, int]] = {
    kind: (elements, size) for kind, (_, elements, size) in _TENSORS.items()
}
"""ggml type: elements and bytes of one block."""

NUMBERS: dict[str, int] = {name: kind for kind, (name, _, _) in _TENSORS.items()}
"""Name of a ggml type: its number."""

F32, F16, BF16, Q8_0 = (NUMBERS[name] for name in ("F32", "F16", "BF16", "Q8_0"))


def type_name(kind: int) -> str:
    """Return the name of a ggml type, or its number where it is unknown here."""
    return _TENSORS[kind][0] if kind in _TENSORS else f"type {kind}"
