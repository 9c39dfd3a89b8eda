"""A bounds-checked scanner of GGUF headers that skips what a check at load does not need.

The payload of an array is walked, never decoded, so that a vocabulary of 248k tokens costs
milliseconds. Every count and length is compared with the bytes that are left before it is believed,
and all that is read is paid for out of one budget that no real model comes near: a damaged or
hostile file ends in `ModelFileError`, soon and in little memory, whatever the damage.

The file is read through a small window and not mapped: a mapped file that another program cuts
short kills the process that touches the missing part.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass, field, replace
from io import FileIO
from itertools import repeat
from math import prod
from pathlib import Path
from typing import NoReturn

from ..errors import ModelFileError

_U16_KIND, _U32_KIND, _STRING, _ARRAY = 2, 4, 8, 9
# GGUF value type: how it is packed. BOOL is 7; 8 and 9 are strings and arrays.
_SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct("<" + code) for number, code in enumerate("BbHhIif?__Qqd") if code != "_"
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# By number of dimensions, what follows it: the dimensions, the ggml type, the offset.
_TENSORS = [struct.Struct(f"<{n_dims}QIQ") for n_dims in range(5)]

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

# ggml type: its name, without the import of the package that knows them too.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip

_SPLIT_NAME = re.compile(
    r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL
)

_WINDOW = 256 * 1024  # bytes read at a time
_MAX_KEY = 2**16 - 1  # bytes, from the GGUF specification
_MAX_NAME = 63  # bytes of a tensor's name: GGML_MAX_NAME with its final zero
_MAX_ELEMENTS = 2**63 - 1
_MAX_TEXT = 2**20  # bytes of a string value; a longer one is skipped as an array would be

# What reading one model may cost, all parts together, in bytes of header. Other work is priced so
# that whatever a file spends it on takes well under a second and 200 MB: 800 thousand tokens that
# are compared, 3.7 million other strings in arrays, 65 thousand keys and tensors, 16 MiB of text,
# or 4000 parts. The largest vocabularies known have 262 thousand tokens and twice as many merges.
_BUDGET = 2**28
_COST_STRING, _COST_TOKEN, _COST_TOKEN_BYTE = 64, 96, 8
_COST_ENTRY, _COST_TEXT, _COST_PART = 2**12, 16, 2**16

_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class ArrayInfo:
    """A metadata array whose payload was skipped: GGUF element type and number of elements.

    A string of more than 1 MiB is skipped too, and stands as the array of its bytes (type 0).
    """

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
        kinds: key to the number of its GGUF value type; of a split file, the first part's.
        data_offsets: where each part's data section starts, in bytes.
        entries: key to (start, end): the bytes of its whole entry in the first part, from the
            length of the key to the end of the value.
    """

    path: Path
    version: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    file_size: int
    data_offset: int
    parts: tuple[Path, ...] = field(default=())
    kinds: dict[str, int] = field(default_factory=dict)
    data_offsets: tuple[int, ...] = field(default=())
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_header(path: str | os.PathLike[str], *, check_tokens: bool = False) -> Header:
    """Read the header of a GGUF file; a split one is followed from its first part.

    Args:
        path: the file, or the first part.
        check_tokens: refuse a vocabulary with a token that occurs twice, on which llama.cpp aborts.

    Raises:
        ModelFileError: the file is missing, no GGUF, damaged or truncated, or a part is missing.
    """
    first, budget = Path(path), _Budget()
    header = _read_part(first, 0, budget, check_tokens)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header

    match = _SPLIT_NAME.fullmatch(first.name)
    if header.metadata.get("split.no") != 0 or (match and int(match["number"]) != 1):
        raise ModelFileError(
            f"{shown(first)} is not the first part of its model. "
            f"Pass the part -00001-of-{count:05}."
        )
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"{shown(first)} is the first of {count} parts, and its name does not say so. Rename "
            f"the parts back to NAME-00001-of-{count:05}.gguf and so on."
        )
    tensors, size, parts = dict(header.tensors), header.file_size, [first]
    offsets = [header.data_offset]
    for part in range(1, count):
        name = f"{match['prefix']}-{part + 1:05}-of-{count:05}.gguf"
        other = _read_part(first.with_name(name), part, budget)
        # llama.cpp aborts where the number is there and of another type.
        if other.metadata.get("split.no") != part or other.kinds["split.no"] != _U16_KIND:
            raise ModelFileError(f"{shown(other.path)} is not part {part + 1}. Download it again.")
        if twice := tensors.keys() & other.tensors.keys():
            raise ModelFileError(
                f"{shown(other.path)} repeats tensor {min(twice)!r}. Download the parts again."
            )
        tensors |= other.tensors
        size += other.file_size
        parts.append(other.path)
        offsets.append(other.data_offset)
    expected = header.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileError(
            f"{shown(first)} and its parts hold {len(tensors)} tensors of {shown(expected)}. "
            "Download the parts again."
        )
    return replace(
        header, tensors=tensors, file_size=size, parts=tuple(parts), data_offsets=tuple(offsets)
    )


def type_name(kind: int) -> str:
    """Return the name of a ggml type, or its number where it is unknown here."""
    return _TYPE_NAMES.get(kind, f"type {kind}")


def shown(value: object) -> str:
    """Text of a value from outside for an error message: short, and printable anywhere."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _read_part(path: Path, part: int, budget: _Budget, check_tokens: bool = False) -> Header:
    try:
        if path.is_dir():
            raise ModelFileError(
                f"{shown(path)} cannot be read: it is a folder. Name the GGUF file in it."
            )
        # A pipe would wait for a writer, a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")
        with path.open("rb", buffering=0) as file:
            return _Scanner(path, file, part, budget, check_tokens).header()
    except ModelFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        cause = getattr(error, "strerror", None) or error
        raise ModelFileError(
            f"{shown(path)} cannot be read: {cause}. Check the path and its permissions."
        ) from error


class _Budget:
    """What is left to spend on reading one model."""

    def __init__(self) -> None:
        self.left = _BUDGET


class _Scanner:
    """A cursor over one file; it never moves past the end."""

    def __init__(
        self, path: Path, file: FileIO, part: int, budget: _Budget, check_tokens: bool
    ) -> None:
        self.path = path
        self.file = file
        self.part = part
        self.budget = budget
        self.check_tokens = check_tokens
        self.size = os.fstat(file.fileno()).st_size
        self.pos = 0
        self.window = b""
        self.window_at = 0  # position of the window's first byte

    def fail(self, cause: str, remedy: str = "Download or convert it again.") -> NoReturn:
        raise ModelFileError(f"{shown(self.path)} {shown(cause)}. {remedy}")

    def spend(self, cost: int) -> None:
        self.budget.left -= cost
        if self.budget.left < 0:
            self.fail("has a larger header than any model needs", "It may be damaged or hostile.")

    def skip(self, n_bytes: int, what: str) -> None:
        """Step over `n_bytes` that need not be read."""
        if n_bytes > self.size - self.pos:
            self.fail(
                f"is truncated or damaged: {what} needs {n_bytes} bytes at byte {self.pos}, and "
                f"the file ends at {self.size}"
            )
        self.spend(n_bytes)
        self.pos += n_bytes

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes` and return where in the window they begin."""
        start = self.pos
        self.skip(n_bytes, what)
        if start + n_bytes > self.window_at + len(self.window):
            self.look(start, n_bytes)
        return start - self.window_at

    def look(self, at: int, n_bytes: int) -> None:
        """Read the window anew, with at least `n_bytes` from position `at`."""
        self.file.seek(at)
        self.window, self.window_at = self.file.read(max(n_bytes, _WINDOW)), at
        if len(self.window) < n_bytes:
            self.fail("became shorter while it was read", "Wait until it is there as a whole.")

    def u32(self, what: str) -> int:
        start = self.take(4, what)
        value: int = _U32.unpack_from(self.window, start)[0]
        return value

    def u64(self, what: str) -> int:
        start = self.take(8, what)
        value: int = _U64.unpack_from(self.window, start)[0]
        return value

    def count(self, smallest: int, what: str) -> int:
        """A number of things of at least `smallest` bytes each; refused if they cannot fit."""
        n = self.u64(what)
        if n > (self.size - self.pos) // smallest:
            self.fail(f"is truncated or damaged: it declares {n} {what}, which do not fit into it")
        return n

    def text(self, n_bytes: int, what: str) -> str:
        self.spend(_COST_TEXT * n_bytes)
        start = self.take(n_bytes, what)
        return self.window[start : start + n_bytes].decode("utf-8", errors="replace")

    def name(self, longest: int, what: str) -> str:
        n_bytes = self.u64(what)
        if n_bytes > longest:
            self.fail(f"is truncated or damaged: {what} has {n_bytes} bytes, not {longest} at most")
        return self.text(n_bytes, what)

    def header(self) -> Header:
        self.spend(_COST_PART)
        if self.size == 0:
            self.fail("is empty")
        magic = self.take(min(4, self.size), "the magic number")
        if self.window[magic : magic + 4] != b"GGUF":
            self.fail("is not a GGUF file", "Convert the model to GGUF, or download a GGUF of it.")
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
        kinds: dict[str, int] = {}
        entries: dict[str, tuple[int, int]] = {}
        for _ in range(n_metadata):
            start = self.pos
            self.spend(_COST_ENTRY)
            key = self.name(_MAX_KEY, "a metadata key")
            if not key or key in metadata:
                self.fail(f"is damaged: metadata key {key!r} is empty or occurs twice")
            kinds[key] = self.u32(key)
            metadata[key] = self.value(key, kinds[key])
            entries[key] = (start, self.pos)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"is damaged: its alignment {alignment!r} is not a power of two")
        if kinds.get("general.alignment", _U32_KIND) != _U32_KIND:
            self.fail("is damaged: its alignment is no uint32")
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            self.spend(_COST_ENTRY)
            tensor = self.tensor()
            if tensor.name in tensors:
                self.fail(f"is damaged: tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
        data_offset = -(-self.pos // alignment) * alignment
        self.check_extents(tensors, data_offset, alignment)
        return Header(
            path=self.path,
            version=version,
            metadata=metadata,
            tensors=tensors,
            file_size=self.size,
            data_offset=data_offset,
            parts=(self.path,),
            kinds=kinds,
            data_offsets=(data_offset,),
            entries=entries,
        )

    def value(self, key: str, kind: int) -> object:
        if kind == _STRING:
            n_bytes = self.u64(key)
            if n_bytes <= _MAX_TEXT:
                return self.text(n_bytes, key)
            self.skip(n_bytes, key)
            return ArrayInfo(0, n_bytes)
        if kind == _ARRAY:
            return self.array(key)
        if packed := _SCALARS.get(kind):
            start = self.take(packed.size, key)
            return packed.unpack_from(self.window, start)[0]
        self.fail(f"is damaged: metadata key {key!r} has the unknown type {kind}")

    def array(self, key: str) -> ArrayInfo:
        kind = self.u32(key)
        if scalar := _SCALARS.get(kind):
            count = self.count(scalar.size, f"elements of {key!r}")
            self.skip(count * scalar.size, key)
        elif kind == _STRING:
            count = self.count(8, f"elements of {key!r}")
            self.spend(_COST_STRING * count)
            start = self.pos
            self.skip_strings(count, key)
            if self.check_tokens and key == _TOKENS:
                self.compare_tokens(count, start)
        else:
            self.fail(f"is damaged: array {key!r} has the unknown element type {kind}")
        return ArrayInfo(kind, count)

    def skip_strings(self, count: int, key: str) -> None:
        # The hot loop of the file: half a million turns for a large vocabulary and its merges. It
        # relies on unpack_from to refuse a place outside the window, which is then moved on.
        length_at = _U64.unpack_from
        while count:
            window, at, done = self.window, self.pos - self.window_at, 0
            try:
                for done in range(count):  # noqa: B007
                    at += 8 + length_at(window, at)[0]
                done = count
            except (struct.error, IndexError, OverflowError):
                pass
            count -= done
            self.skip(self.window_at + at - self.pos, key)
            if count:
                self.take(8, key)
                self.pos -= 8

    def compare_tokens(self, count: int, start: int) -> None:
        """Refuse a vocabulary, from position `start` to here, with a token that occurs twice.

        llama.cpp aborts on it. It reads a token up to its first zero byte, and gives an empty one a
        name of its own.
        """
        n_bytes = self.pos - start
        self.spend(_COST_TOKEN * count + _COST_TOKEN_BYTE * n_bytes)
        self.look(start, n_bytes)
        strings, at, length_at = self.window, 0, _U64.unpack_from
        tokens = []
        for _ in repeat(None, count):
            end = at + 8 + length_at(strings, at)[0]
            tokens.append(strings[at + 8 : end])
            at = end
        if b"\0" in b"".join(tokens):
            tokens = [token.partition(b"\0")[0] for token in tokens]
        if len(set(tokens)) != count - max(tokens.count(b"") - 1, 0):
            self.fail("has a token twice in its vocabulary, which llama.cpp aborts on")

    def tensor(self) -> TensorInfo:
        name = self.name(_MAX_NAME, "the name of a tensor")
        n_dims = self.u32(name)
        if n_dims > 4:
            self.fail(f"is damaged: tensor {name!r} has {n_dims} dimensions, more than 4")
        packed = _TENSORS[n_dims]
        start = self.take(packed.size, name)
        *shape, kind, offset = packed.unpack_from(self.window, start)
        # The second condition is for tensors of no element, whose other dimensions are free.
        if prod(shape) > _MAX_ELEMENTS or any(n > _MAX_ELEMENTS for n in shape):
            self.fail(f"is damaged: tensor {name!r} has the impossible shape {shape}")
        return TensorInfo(name, tuple(shape), kind, offset, self.part)

    def check_extents(
        self, tensors: dict[str, TensorInfo], data_offset: int, alignment: int
    ) -> None:
        """Refuse tensors that are not inside the file, one after the other, as llama.cpp does."""
        end, exact = 0, True
        for tensor in tensors.values():
            begin, n_bytes = -(-end // alignment) * alignment, tensor.n_bytes
            row = tensor.shape[0] if tensor.shape else 1
            if row % BLOCKS.get(tensor.type, (1, 0))[0]:
                self.fail(f"is damaged: tensor {tensor.name!r} has half a block in a row")
            if tensor.offset < begin:
                self.fail(f"is damaged: tensor {tensor.name!r} overlaps the one before it")
            # Where the size of the tensor before is not known here, any later place will do.
            if tensor.offset % alignment or (exact and tensor.offset != begin):
                self.fail(f"is damaged: tensor {tensor.name!r} has the wrong offset")
            end, exact = tensor.offset + (n_bytes or 0), n_bytes is not None
            if data_offset + end > self.size:
                self.fail(
                    f"is truncated: tensor {tensor.name!r} ends at byte {data_offset + end}, and "
                    f"the file at {self.size}",
                    "Download it again.",
                )
