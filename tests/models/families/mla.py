"""What the DeepSeek families share: latent attention, routed experts, and a NextN block of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import models

from . import stream
from .common import Files, Tensors, dense, experts, write

N_EMBD = stream.N_EMBD
N_HEAD = 2
Q_RANK = 32
KV_RANK = 32
ROPE = 16  # of a head's key, the part with a position
NOPE = 16  # the part without
HEAD_V = 32
N_INDEXER_HEAD = 4
INDEXER_WIDTH = 64  # the host rotates it, and aborts unless it is a multiple of 64
TOP_K = 24  # positions that sparse attention looks at: fewer than the tests' texts have
SIGMOID = 2
SIZE = 0.9


def _attention(rng: np.random.Generator, *, indexer: bool) -> Tensors:
    sharp = 1.7  # the block picks single tokens out of the history, not its mean
    block: Tensors = {
        "attn_norm.weight": np.ones(N_EMBD),
        "attn_q_a.weight": dense(rng, Q_RANK, N_EMBD),
        "attn_q_a_norm.weight": np.ones(Q_RANK),
        "attn_q_b.weight": dense(rng, N_HEAD * (NOPE + ROPE), Q_RANK, sharp),
        "attn_kv_a_mqa.weight": dense(rng, KV_RANK + ROPE, N_EMBD),
        "attn_kv_a_norm.weight": np.ones(KV_RANK),
        "attn_k_b.weight": experts(rng, N_HEAD, KV_RANK, NOPE, sharp),
        "attn_v_b.weight": experts(rng, N_HEAD, HEAD_V, KV_RANK),
        "attn_output.weight": stream.into_stream(dense(rng, N_EMBD, N_HEAD * HEAD_V, SIZE)),
        "ffn_norm.weight": np.ones(N_EMBD),
    }
    if indexer:
        block |= {
            "indexer.k_norm.weight": np.ones(INDEXER_WIDTH),
            "indexer.k_norm.bias": np.zeros(INDEXER_WIDTH),
            "indexer.proj.weight": dense(rng, N_INDEXER_HEAD, N_EMBD),
            "indexer.attn_k.weight": dense(rng, INDEXER_WIDTH, N_EMBD),
            "indexer.attn_q_b.weight": dense(rng, N_INDEXER_HEAD * INDEXER_WIDTH, Q_RANK),
        }
    return block


def build(
    folder: Path,
    arch: str,
    seed: int,
    *,
    n_trunk: int = 2,
    sparse: bool = False,
    more_keys: dict[str, Any] | None = None,
) -> Files:
    """Write a model with latent attention, a dense first block, experts after it, and one head.

    ``sparse`` adds the indexer that picks the positions which the trunk's attention looks at.
    """
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    tensors = stream.outer(words)
    for il in range(n_trunk + 1):
        block = _attention(rng, indexer=sparse)
        block |= stream.mlp(rng, SIZE) if il == 0 else stream.moe(rng, SIZE)
        if il == n_trunk:
            block |= stream.nextn(rng)
        tensors |= stream.prefixed(il, block)
    keys: dict[str, Any] = {
        **stream.keys(n_trunk, 1, moe=True),
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": Q_RANK,
        "attention.kv_lora_rank": KV_RANK,
        "attention.key_length": KV_RANK + ROPE,
        "attention.value_length": KV_RANK,
        "attention.key_length_mla": NOPE + ROPE,
        "attention.value_length_mla": HEAD_V,
        "rope.dimension_count": ROPE,
    }
    if sparse:
        keys |= {
            "attention.indexer.head_count": N_INDEXER_HEAD,
            "attention.indexer.key_length": INDEXER_WIDTH,
            "attention.indexer.top_k": TOP_K,
        }
    path = folder / f"{arch}.gguf"
    write(path, arch, {**keys, **(more_keys or {})}, tensors)
    return Files(path)
