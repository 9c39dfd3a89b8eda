"""Qwen3.5 and 3.6: gated delta nets and gated attention by turns; one head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import models

from . import stream
from .common import Family, Files, Tensors, dense, write

ARCH = "qwen35"
N_TRUNK = 4
SIZE = 1.0
N_KEY_HEAD, N_VALUE_HEAD = 2, 4
STATE = 16  # width of a head's state
VALUE_WIDTH = N_VALUE_HEAD * STATE
CONV_WIDTH = 2 * N_KEY_HEAD * STATE + VALUE_WIDTH


def keys() -> dict[str, Any]:
    """Return what the dense and the MoE architecture have in common."""
    return {
        "rope.dimension_sections": [2, 1, 1, 0],
        "rope.dimension_count": stream.HEAD_DIM // 2,
        "full_attention_interval": 2,
        "ssm.conv_kernel": stream.CONV,
        "ssm.inner_size": VALUE_WIDTH,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": N_VALUE_HEAD,
        "ssm.group_count": N_KEY_HEAD,
    }


def mixer(rng: np.random.Generator, il: int, size: float) -> Tensors:
    """Return what mixes tokens in block ``il``: a delta net that forgets slowly, or attention."""
    norms = {"post_attention_norm.weight": np.ones(stream.N_EMBD)}
    if il % 2 == 1 or il >= N_TRUNK:
        return stream.attention(rng, size, gated=True) | norms
    return norms | {
        "attn_norm.weight": np.ones(stream.N_EMBD),
        "attn_qkv.weight": dense(rng, CONV_WIDTH, stream.N_EMBD),
        "attn_gate.weight": dense(rng, VALUE_WIDTH, stream.N_EMBD),
        "ssm_conv1d.weight": rng.normal(0, 0.7, (CONV_WIDTH, stream.CONV)),
        "ssm_dt.bias": rng.normal(0, 0.5, N_VALUE_HEAD),
        "ssm_a": -rng.uniform(0.02, 0.3, N_VALUE_HEAD),
        "ssm_beta.weight": dense(rng, N_VALUE_HEAD, stream.N_EMBD),
        "ssm_alpha.weight": dense(rng, N_VALUE_HEAD, stream.N_EMBD),
        "ssm_norm.weight": np.ones(STATE),
        "ssm_out.weight": stream.into_stream(dense(rng, stream.N_EMBD, VALUE_WIDTH, size)),
    }


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(N_TRUNK + n_heads):
        block = mixer(rng, il, SIZE) | stream.mlp(rng, SIZE)
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, {**stream.keys(N_TRUNK, n_heads), **keys()}, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
