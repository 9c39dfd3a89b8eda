"""Prompt lookup: where the last tokens occurred before, what followed then is the draft."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama_mtp.hooks import Draft, DraftRequest, SpecSettings, SpecType, hookimpl


class PromptLookup:
    """Looks for the longest recent match, of up to `longest` tokens."""

    def __init__(self, settings: SpecSettings, longest: int = 3) -> None:
        self.longest = longest

    def draft(self, request: DraftRequest) -> Draft:
        tokens = request.tokens
        for length in range(min(self.longest, len(tokens) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], length)
            (starts,) = np.nonzero((windows == tokens[-length:]).all(axis=1))
            if len(starts):
                after = int(starts[-1]) + length
                return Draft(tokens[after : after + request.n_max].tolist())
        return Draft()


@hookimpl
def mtp_register_spec_types(register: Callable[[SpecType], None]) -> None:
    register(SpecType("prompt-lookup", PromptLookup))
