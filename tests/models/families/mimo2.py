"""MiMo 2: sliding windows with attention sinks, experts; one to three chained, dense heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, write

ARCH = "mimo2"
N_TRUNK = 3
SIZE = 1.0
WINDOW = 32


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    n_layer = N_TRUNK + n_heads
    slides = [il % 2 == 1 or il >= N_TRUNK for il in range(n_layer)]
    tensors = stream.outer(words)
    for il in range(n_layer):
        block = stream.attention(rng, SIZE, normed=False)
        block["ffn_norm.weight"] = np.ones(stream.N_EMBD)
        if slides[il]:
            block["attn_sinks.weight"] = rng.normal(0, 0.5, stream.N_HEAD)
        if il in (0, *range(N_TRUNK, n_layer)):
            block |= stream.mlp(rng, SIZE)
        else:
            block |= stream.moe(rng, SIZE, shared=False)
        if il >= N_TRUNK:  # the host's graph of a head knows only the fused form
            parts = [block.pop(f"attn_{part}.weight") for part in "qkv"]
            block["attn_qkv.weight"] = np.concatenate(parts)
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": slides,
        "attention.value_scale": 0.8,
        "rope.freq_base_swa": 5000.0,
        "rope.dimension_count": stream.HEAD_DIM // 2,
    }
    path = folder / f"{ARCH}-{n_heads}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build, max_heads=3)
