"""Tiny models of the architectures that may declare a head and have no graph for it.

Each is whole and loads: a trunk with random weights, and behind it the NextN block that the file
format foresees. What these files are for is to be refused, and to run as stock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .common import N_CTX_TRAIN, N_VOCAB, Family, Files, Tensors, dense, experts, write

N_EMBD, N_HEAD, HEAD_DIM, N_FF = 64, 2, 32, 64
N_EXPERT, N_EXPERT_USED = 4, 2
N_TRUNK = 2
WIDTH = N_HEAD * HEAD_DIM

# Multi-head latent attention of dots3note and glm5-next.
ROPE, NOPE, VALUE, Q_RANK, KV_RANK = 16, 32, 32, 32, 48
INDEX_HEADS, INDEX_DIM = 2, 64

_SIZE = 0.25  # of what a block adds to the stream

Rng = np.random.Generator
Block = Callable[[Rng, int], Tensors]  # (random numbers, layer) -> tensors without `blk.N.`


def _ones(*names: str, n: int = N_EMBD) -> Tensors:
    return {f"{name}.weight": np.ones(n) for name in names}


def _attention(rng: Rng) -> Tensors:
    return {
        "attn_q.weight": dense(rng, WIDTH, N_EMBD),
        "attn_k.weight": dense(rng, WIDTH, N_EMBD),
        "attn_v.weight": dense(rng, WIDTH, N_EMBD),
        "attn_output.weight": dense(rng, N_EMBD, WIDTH, _SIZE),
    }


def _fused_attention(rng: Rng) -> Tensors:
    return {
        "attn_qkv.weight": dense(rng, 3 * WIDTH, N_EMBD),
        "attn_output.weight": dense(rng, N_EMBD, WIDTH, _SIZE),
    }


def _mla(rng: Rng, rope: int) -> Tensors:
    return {
        **_ones("attn_q_a_norm", n=Q_RANK),
        **_ones("attn_kv_a_norm", n=KV_RANK),
        "attn_q_a.weight": dense(rng, Q_RANK, N_EMBD),
        "attn_q_b.weight": dense(rng, N_HEAD * (NOPE + rope), Q_RANK),
        "attn_kv_a_mqa.weight": dense(rng, KV_RANK + rope, N_EMBD),
        "attn_k_b.weight": experts(rng, N_HEAD, KV_RANK, NOPE),
        "attn_v_b.weight": experts(rng, N_HEAD, VALUE, KV_RANK),
        "attn_output.weight": dense(rng, N_EMBD, N_HEAD * VALUE, _SIZE),
    }


def _indexer(rng: Rng) -> Tensors:
    return {
        "indexer.k_norm.weight": np.ones(INDEX_DIM),
        "indexer.k_norm.bias": np.zeros(INDEX_DIM),
        "indexer.proj.weight": dense(rng, INDEX_HEADS, N_EMBD),
        "indexer.attn_k.weight": dense(rng, INDEX_DIM, N_EMBD),
        "indexer.attn_q_b.weight": dense(rng, INDEX_HEADS * INDEX_DIM, Q_RANK),
    }


def _dense_ffn(rng: Rng) -> Tensors:
    return {
        "ffn_gate.weight": dense(rng, N_FF, N_EMBD),
        "ffn_up.weight": dense(rng, N_FF, N_EMBD),
        "ffn_down.weight": dense(rng, N_EMBD, N_FF, _SIZE),
    }


def _moe(rng: Rng, gate: bool = True) -> Tensors:
    block: Tensors = {
        "ffn_gate_inp.weight": dense(rng, N_EXPERT, N_EMBD),
        "exp_probs_b.bias": np.zeros(N_EXPERT),
        "ffn_up_exps.weight": experts(rng, N_EXPERT, N_FF, N_EMBD),
        "ffn_down_exps.weight": experts(rng, N_EXPERT, N_EMBD, N_FF, _SIZE),
        "ffn_up_shexp.weight": dense(rng, N_FF, N_EMBD),
        "ffn_down_shexp.weight": dense(rng, N_EMBD, N_FF, _SIZE),
    }
    if gate:
        block["ffn_gate_exps.weight"] = experts(rng, N_EXPERT, N_FF, N_EMBD)
        block["ffn_gate_shexp.weight"] = dense(rng, N_FF, N_EMBD)
    return block


def _nextn(rng: Rng) -> Tensors:
    return {
        "nextn.eh_proj.weight": dense(rng, N_EMBD, 2 * N_EMBD),
        **_ones("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"),
    }


# ---- blocks -------------------------------------------------------------------------------------


def _glm4(rng: Rng, il: int) -> Tensors:
    return {
        **_ones("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
        **_attention(rng),
        "ffn_up.weight": dense(rng, 2 * N_FF, N_EMBD),
        "ffn_down.weight": dense(rng, N_EMBD, N_FF, _SIZE),
    }


def _exaone4(rng: Rng, il: int) -> Tensors:
    return {
        **_ones("post_attention_norm", "post_ffw_norm"),
        **_ones("attn_q_norm", "attn_k_norm", n=HEAD_DIM),
        **_attention(rng),
        **_dense_ffn(rng),
    }


def _exaone_moe(rng: Rng, il: int) -> Tensors:
    return {
        **_ones("attn_norm", "ffn_norm"),
        **_ones("attn_q_norm", "attn_k_norm", n=HEAD_DIM),
        **_attention(rng),
        **(_moe(rng) if il < N_TRUNK else _dense_ffn(rng)),
    }


def _bailingmoe2(rng: Rng, il: int) -> Tensors:
    return {
        **_ones("attn_norm", "ffn_norm"),
        **_ones("attn_q_norm", "attn_k_norm", n=HEAD_DIM),
        **_fused_attention(rng),
        **_moe(rng),
        **(_ones("layer_output_norm") if il >= N_TRUNK else {}),
    }


def _dots3note(rng: Rng, il: int) -> Tensors:
    return {
        **_ones("attn_norm", "ffn_norm"),
        **_ones("attn_k_norm", n=ROPE),
        **_mla(rng, ROPE),
        "attn_gate.weight": dense(rng, N_HEAD, N_EMBD),
        **(_indexer(rng) if il == 0 else {}),
        **(_moe(rng) if il < N_TRUNK else _dense_ffn(rng)),
        **({"nextn.embed_tokens.weight": dense(rng, N_VOCAB, N_EMBD)} if il >= N_TRUNK else {}),
    }


def _glm5_next(rng: Rng, il: int) -> Tensors:
    block = {**_ones("attn_norm", "ffn_norm"), **_moe(rng)}
    if il < N_TRUNK:
        for part in ("attn", "ffn"):
            block[f"hc_{part}_fn.weight"] = dense(rng, 24, 4 * N_EMBD)
            block[f"hc_{part}_base.weight"] = np.zeros(24)
            block[f"hc_{part}_scale.weight"] = np.ones(3)
    if il == 1:  # linear attention
        block |= {f"ssm_conv1d_{x}.weight": rng.normal(0, 0.7, (WIDTH, 1, 4)) for x in "qkv"}
        block |= _attention(rng)
        block |= {
            "ssm_f_a.weight": dense(rng, HEAD_DIM, N_EMBD),
            "ssm_f_b.weight": dense(rng, WIDTH, HEAD_DIM),
            "ssm_beta.weight": dense(rng, N_HEAD, N_EMBD),
            "ssm_a": -rng.uniform(0.02, 0.3, N_HEAD),
            "ssm_dt.bias": rng.normal(0, 0.5, WIDTH),
            "ssm_g_a.weight": dense(rng, HEAD_DIM, N_EMBD),
            "ssm_g_b.weight": dense(rng, WIDTH, HEAD_DIM),
            "ssm_norm.weight": np.ones(HEAD_DIM),
        }
        return block
    return {
        **block,
        **_mla(rng, 0),
        **_indexer(rng),
        "indexer_compressor_gate.weight": dense(rng, INDEX_DIM, N_EMBD),
        "indexer_compressor_ape.weight": dense(rng, 4, INDEX_DIM),
    }


def _nemotron_h(rng: Rng, il: int) -> Tensors:
    if il == 1:  # Mamba 2
        d_state = HEAD_DIM
        return {
            **_ones("attn_norm"),
            "ssm_in.weight": dense(rng, 2 * WIDTH + 2 * d_state + N_HEAD, N_EMBD),
            "ssm_conv1d.weight": rng.normal(0, 0.7, (WIDTH + 2 * d_state, 4)),
            "ssm_conv1d.bias": np.zeros(WIDTH + 2 * d_state),  # without it the host crashes
            "ssm_dt.bias": rng.normal(0, 0.5, N_HEAD),
            "ssm_a": -rng.uniform(0.02, 0.3, (N_HEAD, 1)),
            "ssm_d": np.ones((N_HEAD, 1)),
            "ssm_norm.weight": np.ones((1, WIDTH)),
            "ssm_out.weight": dense(rng, N_EMBD, WIDTH, _SIZE),
        }
    if il < N_TRUNK:
        return {**_ones("attn_norm"), **_attention(rng)}
    return {
        **_ones("attn_norm", "post_attention_norm"),
        **_attention(rng),
        **_moe(rng, gate=False),
    }


def _graniteswitch(rng: Rng, il: int) -> Tensors:
    if il >= N_TRUNK:
        return {}  # the router has no tensors
    block: Tensors = {
        **_ones("attn_norm", "ffn_norm"),
        **_fused_attention(rng),
        **_dense_ffn(rng),
    }
    rank, slots = 4, 2
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        block[f"{name}.lora_a"] = experts(rng, slots, rank, 64)
        block[f"{name}.lora_b"] = np.zeros((slots, 64, rank))
    return block


# ---- keys ---------------------------------------------------------------------------------------

_KEYS = {
    "context_length": N_CTX_TRAIN,
    "embedding_length": N_EMBD,
    "block_count": N_TRUNK + 1,
    "nextn_predict_layers": 1,
    "feed_forward_length": N_FF,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD_DIM,
}
_MOE = {
    "expert_count": N_EXPERT,
    "expert_used_count": N_EXPERT_USED,
    "expert_shared_count": 1,
    "expert_feed_forward_length": N_FF,
    "expert_shared_feed_forward_length": N_FF,
    "expert_gating_func": 2,  # sigmoid
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
}
_MLA = {
    **_MOE,
    "leading_dense_block_count": 0,
    "attention.q_lora_rank": Q_RANK,
    "attention.kv_lora_rank": KV_RANK,
    "attention.value_length_mla": VALUE,
    "attention.value_length": KV_RANK,
    "attention.head_count_kv": 1,
    "attention.indexer.head_count": INDEX_HEADS,
    "attention.indexer.key_length": INDEX_DIM,
    "attention.indexer.top_k": 32,
}

_MODELS: dict[str, tuple[Block, Mapping[str, Any]]] = {
    "glm4": (_glm4, {}),
    "exaone4": (_exaone4, {}),
    "exaone-moe": (_exaone_moe, {**_MOE, "attention.sliding_window": 48}),
    "bailingmoe2": (_bailingmoe2, _MOE),
    "dots3note": (
        _dots3note,
        {
            **_MLA,
            "attention.key_length": KV_RANK + ROPE,
            "attention.key_length_swa": KV_RANK + ROPE,
            "attention.value_length_swa": KV_RANK,
            "attention.key_length_mla": NOPE + ROPE,
            "attention.key_length_mla_swa": NOPE + ROPE,
            "attention.value_length_mla_swa": VALUE,
            "attention.kv_lora_rank_swa": KV_RANK,
            "attention.sliding_window": 48,
            "attention.sliding_window_pattern": [0, 1, 1],
            "attention.indexer.types": [1, 0, 0],
            "rope.freq_base_swa": 10000.0,
            "rope.dimension_count": ROPE,
            "rope.dimension_count_swa": ROPE,
        },
    ),
    "glm5-next": (
        _glm5_next,
        {
            **_MLA,
            "attention.head_count_kv": [1, 0, 1],
            "attention.key_length": KV_RANK,
            "attention.key_length_mla": NOPE,
            "attention.indexer.kpool": 4,
            "rope.dimension_count": 0,
            "ssm.conv_kernel": 4,
            "kda.head_dim": HEAD_DIM,
            "hyper_connection.count": 4,
            "hyper_connection.sinkhorn_iterations": 2,
            "hyper_connection.epsilon": 1e-6,
        },
    ),
    "nemotron_h": (
        _nemotron_h,
        {
            **_MOE,
            "attention.head_count": [N_HEAD, 0, N_HEAD],
            "attention.head_count_kv": [N_HEAD, 0, N_HEAD],
            "feed_forward_length": [0, 0, N_FF],
            "attention.layer_norm_epsilon": 1e-6,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": WIDTH,
            "ssm.state_size": HEAD_DIM,
            "ssm.time_step_rank": N_HEAD,
            "ssm.group_count": 1,
        },
    ),
    "graniteswitch": (
        _graniteswitch,
        {
            "logit_scale": 1.0,
            "adapters.count": 1,
            "adapters.lora_rank": 4,
            "adapters.token_ids_activate": [5],
            "adapters.token_ids_substitute": [6],
        },
    ),
}


def build(arch: str, folder: Path, n_heads: int = 1, seed: int = 1) -> Files:
    """Write a model of `arch` with its declared head to a file in `folder`."""
    rng = np.random.default_rng(seed)
    block, keys = _MODELS[arch]
    tensors: Tensors = {
        "token_embd.weight": rng.normal(0, 1, (N_VOCAB, N_EMBD)),
        "output_norm.weight": np.ones(N_EMBD),
        "output.weight": dense(rng, N_VOCAB, N_EMBD, 4.0),
    }
    for il in range(N_TRUNK + n_heads):
        layer = block(rng, il)
        if il >= N_TRUNK and layer:
            layer |= _nextn(rng)
        tensors |= {f"blk.{il}.{name}": tensor for name, tensor in layer.items()}
    path = folder / f"{arch}.gguf"
    write(path, arch, {**_KEYS, **keys}, tensors)
    return Files(path)


def _family(arch: str) -> Family:
    return Family(arch, lambda folder, n_heads, seed: build(arch, folder, n_heads, seed))


FAMILIES = {arch: _family(arch) for arch in _MODELS}
