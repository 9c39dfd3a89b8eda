"""DeepSeek V2 and V3, GLM-4.7-Flash: latent attention over everything, routed experts."""

from __future__ import annotations

from pathlib import Path

from . import mla
from .common import Family, Files

ARCH = "deepseek2"


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model; the host executes one head."""
    assert n_heads == 1
    return mla.build(folder, ARCH, seed)


FAMILY = Family(ARCH, build)
