"""Nemotron-H MoE: Mamba 2, attention without positions and experts, one of them a block; one head.

The head's block has both, attention and experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, Tensors, dense, write

ARCH = "nemotron_h_moe"
SIZE = 0.5
TRUNK = ("mamba", "attention", "moe", "mamba", "moe")
N_TRUNK = len(TRUNK)
INNER = 64
N_SSM_HEAD = 4
N_GROUP = 2
STATE = 16
CONV_WIDTH = INNER + 2 * N_GROUP * STATE


def _mamba(rng: np.random.Generator, size: float) -> Tensors:
    return {
        "ssm_in.weight": dense(rng, INNER + CONV_WIDTH + N_SSM_HEAD, stream.N_EMBD),
        "ssm_conv1d.weight": rng.normal(0, 0.7, (CONV_WIDTH, stream.CONV)),
        "ssm_conv1d.bias": rng.normal(0, 0.1, CONV_WIDTH),
        "ssm_dt.bias": rng.normal(0, 0.5, N_SSM_HEAD),
        "ssm_a": -rng.uniform(0.02, 0.3, (N_SSM_HEAD, 1)),
        "ssm_d": rng.normal(1, 0.2, (N_SSM_HEAD, 1)),
        "ssm_norm.weight": np.ones((N_GROUP, INNER // N_GROUP)),
        "ssm_out.weight": stream.into_stream(dense(rng, stream.N_EMBD, INNER, size)),
    }


def _moe(rng: np.random.Generator, size: float) -> Tensors:
    block = stream.moe(rng, size)
    for name in ("ffn_gate_exps.weight", "ffn_gate_shexp.weight"):  # squared ReLU, not gated
        del block[name]
    return block


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il, kind in enumerate(TRUNK):
        block: Tensors = {"attn_norm.weight": np.ones(stream.N_EMBD)}
        if kind == "mamba":
            block |= _mamba(rng, SIZE)
        elif kind == "attention":
            block |= stream.attention(rng, SIZE, normed=False)
        else:
            block |= _moe(rng, SIZE)
        tensors |= stream.prefixed(il, block)
    for il in range(N_TRUNK, N_TRUNK + n_heads):
        block = stream.attention(rng, SIZE, normed=False) | _moe(rng, SIZE) | stream.nextn(rng)
        block["post_attention_norm.weight"] = np.ones(stream.N_EMBD)
        tensors |= stream.prefixed(il, block)
    has_attention = [kind == "attention" for kind in TRUNK] + [True] * n_heads
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "feed_forward_length": [stream.N_FF * (kind == "moe") for kind in TRUNK]
        + [stream.N_FF] * n_heads,
        "attention.head_count_kv": [stream.N_HEAD_KV * has for has in has_attention],
        "attention.layer_norm_epsilon": 1e-6,
        "expert_shared_feed_forward_length": stream.N_FF_EXP,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "ssm.conv_kernel": stream.CONV,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": N_SSM_HEAD,
        "ssm.group_count": N_GROUP,
    }
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
