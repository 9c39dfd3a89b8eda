"""Bailing MoE 3: Kimi delta attention and gated latent attention by turns, experts; one head."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import models

from . import stream
from .common import Family, Files, Tensors, dense, experts, write

ARCH = "bailingmoe3"
N_TRUNK = 4
SIZE = 0.6
N_HEAD = 2
STATE = 32  # width of a head of the delta layers
INNER = N_HEAD * STATE
Q_RANK = 32
KV_RANK = 32
ROPE, NOPE = 16, 16  # the parts of a head's key with and without a position
VALUE = 32
SIGMOID = 2


def _delta(rng: np.random.Generator, size: float) -> Tensors:
    block: Tensors = {
        "ssm_f_a.weight": dense(rng, INNER, stream.N_EMBD),
        "ssm_beta.weight": dense(rng, N_HEAD, stream.N_EMBD),
        "ssm_a": rng.uniform(0.5, 1.0, (N_HEAD, 1)),
        "ssm_dt.bias": rng.normal(-4, 0.5, INNER),  # forgets slowly
        "ssm_g_a.weight": dense(rng, INNER, stream.N_EMBD),
        "ssm_norm.weight": np.ones(STATE),
        "attn_output.weight": stream.into_stream(dense(rng, stream.N_EMBD, INNER, size)),
    }
    for part in "qkv":
        block[f"attn_{part}.weight"] = dense(rng, INNER, stream.N_EMBD)
        block[f"ssm_conv1d_{part}.weight"] = rng.normal(0, 0.7, (1, INNER, 1, stream.CONV))
    return block


def _latent(rng: np.random.Generator, size: float) -> Tensors:
    return {
        "attn_q_a.weight": dense(rng, Q_RANK, stream.N_EMBD),
        "attn_q_a_norm.weight": np.ones(Q_RANK),
        "attn_q_b.weight": dense(rng, N_HEAD * (NOPE + ROPE), Q_RANK, 2.0),
        "attn_kv_a_mqa.weight": dense(rng, KV_RANK + ROPE, stream.N_EMBD),
        "attn_kv_a_norm.weight": np.ones(KV_RANK),
        "attn_k_b.weight": experts(rng, N_HEAD, KV_RANK, NOPE, 2.0),
        "attn_v_b.weight": experts(rng, N_HEAD, VALUE, KV_RANK),
        "attn_gate.weight": dense(rng, N_HEAD, stream.N_EMBD),
        "attn_output.weight": stream.into_stream(
            dense(rng, stream.N_EMBD, N_HEAD * VALUE, 2 * size)
        ),
    }


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    recurrent = [il % 2 == 0 and il < N_TRUNK for il in range(N_TRUNK + n_heads)]
    for il, delta in enumerate(recurrent):
        block = _delta(rng, 2 * SIZE) if delta else _latent(rng, SIZE)
        block["attn_norm.weight"] = block["ffn_norm.weight"] = np.ones(stream.N_EMBD)
        block |= stream.mlp(rng, SIZE) if il == 0 else stream.moe(rng, SIZE)
        if il >= N_TRUNK:
            block |= stream.nextn(rng)
            block["layer_output_norm.weight"] = block.pop("nextn.shared_head_norm.weight")
        tensors |= stream.prefixed(il, block)
    keys = {
        **stream.keys(N_TRUNK, n_heads, moe=True),
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": True,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": [0 if delta else 1 for delta in recurrent],
        "attention.q_lora_rank": Q_RANK,
        "attention.kv_lora_rank": KV_RANK,
        "attention.key_length": KV_RANK + ROPE,
        "attention.value_length": KV_RANK,
        "attention.key_length_mla": NOPE + ROPE,
        "attention.value_length_mla": VALUE,
        "rope.dimension_count": ROPE,
        "ssm.conv_kernel": stream.CONV,
        "kda.head_dim": STATE,
        "kda.gate_lower_bound": -5.0,
    }
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, keys, tensors)
    return Files(path)


FAMILY = Family(ARCH, build)
