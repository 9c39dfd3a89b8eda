"""Qwen3-Next: the mixers and experts of Qwen3.5, and a state without snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, Tensors, dense, write
from .qwen35 import N_TRUNK, N_VALUE_HEAD, keys, mixer

ARCH = "qwen3next"
SIZE = 0.75


def block_of(rng: np.random.Generator, il: int) -> Tensors:
    """Return block ``il``: beta and alpha of a delta net are one matrix here."""
    block = mixer(rng, il, SIZE) | stream.moe(rng, SIZE, bias="")
    block["ffn_gate_inp_shexp.weight"] = dense(rng, 1, stream.N_EMBD)[0]
    if block.pop("ssm_beta.weight", None) is not None:
        del block["ssm_alpha.weight"]
        block["ssm_ba.weight"] = dense(rng, 2 * N_VALUE_HEAD, stream.N_EMBD)
    return block


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(N_TRUNK + n_heads):
        block = block_of(rng, il)
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    more = {"expert_shared_feed_forward_length": stream.N_FF_EXP, **keys()}
    del more["rope.dimension_sections"]
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, {**stream.keys(N_TRUNK, n_heads, moe=True), **more}, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
