"""Tensors of a checkpoint as they go into a GGUF: runs of rows, converted while they are written.

A `Weight` is one tensor of the checkpoint, whose FP8 is decoded as it is read. A `Tensor` is one
of the GGUF: rows of one or more weights, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from ...errors import ModelFileError
from ...gguf.write import CHUNK, TensorSource
from .safetensors import StoredTensor

Array = npt.NDArray[Any]
Shape = tuple[int, ...]  # numpy order here: the contiguous dimension last

F32, F16, BF16 = (int(GGMLQuantizationType[name]) for name in ("F32", "F16", "BF16"))

TYPES = {"F32": F32, "F16": F16, "BF16": BF16, "F8_E4M3": BF16, "F8_E5M2": BF16}
"""safetensors type to the number of the ggml type that it becomes; others cannot be read."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint, with its scales if it is FP8.

    Attributes:
        stored: where it is.
        scales: F32, [blocks of rows, blocks of columns]; those of each group of rows follow on
            those of the group before. None if the values stand for themselves.
        block: rows and columns that share a scale.
        group: rows after which the blocks start anew.
    """

    stored: StoredTensor
    scales: Array | None = None
    block: tuple[int, int] = (1, 1)
    group: int = 1

    @property
    def type(self) -> int:
        return TYPES[self.stored.dtype]

    def read(self, first: int, last: int) -> Array:
        """Return rows, ``[rows, columns]``: F32, F16, or the bits of BF16 as uint16."""
        values = self.stored.read(first, last)
        if self.scales is None:
            return values
        rows = np.arange(first, last)
        blocks = rows // self.group * -(-self.group // self.block[0])
        blocks += rows % self.group // self.block[0]
        scales = np.repeat(self.scales[blocks], self.block[1], axis=1)
        decoded = _fp8(values, self.stored.dtype)
        with np.errstate(all="ignore"):  # what is infinite or no number stays so
            decoded *= scales[:, : values.shape[1]]
        return _to_bf16(decoded)


def _fp8(bits: Array, dtype: str) -> Array:
    """Decode FP8 to F32."""
    if dtype == "F8_E5M2":  # the upper half of an F16
        return (bits.astype("<u2") << 8).view("<f2").astype("<f4")
    return _E4M3.take(bits)


def _e4m3_values() -> Array:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(
        exponent == 0,
        np.ldexp(fraction / 8, -6),
        np.ldexp(1 + fraction / 8, exponent - 7),
    )
    size[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, size, -size).astype("<f4")


_E4M3 = _e4m3_values()


def _to_bf16(values: Array) -> Array:
    """Round F32 to the bits of BF16, ties to even; the quiet NaNs of FP8 stay such."""
    bits = values.view("<u4")
    bits = bits + ((bits >> 16 & 1) + np.uint32(0x7FFF))
    return (bits >> 16).astype("<u2")


@dataclass(frozen=True)
class Run:
    """Rows ``first`` to ``last`` of a tensor of the checkpoint."""

    weight: Weight
    first: int
    last: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the block: runs of rows, one below the other, each converted by ``convert``.

    Attributes:
        shape: numpy order.
        type: number of the ggml type of what ``convert`` returns.
        runs: never empty; all weights have the same type.
        convert: maps ``[rows, columns]`` to the values that are written.
        whole: ``convert`` needs each run in one piece.
    """

    shape: Shape
    type: int
    runs: tuple[Run, ...]
    convert: Callable[[Array], Array] = lambda values: values
    whole: bool = False

    def chunks(self) -> Iterator[bytes]:
        """Read and convert the tensor, whole rows at a time, some 8 MB each."""
        for run in self.runs:
            # F32 is the largest that a value becomes on its way.
            step = max(1, CHUNK // (4 * run.weight.stored.n_columns))
            if self.whole:
                step = run.last - run.first
            for first in range(run.first, run.last, step):
                values = run.weight.read(first, min(first + step, run.last))
                yield self.convert(values).tobytes()


def source_of(name: str, tensor: Tensor) -> TensorSource:
    """Return a tensor in the form in which files are written."""
    size = prod(tensor.shape) * (4 if tensor.type == F32 else 2)
    return TensorSource(name, tensor.shape[::-1], tensor.type, size, tensor.chunks)


def to_f32(kind: int, more: float = 0.0) -> Callable[[Array], Array]:
    """Return what turns stored values of a ggml type into F32, and adds ``more`` to them."""

    def convert(values: Array) -> Array:
        if kind == BF16:
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype("<f4") + np.float32(more) if more else values.astype("<f4")

    return convert


def transpose(values: Array) -> Array:
    """Turn ``[rows, columns]`` into ``[columns, rows]``."""
    return values.T


def scales_of(stored: StoredTensor) -> Array:
    """Read the scales of an FP8 tensor: F32, ``[rows, columns]``."""
    if stored.dtype == "F8_E8M0":
        return np.ldexp(np.float32(1), stored.read().astype(np.int32) - 127)
    if stored.dtype not in ("F32", "F16", "BF16"):
        raise ModelFileError(
            f"{stored.path} has {stored.name} as {stored.dtype}, where F32 is needed. Download it "
            "again."
        )
    return to_f32(TYPES[stored.dtype])(stored.read())
