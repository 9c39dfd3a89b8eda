"""A bounds-checked scanner of GGUF headers that skips what a check at load does not need.

The payload of an array is walked, never decoded, so that a vocabulary of 248k tokens costs
milliseconds. Every count and length is compared with the bytes that are left before it is believed:
a damaged file ends in `ModelFileError`, whatever the damage.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass, field
from itertools import repeat
from math import prod
from pathlib import Path
from typing import NoReturn

from ..errors import ModelFileError

_STRING, _ARRAY = 8, 9
# GGUF value type: how it is packed. BOOL is 7; 8 and 9 are strings and arrays.
_SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct("<" + code) for number, code in enumerate("BbHhIif?__Qqd") if code != "_"
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# ggml type: (elements, bytes) of one block, from ggml.c. A type that is not listed is newer than
# this table, or was removed: only the host can judge it.
BLOCKS: dict[int, tuple[int, int]] = {
    **{0: (1, 4), 1: (1, 2), 30: (1, 2)},  # F32, F16, BF16
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8)},  # I8, I16, I32, I64, F64
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},  # Q4_0..Q8_1
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176)},  # Q2_K..Q5_K
    **{14: (256, 210), 15: (256, 292)},  # Q6_K, Q8_K
    **{
        16: (256, 66),
        17: (256, 74),
        18: (256, 98),
        19: (256, 50),
    },  # IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S
    **{20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136)},  # IQ4_NL, IQ3_S, IQ2_S, IQ4_XS
    **{19: (256, 50), 29: (256, 56), 34: (256, 54), 35: (256, 66)},  # IQ1_S, IQ1_M, TQ1_0, TQ2_0
    **{39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)},  # MXFP4, NVFP4, Q1_0, Q2_0
}

_SPLIT_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class ArrayInfo:
    """A metadata array whose payload was skipped: GGUF element type and number of elements."""

    type: int
    count: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor.

    Attributes:
        name: as in the file, such as ``blk.0.attn_q.weight``.
        shape: ggml order, the contiguous dimension first.
        type: number of the ggml type.
        offset: bytes from the start of the data section of its part.
        part: which part of a split file holds it; 0 is the first, or the only one.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    part: int = 0

    @property
    def n_bytes(self) -> int | None:
        """Bytes of data; None where the ggml type is unknown here."""
        if self.type not in BLOCKS:
            return None
        elements, size = BLOCKS[self.type]
        return prod(self.shape) // elements * size


@dataclass(frozen=True)
class Header:
    """What the header of a GGUF says; of a split file, all parts' tensors.

    Attributes:
        path: the file, or the first part.
        version: GGUF version, 2 or 3.
        metadata: key to scalar, string or `ArrayInfo`; of a split file, the first part's.
        tensors: name to tensor, in file order.
        file_size: bytes, all parts together.
        data_offset: where the (first part's) data section starts, in bytes.
        parts: the files, one unless split.
    """

    path: Path
    version: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    file_size: int
    data_offset: int
    parts: tuple[Path, ...] = field(default=())


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a GGUF file; a split one is followed from its first part.

    Raises:
        ModelFileError: the file is missing, no GGUF, damaged or truncated, or a part is missing.
    """
    first = Path(path)
    header = _read_part(first, 0)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header

    match = _SPLIT_NAME.fullmatch(first.name)
    if header.metadata.get("split.no") != 0 or (match and int(match["number"]) != 1):
        raise ModelFileError(
            f"{first} is not the first part of its model. Pass the part -00001-of-{count:05}."
        )
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"{first} is the first of {count} parts, and its name does not say so. Rename the "
            f"parts back to NAME-00001-of-{count:05}.gguf and so on."
        )
    tensors, size, parts = dict(header.tensors), header.file_size, [first]
    for part in range(1, count):
        name = f"{match['prefix']}-{part + 1:05}-of-{count:05}.gguf"
        other = _read_part(first.with_name(name), part)
        if other.metadata.get("split.no") != part:
            raise ModelFileError(f"{other.path} is not part {part + 1}. Download it again.")
        if twice := tensors.keys() & other.tensors.keys():
            raise ModelFileError(
                f"{other.path} repeats tensor {min(twice)}. Download the parts again."
            )
        tensors |= other.tensors
        size += other.file_size
        parts.append(other.path)
    expected = header.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileError(
            f"{first} and its parts hold {len(tensors)} tensors of {expected}. "
            "Download the parts again."
        )
    return Header(
        first, header.version, header.metadata, tensors, size, header.data_offset, tuple(parts)
    )


def _read_part(path: Path, part: int) -> Header:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFileError(f"{path} is empty. Download or convert it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Scanner(path, data, part).header()
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error


class _Scanner:
    """A cursor over one file; it never moves past the end."""

    def __init__(self, path: Path, data: mmap.mmap, part: int) -> None:
        self.path = path
        self.data = data
        self.part = part
        self.size = len(data)
        self.pos = 0

    def fail(self, cause: str, remedy: str = "Download or convert it again.") -> NoReturn:
        raise ModelFileError(f"{self.path} {cause}. {remedy}")

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes` and return where they begin."""
        start = self.pos
        if n_bytes > self.size - start:
            self.fail(
                f"is truncated or damaged: {what} needs {n_bytes} bytes at byte {start}, and the "
                f"file ends at {self.size}"
            )
        self.pos = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def count(self, smallest: int, what: str) -> int:
        """A number of things of at least `smallest` bytes each; refused if they cannot fit."""
        n = self.u64(what)
        if n > (self.size - self.pos) // smallest:
            self.fail(f"is truncated or damaged: it declares {n} {what}, which do not fit into it")
        return n

    def string(self, what: str) -> str:
        n = self.u64(what)
        start = self.take(n, what)
        return self.data[start : start + n].decode("utf-8", errors="replace")

    def header(self) -> Header:
        if self.data[: min(4, self.size)] != b"GGUF":
            self.fail("is not a GGUF file", "Convert the model to GGUF, or download a GGUF of it.")
        self.pos = 4
        version = self.u32("the version")
        if version & 0xFFFF == 0 and version:
            self.fail("is a big-endian GGUF", "Convert it for little-endian machines.")
        if version not in (2, 3):
            self.fail(
                f"has GGUF version {version}, and this package reads 2 and 3",
                "Convert the model again with a current llama.cpp.",
            )
        n_tensors = self.count(24, "tensors")
        n_metadata = self.count(13, "metadata entries")
        metadata: dict[str, object] = {}
        for _ in range(n_metadata):
            key = self.string("a metadata key")
            if not key or key in metadata:
                self.fail(f"is damaged: metadata key {key!r} is empty or occurs twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"is damaged: its alignment {alignment!r} is not a power of two")
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            tensor = self.tensor()
            if tensor.name in tensors:
                self.fail(f"is damaged: tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
        data_offset = -(-self.pos // alignment) * alignment
        self.check_extents(tensors, data_offset, alignment)
        return Header(self.path, version, metadata, tensors, self.size, data_offset, (self.path,))

    def value(self, key: str) -> object:
        kind = self.u32(key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        if scalar := _SCALARS.get(kind):
            return scalar.unpack_from(self.data, self.take(scalar.size, key))[0]
        self.fail(f"is damaged: metadata key {key!r} has the unknown type {kind}")

    def array(self, key: str) -> ArrayInfo:
        kind = self.u32(key)
        if scalar := _SCALARS.get(kind):
            count = self.count(scalar.size, f"elements of {key!r}")
            self.take(count * scalar.size, key)
        elif kind == _STRING:
            count = self.count(8, f"elements of {key!r}")
            self.skip_strings(count, key)
        else:
            self.fail(f"is damaged: array {key!r} has the unknown element type {kind}")
        return ArrayInfo(kind, count)

    def skip_strings(self, count: int, key: str) -> None:
        # The hot loop of the file: half a million turns for a large vocabulary and its merges. It
        # relies on unpack_from to refuse a position outside the file.
        pos, data, length_at = self.pos, self.data, _U64.unpack_from
        try:
            for _ in repeat(None, count):
                pos += 8 + length_at(data, pos)[0]
        except (struct.error, IndexError, OverflowError):
            pos = self.size + 1
        if pos > self.size:
            self.fail(f"is truncated or damaged: it ends inside the strings of {key!r}")
        self.pos = pos

    def tensor(self) -> TensorInfo:
        name = self.string("a tensor name")
        n_dims = self.u32(name)
        if n_dims > 4:
            self.fail(f"is damaged: tensor {name!r} has {n_dims} dimensions, more than 4")
        shape = tuple(self.u64(name) for _ in range(n_dims))
        kind = self.u32(name)
        return TensorInfo(name, shape, kind, self.u64(name), self.part)

    def check_extents(
        self, tensors: dict[str, TensorInfo], data_offset: int, alignment: int
    ) -> None:
        for tensor in tensors.values():
            row = tensor.shape[0] if tensor.shape else 1
            if tensor.offset % alignment or row % BLOCKS.get(tensor.type, (1, 0))[0]:
                self.fail(f"is damaged: tensor {tensor.name!r} has an impossible offset or shape")
            end = data_offset + tensor.offset + (tensor.n_bytes or 0)
            if end > self.size:
                self.fail(
                    f"is truncated: tensor {tensor.name!r} ends at byte {end}, and the file at "
                    f"{self.size}",
                    "Download it again.",
                )
