"""Tensors of an HF checkpoint as they go into a GGUF: runs of rows, converted while written.

A `Weight` is one tensor of the checkpoint, whose FP8 is decoded as it is read. A `Tensor` is one
of the GGUF: rows of one or more weights, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from ml_dtypes import bfloat16

from ...errors import ModelFileError
from ...gguf.types import BF16, F16, F32
from ...gguf.write import CHUNK, TensorSource
from .safetensors import Array, StoredTensor

Shape = tuple[int, ...]  # numpy order here: the contiguous dimension last

TYPES = {"F32": F32, "F16": F16, "BF16": BF16, "F8_E4M3": BF16, "F8_E5M2": BF16}
"""safetensors type to the number of the ggml type that it becomes; others cannot be read."""
_SCALES = ("F32", "F16", "BF16", "F8_E8M0")


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
        """Return rows, ``[rows, columns]``: F32, F16 or BF16."""
        values = self.stored.read(first, last)
        if self.scales is None:
            return values
        rows = np.arange(first, last)
        blocks = rows // self.group * -(-self.group // self.block[0])
        blocks += rows % self.group // self.block[0]
        scales = np.repeat(self.scales[blocks], self.block[1], axis=1)[:, : values.shape[1]]
        with np.errstate(all="ignore"):  # what is infinite or no number stays so
            return (values.astype(np.float32) * scales).astype(bfloat16)


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

    def source(self, name: str) -> TensorSource:
        """Return it in the form in which files are written."""
        size = prod(self.shape) * (4 if self.type == F32 else 2)
        return TensorSource(name, self.shape[::-1], self.type, size, self.chunks)


def to_f32(values: Array) -> Array:
    """Return values as F32."""
    with np.errstate(all="ignore"):
        return values.astype(np.float32)


def to_f32_and_one(values: Array) -> Array:
    """Return values as F32, with 1 added to each."""
    return to_f32(values) + np.float32(1)


def transpose(values: Array) -> Array:
    """Turn ``[rows, columns]`` into ``[columns, rows]``."""
    return values.T


def scales_of(stored: StoredTensor) -> Array:
    """Read the scales of an FP8 tensor: F32, ``[rows, columns]``."""
    if stored.dtype not in _SCALES:
        raise ModelFileError(
            f"{stored.path} has {stored.name} as {stored.dtype}, where F32 is needed. Download it "
            "again."
        )
    return to_f32(stored.read())
