"""Qwen3.5 and 3.6 MoE: the mixers of the dense ones, with experts and a gated shared one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, dense, write
from .qwen35 import N_TRUNK, keys, mixer

ARCH = "qwen35moe"
SIZE = 0.75


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(N_TRUNK + n_heads):
        block = mixer(rng, il, SIZE) | stream.moe(rng, SIZE, bias="")
        block["ffn_gate_inp_shexp.weight"] = dense(rng, 1, stream.N_EMBD)[0]
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    more = {"expert_shared_feed_forward_length": stream.N_FF_EXP, **keys()}
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, {**stream.keys(N_TRUNK, n_heads, moe=True), **more}, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
