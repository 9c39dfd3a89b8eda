"""Storing a tensor in another type, rows at a time.

The host quantises (`ggml_quantize_chunk` knows every type that it can run); the `gguf` package
reads the source types back to floats.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import ModelFileError
from .types import BLOCKS, F16, NUMBERS, Q8_0
from .write import CHUNK, Chunk, TensorSource

Floats = npt.NDArray[np.float32]

TYPES: dict[str, int] = {
    name: NUMBERS[name]
    for name in ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0"]
}
"""Types that matrices can be stored in, by name: those that need no importance matrix."""


def type_number(name: str) -> int:
    """Return the number of a type in `TYPES`; ValueError names them all."""
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise ValueError(f"Unknown tensor type {name!r}; use one of {', '.join(TYPES)}.") from None


def is_matrix(tensor: TensorSource) -> bool:
    """Whether a type asked for applies: to matrices, but not to norms, routers and tables of ids.

    Those are small, and what they decide is spoilt by little noise.
    """
    small = ("norm", "ffn_gate_inp", "tid2eid", "hc_", "indexer", "conv1d", "_ape.")
    return (
        len(tensor.shape) > 1
        and tensor.name.endswith(".weight")
        and not any(part in tensor.name for part in small)
    )


def type_for(tensor: TensorSource, wanted: int) -> int:
    """Return the type a tensor will have: ``wanted``, or the fallback that its rows divide into."""
    # Where the rows are no multiple of the block: the next that keeps more.
    kinds = (wanted, Q8_0, F16)
    return next(kind for kind in kinds if tensor.shape[0] % BLOCKS[kind][0] == 0)


def requantize(tensor: TensorSource, wanted: int) -> TensorSource:
    """Return the tensor as a source in the type ``wanted`` (or its fallback, see `type_for`).

    What is no matrix (`is_matrix`), and what has the type already, is returned as it is.

    Raises:
        ModelFileError: the present type cannot be read, or (from ``chunks``) a value is not finite
            or does not fit into the type.
    """
    if not is_matrix(tensor):
        return tensor
    kind = type_for(tensor, wanted)
    if kind == tensor.type:
        return tensor
    block, size = BLOCKS[kind]

    def chunks() -> Iterator[Chunk]:
        quantize = _host_quantizer()
        for values in rows_of(tensor):
            yield quantize(_fit(values, kind, tensor.name), kind)

    n_bytes = prod(tensor.shape) // block * size
    return replace(tensor, type=kind, n_bytes=n_bytes, chunks=chunks, path=None, offset=0)


def rows_of(tensor: TensorSource) -> Iterator[Floats]:
    """Stream a tensor as float32 of shape (some rows, ``tensor.shape[0]``).

    Raises:
        ModelFileError: its type cannot be turned into floats.
    """
    if tensor.type not in BLOCKS:
        raise ModelFileError(f"Tensor {tensor.name} has the unknown ggml type {tensor.type}.")
    block, size = BLOCKS[tensor.type]
    row, row_bytes = tensor.shape[0], tensor.shape[0] // block * size
    at_once = max(1, CHUNK // (4 * row))  # rows
    try:
        for data in _regroup(tensor.chunks(), row_bytes * at_once):
            raw = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
            yield dequantize(raw, GGMLQuantizationType(tensor.type))
    except (NotImplementedError, ValueError) as error:
        raise ModelFileError(
            f"Tensor {tensor.name} cannot be read as numbers: {error}. "
            "Keep its type, or use a head in F16 or BF16."
        ) from error


def _regroup(chunks: Iterator[Chunk], n_bytes: int) -> Iterator[bytes]:
    """Cut a stream into pieces of ``n_bytes``; the last may be shorter."""
    waiting = bytearray()
    for chunk in chunks:
        waiting += memoryview(chunk).cast("B")
        while len(waiting) >= n_bytes:
            yield bytes(waiting[:n_bytes])
            del waiting[:n_bytes]
    if waiting:
        yield bytes(waiting)


def _fit(values: Floats, kind: int, name: str) -> Floats:
    # The host's K-quants search over what they are given; they are not made for infinities.
    if not np.isfinite(values).all():
        raise ModelFileError(
            f"Tensor {name} has values that are not finite. Convert or download it again."
        )
    if kind == F16 and np.abs(values).max(initial=0) > 65504:
        raise ModelFileError(f"Tensor {name} has values beyond the range of F16. Use BF16.")
    return np.ascontiguousarray(values)


@cache
def _host_quantizer() -> Callable[[Floats, int], Chunk]:
    from .. import host  # loads llama_cpp: only where it is needed

    prototype = ctypes.CFUNCTYPE(
        ctypes.c_size_t,
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),  # type, source, destination
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),  # start, rows, values in a row
        ctypes.c_void_p,  # importance of the columns
    )
    convert: Any = prototype(host.address_of("ggml_quantize_chunk"))

    def quantize(values: Floats, kind: int) -> Chunk:
        block, size = BLOCKS[kind]
        out = np.empty(values.size // block * size, np.uint8)
        n_rows, row = values.shape
        written = convert(kind, values.ctypes.data, out.ctypes.data, 0, n_rows, row, None)
        if written != out.size:
            raise ModelFileError(
                f"The host wrote {written} bytes of ggml type {kind} where {out.size} were "
                "expected. Use another type, or keep the head's."
            )
        return out.data

    return quantize
