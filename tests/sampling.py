"""The ways of sampling that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import models
import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.intc]
Row = npt.NDArray[np.float32]

# Keyword arguments of a generation.
GREEDY: dict[str, Any] = {"temp": 0.0}
SAMPLED: dict[str, Any] = {"temp": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
BOTH: dict[str, dict[str, Any]] = {"greedy": GREEDY, "top-k-p-min-p": SAMPLED}

# What check_identity can take: everything that is not a Python callback.
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "greedy": {"temp": 0.0},
    "plain-dist": {"temp": -1.0},
    "temp-0.2": {"temp": 0.2},
    "temp-0.7": {"temp": 0.7},
    "temp-1": {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "temp-1.5": {"temp": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "temp-3": {"temp": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "top-k-1": {"top_k": 1},
    "top-k-2": {"top_k": 2, "top_p": 1.0, "min_p": 0.0},
    "top-k-10": {"top_k": 10, "top_p": 1.0, "min_p": 0.0, "temp": 1.3},
    "top-k-vocabulary": {"top_k": 100_000, "top_p": 1.0, "min_p": 0.0},
    "top-p-0": {"top_k": 0, "top_p": 0.0, "min_p": 0.0},
    "top-p-0.5": {"top_k": 0, "top_p": 0.5, "min_p": 0.0},
    "top-p-0.9": {"top_k": 0, "top_p": 0.9, "min_p": 0.0, "temp": 1.2},
    "top-p-0.99": {"top_k": 0, "top_p": 0.99, "min_p": 0.0, "temp": 2.0},
    "min-p-0.02": {"top_k": 0, "top_p": 1.0, "min_p": 0.02, "temp": 1.2},
    "min-p-0.2": {"top_k": 0, "top_p": 1.0, "min_p": 0.2, "temp": 1.5},
    "min-p-1": {"top_k": 0, "top_p": 1.0, "min_p": 1.0},
    "typical-0.2": {"typical_p": 0.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "typical-0.8": {"typical_p": 0.8, "temp": 1.1},
    "typical-0.95": {"typical_p": 0.95, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "repeat-1.1": {"repeat_penalty": 1.1},
    "repeat-1.5": {"repeat_penalty": 1.5, "temp": 1.0},
    "repeat-below-1": {"repeat_penalty": 0.8},
    "greedy-repeat": {"temp": 0.0, "repeat_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.4},
    "frequency-negative": {"frequency_penalty": -0.3, "temp": 1.1},
    "greedy-frequency": {"temp": 0.0, "frequency_penalty": 0.7},
    "presence": {"presence_penalty": 0.6},
    "greedy-presence": {"temp": 0.0, "presence_penalty": 1.2},
    "all-penalties": {
        "repeat_penalty": 1.2,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "temp": 0.9,
    },
    "mirostat-1": {"mirostat_mode": 1},
    "mirostat-1-low": {"mirostat_mode": 1, "mirostat_tau": 1.5, "mirostat_eta": 0.3},
    "mirostat-1-high": {"mirostat_mode": 1, "mirostat_tau": 8.0, "temp": 1.5},
    "mirostat-1-penalties": {"mirostat_mode": 1, "repeat_penalty": 1.3},
    "mirostat-2": {"mirostat_mode": 2},
    "mirostat-2-low": {"mirostat_mode": 2, "mirostat_tau": 1.5, "mirostat_eta": 0.3},
    "mirostat-2-high": {"mirostat_mode": 2, "mirostat_tau": 8.0, "temp": 1.5},
    "mirostat-2-penalties": {"mirostat_mode": 2, "frequency_penalty": 0.3},
    "mirostat-unknown": {"mirostat_mode": 3},
    "kitchen-sink": {
        "top_k": 50,
        "top_p": 0.97,
        "min_p": 0.01,
        "typical_p": 0.97,
        "temp": 1.3,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.1,
    },
    "legacy-arguments": {"tfs_z": 0.9, "penalize_nl": False, "temp": 0.9},
}

GRAMMARS: dict[str, str] = {
    "letters": 'root ::= ([a-m] | " ")+',
    "alternating": "root ::= ([aeiou] [^aeiou])+",
    "sentences": 'root ::= (word " ")+\nword ::= [a-z] [a-z]? [a-z]?',
    "bytes": 'root ::= ("é" | "ß" | [a-f])+',
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer"},
        "kind": {"enum": ["yes", "no", "maybe"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "list"],
}


def grammar(source: str) -> Any:
    return llama_cpp.LlamaGrammar.from_string(source, verbose=False)


def processors(*functions: Callable[[Ids, Row], Row]) -> Any:
    return llama_cpp.LogitsProcessorList(functions)


def no_repeats(ids: Ids, row: Row) -> Row:
    """Forbid the latest six tokens, in a new array."""
    row = row.copy()
    row[ids[-6:]] = -np.inf
    return row


def by_position(ids: Ids, row: Row) -> Row:
    """Prefer words by the length and the sum of the text, in place."""
    row[models.FIRST_WORD + (len(ids) + int(ids.sum())) % models.N_WORDS] += 4.0
    return row


PROCESSORS: dict[str, tuple[Callable[[Ids, Row], Row], ...]] = {
    "one": (no_repeats,),
    "two": (by_position, no_repeats),
    "in-place": (by_position,),
}
