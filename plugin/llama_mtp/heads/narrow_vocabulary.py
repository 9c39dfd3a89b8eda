"""The vocabulary of a head that has only a part of its model's tokens: what `narrow` writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ModelFileError
from ..gguf.header import ArrayInfo
from ..gguf.model import Gguf
from ..gguf.types import ValueType
from .check import NARROW

KEPT, STAND_INS = f"{NARROW}tokens", f"{NARROW}stand_ins"


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


def vocabulary_of(head: Gguf) -> Vocabulary:
    """Read the vocabulary of a narrow head; ModelFileError where the file is none of one."""
    return Vocabulary(_numbers(head, KEPT), _numbers(head, STAND_INS))


def _numbers(head: Gguf, key: str) -> npt.NDArray[np.int32]:
    found = head.metadata.get(key)
    if not isinstance(found, ArrayInfo) or found.type != ValueType.INT32:
        raise ModelFileError(
            f"{head.path} is a narrow head without the list {key}. Write it again with "
            "llama-mtp narrow."
        )
    data = memoryview(head.entry(key))
    return np.frombuffer(data[len(data) - 4 * found.count :], dtype="<i4").astype(np.int32)
