"""What the constructed families share: the vocabulary, random matrices, and the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import models

N_VOCAB = models.N_VOCAB
N_CTX_TRAIN = models.N_CTX_TRAIN

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Files:
    """A written model. ``draft`` is a second file where the head is a model of its own."""

    path: Path
    draft: Path | None = None


@dataclass(frozen=True)
class Family:
    """How to write a tiny model with random weights of one architecture.

    Attributes:
        arch: ``general.architecture`` of the file that has the NextN graph.
        build: ``build(folder, n_heads, seed)`` writes the file or files into a folder.
        max_heads: NextN blocks that the host can execute.
    """

    arch: str
    build: Callable[[Path, int, int], Files]
    max_heads: int = 1


def dense(
    rng: np.random.Generator, n_out: int, n_in: int, size: float = 1.0
) -> npt.NDArray[np.float64]:
    """A matrix that keeps the size of a random input, times ``size``; numpy order (out, in)."""
    return rng.normal(0, size / np.sqrt(n_in), (n_out, n_in))


def experts(
    rng: np.random.Generator, n: int, n_out: int, n_in: int, size: float = 1.0
) -> npt.NDArray[np.float64]:
    """As `dense`, one matrix per expert; numpy order (expert, out, in)."""
    return rng.normal(0, size / np.sqrt(n_in), (n, n_out, n_in))


def write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a GGUF in F32 with the tests' vocabulary.

    ``keys`` go under ``{arch}.``; an int is written as uint32, a float as float32, a list as an
    array of its elements' type. A name that already has a dot in front (``.x.y``) is written
    without the prefix.
    """
    part = path.with_suffix(".part")
    w = gguf.GGUFWriter(part, arch)
    w.add_name(f"constructed {arch}")
    for name, value in keys.items():
        key = name[1:] if name.startswith(".") else f"{arch}.{name}"
        if isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, int):
            w.add_uint32(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif isinstance(value, str):
            w.add_string(key, value)
        else:
            w.add_array(key, list(value))
    models._add_vocabulary(w)
    for name, tensor in tensors.items():
        w.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(part, path)
