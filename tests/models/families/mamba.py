"""Mamba: a trunk that is recurrent and nothing else, without a head; for drafts from elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import N_CTX_TRAIN, Files, Tensors, dense, write

ARCH = "mamba"
N_TRUNK = 3
SIZE = 1.0
INNER = 2 * stream.N_EMBD
STATE, RANK = 16, 8


def mixer(rng: np.random.Generator) -> Tensors:
    """Return a selective state space whose channels forget at rates of their own."""
    return {
        "attn_norm.weight": np.ones(stream.N_EMBD),
        "ssm_in.weight": dense(rng, 2 * INNER, stream.N_EMBD),
        "ssm_conv1d.weight": rng.normal(0, 0.7, (INNER, stream.CONV)),
        "ssm_conv1d.bias": rng.normal(0, 0.1, INNER),
        "ssm_x.weight": dense(rng, RANK + 2 * STATE, INNER),
        "ssm_dt.weight": dense(rng, INNER, RANK),
        "ssm_dt.bias": rng.normal(-2.0, 0.5, INNER),
        "ssm_a": -rng.uniform(0.1, 1.0, (INNER, STATE)),
        "ssm_d": rng.normal(0, 0.5, INNER),
        "ssm_out.weight": stream.into_stream(dense(rng, stream.N_EMBD, INNER, SIZE)),
    }


def build(folder: Path, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    tensors = stream.outer(models.lay_out_words(rng, sharpness=1.5))
    for il in range(N_TRUNK):
        tensors |= stream.prefixed(il, mixer(rng))
    path = folder / f"{ARCH}.gguf"
    keys = {
        "context_length": N_CTX_TRAIN,
        "embedding_length": stream.N_EMBD,
        "block_count": N_TRUNK,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "ssm.conv_kernel": stream.CONV,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": RANK,
    }
    write(path, ARCH, keys, tensors)
    return Files(path)
