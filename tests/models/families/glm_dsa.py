"""GLM with sparse attention: as DeepSeek V3.2, but a layer may use the picks of one before it."""

from __future__ import annotations

from pathlib import Path

from . import mla
from .common import Family, Files

ARCH = "glm-dsa"
OWN, SHARED = 1, 0  # does a layer have an indexer of its own?


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model; the host executes one head, whose own attention is dense."""
    assert n_heads == 1
    types = [OWN, SHARED, OWN]
    return mla.build(
        folder,
        ARCH,
        seed,
        n_trunk=len(types),
        sparse=True,
        more_keys={"attention.indexer.types": types},
    )


FAMILY = Family(ARCH, build)
