"""The residual stream that these families are built around, and blocks that write into it.

A token starts the stream with the direction of the word that follows it in a cycle, as in
`models`; the blocks have random weights and add so much that the text leaves the cycle again and
again, depending on all that came before. A NextN head starts from the token and as much of the
hidden row, mixed by random weights, and adds its own random block: it is right for part of what
stays on the cycle, and drafts something else when it gets another row or another history.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import models

from .common import N_CTX_TRAIN, Tensors, dense, experts

N_EMBD = models.N_EMBD
N_HEAD = 4
N_HEAD_KV = 2
HEAD_DIM = 16
WIDTH = N_HEAD * HEAD_DIM
WIDTH_KV = N_HEAD_KV * HEAD_DIM
N_FF = 64
N_EXPERT = 4
N_EXPERT_USED = 2
N_FF_EXP = 32
TOKEN, HIDDEN = 0.6, 0.6  # what a head makes of its two inputs; what its block adds is about 1
CONV = 4  # tokens that the convolution of a recurrent layer sees

Array = npt.NDArray[np.float64]


def keys(n_trunk: int, n_heads: int, *, moe: bool = False) -> dict[str, Any]:
    """Return the keys that every family here has; ``moe`` adds those of the experts."""
    common: dict[str, Any] = {
        "context_length": N_CTX_TRAIN,
        "embedding_length": N_EMBD,
        "block_count": n_trunk + n_heads,
        "nextn_predict_layers": n_heads,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
    }
    if moe:
        common |= {
            "expert_count": N_EXPERT,
            "expert_used_count": N_EXPERT_USED,
            "expert_feed_forward_length": N_FF_EXP,
        }
    return common


def outer(words: models.Words) -> Tensors:
    """Return what stands before the first block and after the last one."""
    return {
        "token_embd.weight": words.token_embd,
        "output_norm.weight": np.ones(N_EMBD),
        "output.weight": words.output,
    }


def nextn(rng: np.random.Generator) -> Tensors:
    """Return a head's own tensors: the token, which knows the next word, and the row, mixed."""
    hidden = into_stream(dense(rng, N_EMBD, N_EMBD, HIDDEN))
    return {
        "nextn.eh_proj.weight": np.concatenate([TOKEN * np.eye(N_EMBD), hidden], axis=1),
        "nextn.enorm.weight": np.ones(N_EMBD),
        "nextn.hnorm.weight": np.ones(N_EMBD),
        "nextn.shared_head_norm.weight": np.ones(N_EMBD),
    }


def prefixed(il: int, block: Tensors) -> Tensors:
    return {f"blk.{il}.{name}": tensor for name, tensor in block.items()}


def into_stream(matrix: Array) -> Array:
    """Let a matrix (..., n_embd, n_in) leave the two constant dimensions of the stream alone."""
    matrix[..., :2, :] = 0
    return matrix


def attention(
    rng: np.random.Generator, size: float, *, gated: bool = False, normed: bool = True
) -> Tensors:
    """Return grouped-query attention that picks single tokens out of the history, not its mean."""
    sharp = 1.0 if normed else 2.0
    block: Tensors = {
        "attn_norm.weight": np.ones(N_EMBD),
        "attn_q.weight": dense(rng, (1 + gated) * WIDTH, N_EMBD, sharp),
        "attn_k.weight": dense(rng, WIDTH_KV, N_EMBD, sharp),
        "attn_v.weight": dense(rng, WIDTH_KV, N_EMBD),
        "attn_output.weight": into_stream(dense(rng, N_EMBD, WIDTH, size)),
    }
    if normed:
        block["attn_q_norm.weight"] = block["attn_k_norm.weight"] = np.full(HEAD_DIM, 2.0)
    return block


def mlp(rng: np.random.Generator, size: float, n_ff: int = N_FF, kind: str = "") -> Tensors:
    """Return a gated feed-forward network; ``kind`` is ``"_shexp"`` for a shared expert."""
    return {
        f"ffn_gate{kind}.weight": dense(rng, n_ff, N_EMBD),
        f"ffn_up{kind}.weight": dense(rng, n_ff, N_EMBD),
        f"ffn_down{kind}.weight": into_stream(dense(rng, N_EMBD, n_ff, size)),
    }


def moe(
    rng: np.random.Generator, size: float, *, shared: bool = True, bias: str = "exp_probs_b.bias"
) -> Tensors:
    """Return routed experts, with a shared one, and a selection bias where ``bias`` names it."""
    block: Tensors = {
        "ffn_gate_inp.weight": dense(rng, N_EXPERT, N_EMBD),
        "ffn_gate_exps.weight": experts(rng, N_EXPERT, N_FF_EXP, N_EMBD),
        "ffn_up_exps.weight": experts(rng, N_EXPERT, N_FF_EXP, N_EMBD),
        "ffn_down_exps.weight": into_stream(experts(rng, N_EXPERT, N_EMBD, N_FF_EXP, 2 * size)),
    }
    if bias:
        block[bias] = rng.normal(0, 0.2, N_EXPERT)
    if shared:
        block |= mlp(rng, size, N_FF_EXP, "_shexp")
    return block
