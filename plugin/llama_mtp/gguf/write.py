"""Writing GGUF files of any size by streaming: metadata copied raw, tensors piece by piece.

A file appears under its name only when it is complete, on the disk, and has been read back. What
does not change goes from file to file inside the kernel; everything else passes through memory a
piece at a time, and is summed on the way so that reading back can tell.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileWriteError, ModelFileError
from .header import Header, TensorInfo, read_header
from .metadata import decode, entry, metadata_of, packed_text

CHUNK = 1 << 20
"""Bytes per piece that passes through memory: few enough to stay in the processor's cache."""

Chunk = bytes | memoryview
Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""

_VERSION = 3
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_PAGE = 4096
_KERNEL_CHUNK = 32 << 20  # bytes per call where nothing passes through memory


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written, and where its data comes from.

    Attributes:
        name: as it will be in the file.
        shape: ggml order, the contiguous dimension first.
        type: number of the ggml type.
        n_bytes: bytes of data.
        chunks: streams the data from its beginning, at most some 16 MB at a time; may be called
            more than once.
        path: a file that holds the data as it is to be written; None where it is made on the way.
        offset: where in that file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    n_bytes: int
    chunks: Callable[[], Iterator[Chunk]]
    path: Path | None = None
    offset: int = 0


# --- tensors --------------------------------------------------------------------------------------


def stored(header: Header, tensor: TensorInfo, name: str | None = None) -> TensorSource:
    """Return a tensor of a file as a source, under another name if one is given.

    Raises:
        ModelFileError: its ggml type is unknown, so that its size cannot be told.
    """
    if tensor.n_bytes is None:
        raise ModelFileError(
            f"{header.path} holds tensor {tensor.name} of the ggml type {tensor.type}, which this "
            "release does not know. Look for a newer llama-mtp."
        )
    path = header.parts[tensor.part]
    offset = header.data_offsets[tensor.part] + tensor.offset
    n_bytes = tensor.n_bytes
    return TensorSource(
        name=tensor.name if name is None else name,
        shape=tensor.shape,
        type=tensor.type,
        n_bytes=n_bytes,
        chunks=lambda: _read(path, offset, n_bytes),
        path=path,
        offset=offset,
    )


def _read(path: Path, offset: int, n_bytes: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while n_bytes:
            data = file.read(min(n_bytes, CHUNK))
            if not data:
                raise ModelFileError(f"{path} ended while it was read. Is it still being written?")
            n_bytes -= len(data)
            yield data


# --- the file -------------------------------------------------------------------------------------


def check_destination(out: Path, inputs: Collection[Path], *, force: bool) -> None:
    """Raise FileWriteError where ``out`` must not be written: an input, or there without force."""
    if not out.parent.is_dir():
        raise FileWriteError(f"There is no folder {out.parent}. Make it, or name another file.")
    if out.is_dir():
        raise FileWriteError(f"{out} is a folder. Name a file.")
    if not out.exists():
        return
    for path in inputs:
        if path.exists() and out.samefile(path):
            raise FileWriteError(f"{out} is one of the inputs. Write to another file.")
    if not force:
        raise FileWriteError(f"{out} exists. Name another file, or overwrite it with --force.")


def free_space(folder: Path) -> int:
    """Return the bytes that can still be written into a folder."""
    return shutil.disk_usage(folder).free


def check_space(out: Path, n_bytes: int) -> None:
    """Raise FileWriteError where ``n_bytes`` do not fit beside (or, for a folder, into) ``out``."""
    free = free_space(out if out.is_dir() else out.parent)
    if n_bytes > free:
        raise FileWriteError(
            f"{out} needs {_size(n_bytes)}, and {_size(free)} are free there. "
            "Make room, or write to another disk."
        )


def write_gguf(
    out: Path,
    metadata: Mapping[str, bytes],
    tensors: Sequence[TensorSource],
    *,
    checked: Collection[str] = (),
    padding: str = "",
    progress: Progress | None = None,
    accept: Callable[[Path], None] | None = None,
) -> int:
    """Write a GGUF file, replacing one that is there, and return its size in bytes.

    The file is written under a temporary name in the same folder, brought to the disk, read back,
    and renamed; when anything goes wrong, or the process is interrupted, nothing is left.

    Args:
        out: the file.
        metadata: key to entry; ``general.alignment`` among them is respected.
        tensors: what to write, in order.
        checked: names of the tensors whose data is read back and compared, besides the header.
        padding: a key for a text of blanks, as many as it takes for the first tensor to lie in its
            page as it does in its source: copying whole pages takes half the time.
        progress: called as data is written.
        accept: called with the temporary file once it is complete; raises to refuse it.

    Raises:
        FileWriteError: no space, no permission, or what was read back is not what was written.
        ModelFileError: an input ended early.
    """
    alignment = _ALIGNMENT
    if raw := metadata.get("general.alignment"):
        alignment = int(decode("general.alignment", raw))
    if padding and tensors and tensors[0].path is not None:
        metadata = _padded(metadata, tensors, alignment, padding)
    header, infos, data_size = _layout(metadata, tensors, alignment)
    total = len(header) + data_size
    try:
        check_space(out, total)
        part = out.with_name(f".{out.name[:200]}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb", buffering=0) as file:
                _write(file.fileno(), header)
                sums = _write_data(file, tensors, alignment, checked, _Meter(progress, data_size))
                os.fsync(file.fileno())
            _compare(part, metadata, infos, total, sums)
            if accept is not None:
                accept(part)
            os.replace(part, out)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except FileWriteError:
        raise
    except OSError as error:
        raise FileWriteError(
            f"{out} cannot be written: {error.strerror or error}. "
            "Check the folder, its permissions and its free space."
        ) from error
    _sync_folder(out.parent)
    return total


def _layout(
    metadata: Mapping[str, bytes], tensors: Sequence[TensorSource], alignment: int
) -> tuple[bytes, dict[str, TensorInfo], int]:
    """Return the header with its padding, the tensors as they will be, and the size of the data."""
    infos: dict[str, TensorInfo] = {}
    blob = [
        b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)),
        *metadata.values(),
    ]
    offset = 0
    for tensor in tensors:
        infos[tensor.name] = TensorInfo(tensor.name, tensor.shape, tensor.type, offset)
        n_dims = len(tensor.shape)
        blob.append(packed_text(tensor.name))
        blob.append(struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.type, offset))
        offset += tensor.n_bytes + -tensor.n_bytes % alignment
    size = sum(map(len, blob))
    blob.append(bytes(-size % alignment))
    return b"".join(blob), infos, offset


def _padded(
    metadata: Mapping[str, bytes], tensors: Sequence[TensorSource], alignment: int, key: str
) -> Mapping[str, bytes]:
    """Return the metadata with a text that moves the data to the source's place in its page."""
    place = tensors[0].offset % _PAGE
    if _PAGE % alignment or place % alignment:
        return metadata
    header, _, _ = _layout({**metadata, key: entry(key, "")}, tensors, 1)
    return {**metadata, key: entry(key, " " * ((place - len(header)) % _PAGE))}


class _Meter:
    """Adds up what was written and reports it."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def _write_data(
    file: Any,
    tensors: Sequence[TensorSource],
    alignment: int,
    checked: Collection[str],
    meter: _Meter,
) -> dict[str, int]:
    """Write all tensors with their padding; return the checksums of those in ``checked``."""
    sums: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for tensor in tensors:
            padding = -tensor.n_bytes % alignment
            if tensor.path is not None and tensor.name not in checked:
                if tensor.path not in opened:
                    source = stack.enter_context(tensor.path.open("rb", buffering=0)).fileno()
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    opened[tensor.path] = source
                _copy(opened[tensor.path], file.fileno(), tensor, meter)
            else:
                written = total = 0
                for chunk in tensor.chunks():
                    total = zlib.crc32(chunk, total)
                    n_bytes = _write(file.fileno(), chunk)
                    written += n_bytes
                    meter.add(n_bytes)
                if written != tensor.n_bytes:
                    raise ModelFileError(
                        f"Tensor {tensor.name} came with {written} bytes of {tensor.n_bytes}. "
                        "Download or convert its file again."
                    )
                sums[tensor.name] = total
            meter.add(_write(file.fileno(), bytes(padding)))
    return sums


def _write(handle: int, data: Chunk) -> int:
    """Write all of it, and return the bytes."""
    view = left = memoryview(data).cast("B")
    while left:
        left = left[os.write(handle, left) :]
    return view.nbytes


# What a kernel answers that cannot copy between these two files by itself.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def _copy(source: int, target: int, tensor: TensorSource, meter: _Meter) -> None:
    """Copy a tensor from file to file inside the kernel, or through memory where it cannot."""
    offset, left = tensor.offset, tensor.n_bytes
    copy_range = getattr(os, "copy_file_range", None)  # Linux
    while left and copy_range is not None:
        try:
            copied = copy_range(source, target, min(left, _KERNEL_CHUNK), offset)
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
            break
        if not copied:
            break
        offset += copied
        left -= copied
        meter.add(copied)
    if left:
        assert tensor.path is not None
        for chunk in _read(tensor.path, offset, left):
            meter.add(_write(target, chunk))


def _compare(
    path: Path,
    metadata: Mapping[str, bytes],
    infos: Mapping[str, TensorInfo],
    size: int,
    sums: Mapping[str, int],
) -> None:
    """Raise FileWriteError unless the file holds what was meant."""
    header = read_header(path)
    same = header.tensors == infos and header.file_size == size
    if not same or list(metadata_of(header).items()) != list(metadata.items()):
        raise FileWriteError(
            "The file that was written has another header than was meant. "
            "Check the disk and its file system."
        )
    for name, expected in sums.items():
        total = 0
        for chunk in stored(header, header.tensors[name]).chunks():
            total = zlib.crc32(chunk, total)
        if total != expected:
            raise FileWriteError(
                f"Tensor {name} does not read back as it was written. "
                "Check the disk and its file system."
            )


def _sync_folder(folder: Path) -> None:
    """Bring the rename to the disk, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
