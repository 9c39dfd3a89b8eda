"""DeepSeek V3.2: latent attention over the positions that an indexer picks."""

from __future__ import annotations

from pathlib import Path

from . import mla
from .common import Family, Files

ARCH = "deepseek32"


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model; the host executes one head, whose own attention is dense."""
    assert n_heads == 1
    return mla.build(folder, ARCH, seed, sparse=True)


FAMILY = Family(ARCH, build)
