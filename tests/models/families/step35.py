"""Step 3.5: windows, a gate per attention head, partial RoPE; one to three chained heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, dense, write

ARCH = "step35"
N_TRUNK = 3
SIZE = 0.9
WINDOW = 32


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    n_layer = N_TRUNK + n_heads
    tensors = stream.outer(words)
    for il in range(n_layer):
        block = stream.attention(rng, SIZE)
        block["attn_gate.weight"] = dense(rng, stream.N_HEAD, stream.N_EMBD)
        block["ffn_norm.weight"] = np.ones(stream.N_EMBD)
        block |= stream.mlp(rng, SIZE) if il == 0 else stream.moe(rng, SIZE)
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "expert_shared_feed_forward_length": stream.N_FF_EXP,
        "expert_weights_norm": True,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": [il % 2 == 1 for il in range(n_layer)],
        "rope.freq_base_swa": 5000.0,
    }
    path = folder / f"{ARCH}-{n_heads}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build, max_heads=3)
