"""Cohere 2 MoE: parallel attention and experts, sliding windows without position-free layers' RoPE,
layer norms with a mean; one head."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, write

ARCH = "cohere2moe"
N_TRUNK = 3
SIZE = 1.1
WINDOW = 32


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(N_TRUNK + n_heads):
        block = stream.attention(rng, SIZE, normed=False)
        block |= stream.mlp(rng, SIZE) if il == 0 else stream.moe(rng, SIZE, bias="")
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "attention.layer_norm_epsilon": 1e-6,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": [il % 2 == 1 for il in range(N_TRUNK)]
        + [False] * n_heads,
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
        "logit_scale": 1.0,
    }
    del keys["attention.layer_norm_rms_epsilon"]
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
