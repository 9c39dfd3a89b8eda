"""A generation: everything that belongs to one text in the making."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from .stats import SpecStats


@dataclass(eq=False)
class Generation:
    """The record that travels from ``generate`` through the session, and back for every token.

    An object can have several under way. The session takes up the one whose turn it is, whole.

    Attributes:
        chain: the host's sampler chain, kept alive here.
        address: of the chain, a cffi ``void *``.
        sampling: way of sampling; acceptance is counted apart for each.
        text: tokens that the target holds when this generation goes on: prompt and emitted ones.
        end: positions that the text is to have; nothing is drafted beyond them.
        stats: what this generation's rounds did.
    """

    chain: Any
    address: Any
    sampling: Hashable
    text: list[int] = field(default_factory=list)
    end: int = 0
    stats: SpecStats = field(default_factory=SpecStats)
