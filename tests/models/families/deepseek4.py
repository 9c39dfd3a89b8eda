"""DeepSeek V4: four residual streams, a sliding window, and compressed memory of what left it.

The trunk has one layer of each kind: plain, compressed by 4 (with an indexer that picks blocks),
and compressed by 128. The hidden row that the head reads is all four streams.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import models

from . import stream
from .common import Family, Files, Tensors, dense, write

ARCH = "deepseek4"
N_EMBD = stream.N_EMBD
N_STREAMS = 4  # the host's graph knows no other number
N_HEAD = 2
HEAD_DIM = 32
ROPE = 16
Q_RANK = 32
OUT_RANK = 16
N_GROUPS = 2
WINDOW = 32
N_INDEXER_HEAD = 2
# Rotated, so a multiple of 64; not HEAD_DIM, or the host divides by zero in the draft context.
INDEXER_WIDTH = 64
TOP_K = 8  # blocks of four tokens
RATIOS = (0, 4, 128)
SQRT_SOFTPLUS = 4
SIZE = 0.9


def _mixing(rng: np.random.Generator, name: str) -> Tensors:
    """How a block reads the streams, writes to them, and turns them into each other."""
    n_mix = (2 + N_STREAMS) * N_STREAMS
    return {
        f"{name}_fn.weight": dense(rng, n_mix, N_STREAMS * N_EMBD),
        f"{name}_base.weight": rng.normal(0, 0.5, n_mix),
        f"{name}_scale.weight": np.array([0.5, 0.5, 0.5]),
    }


def _compressor(rng: np.random.Generator, name: str, width: int, ratio: int) -> Tensors:
    overlap = 2 if ratio == 4 else 1
    return {
        f"{name}_kv.weight": dense(rng, overlap * width, N_EMBD),
        f"{name}_gate.weight": dense(rng, overlap * width, N_EMBD),
        f"{name}_ape.weight": rng.normal(0, 0.5, (ratio, overlap * width)),
        f"{name}_norm.weight": np.ones(width),
    }


def _block(rng: np.random.Generator, ratio: int) -> Tensors:
    block: Tensors = {
        "attn_norm.weight": np.ones(N_EMBD),
        "attn_sinks.weight": rng.normal(0, 1, N_HEAD),
        "attn_q_a.weight": dense(rng, Q_RANK, N_EMBD),
        "attn_q_a_norm.weight": np.ones(Q_RANK),
        "attn_q_b.weight": dense(rng, N_HEAD * HEAD_DIM, Q_RANK),
        "attn_kv.weight": dense(rng, HEAD_DIM, N_EMBD),
        "attn_kv_a_norm.weight": np.full(HEAD_DIM, 1.7),
        "attn_output_a.weight": dense(rng, N_GROUPS * OUT_RANK, N_HEAD * HEAD_DIM // N_GROUPS),
        "attn_output_b.weight": stream.into_stream(dense(rng, N_EMBD, N_GROUPS * OUT_RANK, SIZE)),
        "ffn_norm.weight": np.ones(N_EMBD),
        **_mixing(rng, "hc_attn"),
        **_mixing(rng, "hc_ffn"),
        **stream.moe(rng, SIZE),
    }
    if ratio:
        block |= _compressor(rng, "attn_compressor", HEAD_DIM, ratio)
    if ratio == 4:
        block |= _compressor(rng, "indexer_compressor", INDEXER_WIDTH, ratio)
        block |= {
            "indexer.proj.weight": dense(rng, N_INDEXER_HEAD, N_EMBD),
            "indexer.attn_q_b.weight": dense(rng, N_INDEXER_HEAD * INDEXER_WIDTH, Q_RANK),
        }
    return block


def _model(seed: int) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Return the keys, the tensors without the head, and those of the head's block."""
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = {
        **stream.outer(words),
        "output_hc_fn.weight": dense(rng, N_STREAMS, N_STREAMS * N_EMBD),
        "output_hc_base.weight": rng.normal(0, 0.5, N_STREAMS),
        "output_hc_scale.weight": np.array([0.5]),
    }
    n_trunk = len(RATIOS)
    for il, ratio in enumerate(RATIOS):
        tensors |= stream.prefixed(il, _block(rng, ratio))
    head = stream.prefixed(n_trunk, {**_block(rng, 0), **stream.nextn(rng)})
    keys: dict[str, Any] = {
        **stream.keys(n_trunk, 1, moe=True),
        "expert_shared_count": 1,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_gating_func": SQRT_SOFTPLUS,
        "swiglu_clamp_exp": 10.0,
        "hash_layer_count": 0,
        "hyper_connection.count": N_STREAMS,
        "hyper_connection.sinkhorn_iterations": 2,
        "hyper_connection.epsilon": 1e-6,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": 1,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.sliding_window": WINDOW,
        "attention.q_lora_rank": Q_RANK,
        "attention.output_lora_rank": OUT_RANK,
        "attention.output_group_count": N_GROUPS,
        "attention.compress_ratios": [*RATIOS, 0],
        "attention.compress_rope_freq_base": 160000.0,
        "attention.indexer.head_count": N_INDEXER_HEAD,
        "attention.indexer.key_length": INDEXER_WIDTH,
        "attention.indexer.top_k": TOP_K,
        "rope.dimension_count": ROPE,
    }
    return keys, tensors, head


def build(folder: Path, n_heads: int, seed: int) -> Files:
    """Write the model with its head in the same file; the host executes one head."""
    assert n_heads == 1
    keys, tensors, head = _model(seed)
    path = folder / f"{ARCH}.gguf"
    write(path, ARCH, keys, {**tensors, **head})
    return Files(path)


def build_apart(folder: Path, seed: int) -> Files:
    """Write trunk and head as two files, the way the host's conversion does for this family.

    The head's file has the vocabulary, the output and its own block; the trunk's knows of no head.
    """
    keys, tensors, head = _model(seed)
    shared = {name: tensor for name, tensor in tensors.items() if not name.startswith("blk.")}
    trunk, draft = folder / f"{ARCH}-trunk.gguf", folder / f"mtp-{ARCH}.gguf"
    alone = {
        **{k: v for k, v in keys.items() if k != "nextn_predict_layers"},
        "block_count": len(RATIOS),
        "attention.compress_ratios": list(RATIOS),
    }
    write(trunk, ARCH, alone, tensors)
    write(draft, ARCH, keys, {**shared, **head})
    return Files(trunk, draft)


FAMILY = Family(ARCH, build)
