"""Hunyuan 3: attention only, a dense block, then experts; one to three chained heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, write

ARCH = "hy_v3"
N_TRUNK = 2
SIZE = 1.0


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(N_TRUNK + n_heads):
        block = stream.attention(rng, SIZE)
        block["ffn_norm.weight"] = np.ones(stream.N_EMBD)
        block |= stream.mlp(rng, SIZE) if il == 0 else stream.moe(rng, SIZE, bias="exp_probs_b")
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "expert_shared_feed_forward_length": stream.N_FF_EXP,
        "expert_weights_norm": True,
    }
    path = folder / f"{ARCH}-{n_heads}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build, max_heads=3)
