"""The vocabulary of a head that has only a part of its model's tokens: what `narrow` writes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ModelFileError
from ..gguf.header import ArrayInfo, Header, read_header
from .check import NARROW

TOKENS, STAND_INS = f"{NARROW}tokens", f"{NARROW}stand_ins"
_INT32 = 5  # gguf.GGUFValueType, without the import of that package


@dataclass(frozen=True)
class Vocabulary:
    """Which of a model's tokens a narrow head has, and what it reads in place of the others.

    Attributes:
        tokens: int32 (n_head,), the model's token that each of the head's is.
        stand_ins: int32 (n_model,), the head's token for each of the model's: itself where the head
            has it.
    """

    tokens: npt.NDArray[np.int32]
    stand_ins: npt.NDArray[np.int32]


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read the vocabulary of a narrow head.

    Raises:
        ModelFileError: the file is no GGUF, is damaged, or is none of a narrow head.
    """
    header = read_header(path)
    return Vocabulary(_numbers(header, TOKENS), _numbers(header, STAND_INS))


def _numbers(header: Header, key: str) -> npt.NDArray[np.int32]:
    found = header.metadata.get(key)
    if not isinstance(found, ArrayInfo) or found.type != _INT32:
        raise ModelFileError(
            f"{header.path} is a narrow head without the list {key}. Write it again with "
            "llama-mtp narrow."
        )
    with header.path.open("rb") as file:
        file.seek(header.entries[key][1] - 4 * found.count)  # the end of its entry
        return np.frombuffer(file.read(4 * found.count), dtype="<i4").astype(np.int32)
