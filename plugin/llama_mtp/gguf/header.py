"""A bounds-checked scanner of GGUF headers that skips what nobody asks for.

The payload of an array is walked, never decoded, so that a vocabulary of 248k tokens costs
milliseconds. Every count and length is compared with the bytes that are left before it is believed,
and all that is read is paid for out of one budget that no real model comes near: a damaged or
hostile file ends in `ModelFileError`, soon and in little memory, whatever the damage.

The file is read through a small window and not mapped: a mapped file that another program cuts
short kills the process that touches the missing part.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ModelFileError
from .types import BLOCKS, SCALARS, ValueType

_U32, _U64 = SCALARS[4], SCALARS[10]
# By number of dimensions, what follows it: the dimensions, the ggml type, the offset.
_TENSORS = [struct.Struct(f"<{n_dims}QIQ") for n_dims in range(5)]

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

TOKENS = "tokenizer.ggml.tokens"


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
        metadata: key to scalar, string or `ArrayInfo`; of a split file, the first part's.
        kinds: key to the number of its GGUF value type; of a split file, the first part's.
        entries: key to (start, end): the bytes of its whole entry in the first part, from the
            length of the key to the end of the value.
        tensors: name to tensor, in file order.
        file_size: bytes, all parts together.
        parts: the files, one unless split.
        data_offsets: where each part's data section starts, in bytes.
        repeats_token: the vocabulary has a token twice.
    """

    path: Path
    metadata: dict[str, object]
    kinds: dict[str, int]
    entries: dict[str, tuple[int, int]]
    tensors: dict[str, TensorInfo]
    file_size: int
    parts: tuple[Path, ...]
    data_offsets: tuple[int, ...]
    repeats_token: bool


def read_header(path: str | os.PathLike[str], *, like: Header | None = None) -> Header:
    """Read the header of a GGUF file; a split one is followed from its first part.

    Args:
        path: the file, or the first part.
        like: the header of another file, which may have the same vocabulary: lists of texts that
            are equal byte for byte are not walked again.

    Raises:
        ModelFileError: the file is missing, no GGUF, damaged or truncated, or a part is missing.
    """
    first, budget = Path(path), _Budget()
    header = _read_part(first, 0, budget, like)
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
    parts, tensors = [header], dict(header.tensors)
    for part in range(1, count):
        name = f"{match['prefix']}-{part + 1:05}-of-{count:05}.gguf"
        other = _read_part(first.with_name(name), part, budget)
        # llama.cpp aborts where the number is there and of another type.
        number = other.metadata.get("split.no"), other.kinds.get("split.no")
        if number != (part, ValueType.UINT16):
            raise ModelFileError(f"{shown(other.path)} is not part {part + 1}. Download it again.")
        if twice := tensors.keys() & other.tensors.keys():
            raise ModelFileError(
                f"{shown(other.path)} repeats tensor {min(twice)!r}. Download the parts again."
            )
        tensors |= other.tensors
        parts.append(other)
    expected = header.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileError(
            f"{shown(first)} and its parts hold {len(tensors)} tensors of {shown(expected)}. "
            "Download the parts again."
        )
    return replace(
        header,
        tensors=tensors,
        file_size=sum(part.file_size for part in parts),
        parts=tuple(part.path for part in parts),
        data_offsets=tuple(offset for part in parts for offset in part.data_offsets),
    )


def shown(value: object) -> str:
    """Text of a value from outside for an error message: short, and printable anywhere."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _read_part(path: Path, part: int, budget: _Budget, like: Header | None = None) -> Header:
    try:
        if path.is_dir():
            raise ModelFileError(
                f"{shown(path)} cannot be read: it is a folder. Name the GGUF file in it."
            )
        # A pipe would wait for a writer, a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")
        with path.open("rb", buffering=0) as file:
            return _Scanner(path, file, part, budget, like).header()
    except ModelFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        cause = getattr(error, "strerror", None) or error
        raise ModelFileError(
            f"{shown(path)} cannot be read: {cause}. Check the path and its permissions."
        ) from error


@dataclass
class _Budget:
    """What is left to spend on reading one model."""

    left: int = _BUDGET


class _Scanner:
    """A cursor over one file; it never moves past the end."""

    def __init__(
        self, path: Path, file: FileIO, part: int, budget: _Budget, like: Header | None
    ) -> None:
        self.path = path
        self.file = file
        self.part = part
        self.budget = budget
        self.like = like
        self.repeats_token = False
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

    def unpack(self, packed: struct.Struct, what: str) -> tuple[Any, ...]:
        start = self.take(packed.size, what)
        return packed.unpack_from(self.window, start)

    def u32(self, what: str) -> int:
        return int(self.unpack(_U32, what)[0])

    def u64(self, what: str) -> int:
        return int(self.unpack(_U64, what)[0])

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
            metadata[key] = self.same_list(key, start) or self.value(key, kinds[key])
            entries[key] = (start, self.pos)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"is damaged: its alignment {alignment!r} is not a power of two")
        if kinds.get("general.alignment", ValueType.UINT32) != ValueType.UINT32:
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
            metadata=metadata,
            kinds=kinds,
            entries=entries,
            tensors=tensors,
            file_size=self.size,
            parts=(self.path,),
            data_offsets=(data_offset,),
            repeats_token=self.repeats_token,
        )

    def same_list(self, key: str, start: int) -> ArrayInfo | None:
        """Step over a list of texts that the other file has too; None where it has not.

        The whole entries are compared, the present one from position ``start``.
        """
        info = self.like.metadata.get(key) if self.like is not None else None
        if self.like is None or not isinstance(info, ArrayInfo) or info.type != ValueType.STRING:
            return None
        begin, end = self.like.entries[key]
        with contextlib.suppress(OSError), self.like.path.open("rb", buffering=0) as other:
            other.seek(begin)
            self.file.seek(start)
            for at in range(begin, end, _WINDOW):
                n_bytes = min(_WINDOW, end - at)
                if self.file.read(n_bytes) != other.read(n_bytes):
                    return None
            self.skip(start + end - begin - self.pos, key)
            self.repeats_token |= key == TOKENS and self.like.repeats_token
            return info
        return None

    def value(self, key: str, kind: int) -> object:
        if kind == ValueType.STRING:
            n_bytes = self.u64(key)
            if n_bytes <= _MAX_TEXT:
                return self.text(n_bytes, key)
            self.skip(n_bytes, key)
            return ArrayInfo(0, n_bytes)
        if kind == ValueType.ARRAY:
            return self.array(key)
        if packed := SCALARS.get(kind):
            return self.unpack(packed, key)[0]
        self.fail(f"is damaged: metadata key {key!r} has the unknown type {kind}")

    def array(self, key: str) -> ArrayInfo:
        kind = self.u32(key)
        if scalar := SCALARS.get(kind):
            count = self.count(scalar.size, f"elements of {key!r}")
            self.skip(count * scalar.size, key)
        elif kind == ValueType.STRING:
            count = self.count(8, f"elements of {key!r}")
            self.spend(_COST_STRING * count)
            if key == TOKENS:
                self.spend(_COST_TOKEN * count)
                self.repeats_token = _repeats(self.texts(count, key))
            else:
                self.skip_texts(count, key)
        else:
            self.fail(f"is damaged: array {key!r} has the unknown element type {kind}")
        return ArrayInfo(kind, count)

    # Both are hot loops, of half a million turns for a large vocabulary and its merges. They rely
    # on unpack_from to refuse a place outside the window, which is then moved on.

    def skip_texts(self, count: int, key: str) -> None:
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

    def texts(self, count: int, key: str) -> list[bytes]:
        length_at = _U64.unpack_from
        found: list[bytes] = []
        while len(found) < count:
            n_bytes = self.u64(key)
            self.spend(_COST_TOKEN_BYTE * n_bytes)
            start = self.take(n_bytes, key)
            window = self.window
            found.append(window[start : start + n_bytes])
            at, end = start + n_bytes, len(window)
            with contextlib.suppress(struct.error):
                for _ in range(len(found), count):
                    start = at + 8
                    stop = start + length_at(window, at)[0]
                    if stop > end:
                        break
                    found.append(window[start:stop])
                    at = stop
            n_bytes = self.window_at + at - self.pos
            self.skip(n_bytes, key)
            self.spend(_COST_TOKEN_BYTE * n_bytes)
        return found

    def tensor(self) -> TensorInfo:
        name = self.name(_MAX_NAME, "the name of a tensor")
        n_dims = self.u32(name)
        if n_dims > 4:
            self.fail(f"is damaged: tensor {name!r} has {n_dims} dimensions, more than 4")
        *shape, kind, offset = self.unpack(_TENSORS[n_dims], name)
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


def _repeats(tokens: list[bytes]) -> bool:
    """Whether llama.cpp, which aborts on it, would find a token twice.

    It reads a token up to its first zero byte, and gives an empty one a name of its own.
    """
    if b"\0" in b"".join(tokens):
        tokens = [token.partition(b"\0")[0] for token in tokens]
    return len(set(tokens)) != len(tokens) - max(tokens.count(b"") - 1, 0)
