"""Reads tensors out of a folder of safetensors files, a few rows at a time.

A shard is a length, a JSON header and raw data. Every number in the header is compared with the
size of the file before it is believed, and only shards whose tensors are asked for are opened: a
damaged or hostile folder ends in `ModelFileError`. The files are read and not mapped, so that
memory stays at what one call returns, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...errors import ModelFileError

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
        **{"F8_E8M0": ml_dtypes.float8_e8m0fnu, "BOOL": "u1"},
        **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
        **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
    }.items()
}
"""safetensors type: the numpy type of its values."""

# The largest files of today's largest checkpoints: a tokenizer of 33 MB, an index of 15 MB, a
# header of 1 MB. JSON takes several times its size once it is read.
_MAX_JSON = 2**26
_MAX_HEADER = 2**24


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelFileError: it is missing, too large, or no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise ModelFileError(
                f"{path} has {size} bytes, more than such a file can have. Download it again."
            )
        return _object(path.read_bytes(), path)
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read: {error.strerror or error}. Download it again."
        ) from error


def _object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is damaged: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is damaged: it holds no JSON object. Download it again.")
    return value


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard.

    Attributes:
        name: as in the checkpoint.
        dtype: safetensors type, a key of `DTYPES`.
        shape: numpy order, the contiguous dimension last.
        path: the shard.
        offset: bytes from the start of the shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def n_rows(self) -> int:
        """Rows, all leading dimensions taken as one; 1 for a vector or a scalar."""
        return prod(self.shape[:-1])

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    def read(self, first: int = 0, last: int | None = None) -> Array:
        """Return rows ``first`` to ``last`` (the end), ``[rows, columns]``.

        Raises:
            ModelFileError: the file got shorter, or cannot be read any more.
        """
        last = self.n_rows if last is None else last
        kind = DTYPES[self.dtype]
        count = (last - first) * self.n_columns
        start = self.offset + first * self.n_columns * kind.itemsize
        try:
            values = np.fromfile(self.path, kind, count, offset=start)
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error}.") from error
        if len(values) != count:
            raise ModelFileError(f"{self.path} ends inside {self.name}. Download it again.")
        return values.reshape(last - first, self.n_columns)


class Checkpoint:
    """A folder of safetensors files: which tensors it has, and where.

    Names are those of the checkpoint, without the ``language_model.`` of multimodal models, and
    ``mtp.`` for ``model.mtp.``: both are spelt either way in checkpoints of one family.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the index of the folder, or the headers of its files.

        Raises:
            ModelFileError: there are no safetensors files, or one that is listed is damaged.
        """
        self.folder = Path(folder)
        self._shards: dict[str, dict[str, StoredTensor]] = {}
        self._place: dict[str, tuple[str, str]] = {}  # plain name: (shard, name in it)
        index = self.folder / "model.safetensors.index.json"
        listed = self._read_index(index) if index.is_file() else set()
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in listed:  # all of them without an index; else a head of its own
                for name in self._shard(path.name):
                    self._place.setdefault(_plain(name), (path.name, name))
        if not self._place:
            raise ModelFileError(
                f"{self.folder} holds no safetensors files. Pass the folder of a checkpoint: "
                "config.json and its *.safetensors."
            )

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def require(self, prefixes: tuple[str, ...]) -> None:
        """Raise ModelFileError naming all shards that are not there and hold such tensors."""
        shards = {shard for name, (shard, _) in self._place.items() if name.startswith(prefixes)}
        if missing := sorted(s for s in shards if not (self.folder / s).is_file()):
            raise ModelFileError(
                f"{self.folder} lacks {', '.join(missing)}, with tensors of the MTP head. Download "
                f"{'these files' if len(missing) > 1 else 'this file'}."
            )

    def tensor(self, name: str) -> StoredTensor:
        """Find a tensor.

        Raises:
            ModelFileError: the checkpoint lacks it, its shard is missing or damaged, or it is
                empty.
        """
        if name not in self._place:
            raise ModelFileError(f"{self.folder} lacks the tensor {name}. Download it again.")
        shard, spelling = self._place[name]
        tensors = self._shard(shard)
        if spelling not in tensors:
            raise ModelFileError(
                f"{self.folder / shard} lacks {spelling}, which the index says it holds. Download "
                "both again."
            )
        if not prod(tensors[spelling].shape):
            raise ModelFileError(
                f"{self.folder / shard} has {spelling} without values. Download it again."
            )
        return tensors[spelling]

    def _read_index(self, path: Path) -> set[str]:
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict):
            raise ModelFileError(f"{path} is damaged: it has no weight_map. Download it again.")
        for name, shard in places.items():
            # A plain file name: an index must not lead out of its folder.
            if not _names_a_file(shard):
                raise ModelFileError(
                    f"{path} is damaged: it puts {name} into {shard!r}, which is no name of a file "
                    "in this folder. Download it again."
                )
            self._place[_plain(name)] = (shard, name)
        return set(places.values())

    def _shard(self, name: str) -> dict[str, StoredTensor]:
        if name not in self._shards:
            self._shards[name] = _read_shard(self.folder / name)
        return self._shards[name]


def _names_a_file(text: Any) -> bool:
    if not isinstance(text, str) or text in ("", "..") or "\0" in text:
        return False
    try:
        os.fsencode(text)  # half of a surrogate pair is text in JSON and no name
    except UnicodeEncodeError:
        return False
    return Path(text).name == text


def _plain(name: str) -> str:
    name = name.replace("language_model.", "")
    return name[len("model.") :] if name.startswith("model.mtp.") else name


def _read_shard(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ModelFileError(
                    f"{path} is truncated or damaged: its header would need {length} bytes of "
                    f"{size}. Download it again."
                )
            header = _object(file.read(length), path)
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    data = 8 + length
    return {
        name: _stored(name, entry, path, data, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _stored(name: str, entry: Any, path: Path, data: int, size: int) -> StoredTensor:
    """Check one entry of a header; ``data`` is where the shard's data starts, ``size`` its end."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    sound = (
        isinstance(dtype, str)
        and _naturals(shape)
        and len(shape) <= 8
        and _naturals(place)
        and len(place) == 2
        and place[0] <= place[1] <= size - data
    )
    if sound and dtype in DTYPES:
        sound = place[1] - place[0] == prod(shape) * DTYPES[dtype].itemsize
    if not sound:
        raise ModelFileError(
            f"{path} is truncated or damaged: the header's entry of {name!r} does not fit the "
            "file. Download it again."
        )
    assert isinstance(dtype, str)
    return StoredTensor(name, dtype, tuple(shape), path, data + place[0])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
