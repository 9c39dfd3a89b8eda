"""GLM-4.5 and 4.6: attention only; a dense block, then experts; one head."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, write

ARCH = "glm4moe"
N_TRUNK = 3
SIZE = 0.9


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(N_TRUNK + n_heads):
        block = stream.attention(rng, SIZE)
        block["post_attention_norm.weight"] = np.ones(stream.N_EMBD)
        block |= stream.mlp(rng, SIZE) if il == 0 else stream.moe(rng, SIZE)
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "rope.dimension_count": stream.HEAD_DIM // 2,
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
    }
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
