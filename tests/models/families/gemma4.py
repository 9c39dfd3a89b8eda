"""Gemma 4 and its assistant: a draft model of its own that reads the target's KV cache.

Every second layer of the target slides, the last one sees everything. The assistant has one layer
of either kind and no keys of its own: the sliding one reads those of the target's last but one
layer, the other those of its last. It gets the token's embedding from the target's table.

It looks at the first half of the target's dimensions, where words turn by the same angles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import models

from . import stream
from .common import N_CTX_TRAIN, N_VOCAB, Family, Files, Tensors, dense, write

TARGET = "gemma4"
ARCH = "gemma4-assistant"
N_EMBD = stream.N_EMBD
N_EMBD_DRAFT = 32
N_PER_LAYER = 8
N_FF = stream.N_FF
N_HEAD = 2
N_HEAD_KV = 1
HEAD_DIM = 32
HEAD_DIM_SLIDING = 16
WINDOW = 48
SLIDES = (True, False, True, False)
SLIDES_DRAFT = (True, False)


def _into_stream(n_embd: int, size: float) -> npt.NDArray[np.float64]:
    """Scales of a norm that lets what a half layer made into the stream, but for two dimensions."""
    scales = np.full(n_embd, size)
    scales[:2] = 0
    return scales


def _block(rng: np.random.Generator, n_embd: int, sliding: bool, size: float) -> Tensors:
    """A layer without keys and values; both of its halves end in a norm and add ``size``."""
    width = HEAD_DIM_SLIDING if sliding else HEAD_DIM
    return {
        "attn_norm.weight": np.ones(n_embd),
        "attn_q.weight": dense(rng, N_HEAD * width, n_embd),
        # Scores are not divided by the root of the width in this family.
        "attn_q_norm.weight": np.full(width, 1.7 / np.sqrt(width)),
        "attn_output.weight": dense(rng, n_embd, N_HEAD * width),
        "post_attention_norm.weight": _into_stream(n_embd, size),
        "layer_output_scale.weight": np.array([0.9]),
        "ffn_norm.weight": np.ones(n_embd),
        "ffn_gate.weight": dense(rng, N_FF, n_embd),
        "ffn_up.weight": dense(rng, N_FF, n_embd),
        "ffn_down.weight": dense(rng, n_embd, N_FF),
        "post_ffw_norm.weight": _into_stream(n_embd, size),
    }


def _keys(rng: np.random.Generator, sliding: bool) -> Tensors:
    width = HEAD_DIM_SLIDING if sliding else HEAD_DIM
    return {
        "attn_k.weight": dense(rng, N_HEAD_KV * width, N_EMBD),
        "attn_k_norm.weight": np.ones(width),
        "attn_v.weight": dense(rng, N_HEAD_KV * width, N_EMBD),
    }


def _rope_freqs() -> Tensors:
    """A quarter of the dimensions turns with the position; the others never do."""
    factors = np.full(HEAD_DIM // 2, 1e30)
    factors[: HEAD_DIM // 8] = 1.0
    return {"rope_freqs.weight": factors}


def _common_keys(slides: tuple[bool, ...], n_reusing: int = 0) -> dict[str, Any]:
    return {
        "context_length": N_CTX_TRAIN,
        "block_count": len(slides),
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.key_length_swa": HEAD_DIM_SLIDING,
        "attention.value_length_swa": HEAD_DIM_SLIDING,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": n_reusing,
        "rope.dimension_count": HEAD_DIM,
        "rope.dimension_count_swa": HEAD_DIM_SLIDING,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    }


def build(folder: Path, n_heads: int, seed: int, *, size: float = 0.6, n_reusing: int = 0) -> Files:
    """Write target and assistant; ``size`` is what a half layer of the target adds to a token's 1.

    ``n_heads`` is 1: the assistant's layers all belong to one graph. The last ``n_reusing`` layers
    of the target have no keys of their own, as in the small models of this family: 0 or 2.
    """
    assert n_heads == 1
    rng = np.random.default_rng(seed)
    words = models.lay_out_words(rng, sharpness=1.5)
    half = np.eye(N_EMBD)[:N_EMBD_DRAFT]
    n_trunk = len(SLIDES)
    target: Tensors = {
        # The host multiplies an embedding by the root of its width.
        "token_embd.weight": words.token_embd / np.sqrt(N_EMBD),
        "output_norm.weight": np.ones(N_EMBD),
        "output.weight": words.output,
        "per_layer_token_embd.weight": rng.normal(0, 0.3, (N_VOCAB, N_PER_LAYER * n_trunk)),
        "per_layer_model_proj.weight": dense(rng, N_PER_LAYER * n_trunk, N_EMBD),
        "per_layer_proj_norm.weight": np.ones(N_PER_LAYER),
        **_rope_freqs(),
    }
    for il, sliding in enumerate(SLIDES):
        block = {
            **_block(rng, N_EMBD, sliding, size),
            **(_keys(rng, sliding) if il < n_trunk - n_reusing else {}),
            "inp_gate.weight": dense(rng, N_PER_LAYER, N_EMBD),
            "proj.weight": dense(rng, N_EMBD, N_PER_LAYER),
            "post_norm.weight": _into_stream(N_EMBD, 0.2),
        }
        target |= stream.prefixed(il, block)

    draft: Tensors = {
        "token_embd.weight": words.output @ half.T * np.sqrt(2),
        "output_norm.weight": np.ones(N_EMBD_DRAFT),
        "nextn.pre_projection.weight": np.concatenate([half, 0.5 * half @ words.rotation], axis=1),
        "nextn.post_projection.weight": half.T,
        **_rope_freqs(),
    }
    for il, sliding in enumerate(SLIDES_DRAFT):
        block = _block(rng, N_EMBD_DRAFT, sliding, size)
        draft |= stream.prefixed(il, block)

    files = Files(folder / f"{TARGET}.gguf", folder / f"{ARCH}.gguf")
    assert files.draft is not None
    write(
        files.path,
        TARGET,
        {
            **_common_keys(SLIDES, n_reusing),
            "embedding_length": N_EMBD,
            "embedding_length_per_layer_input": N_PER_LAYER,
            "final_logit_softcapping": 30.0,
        },
        target,
    )
    write(
        files.draft,
        ARCH,
        {
            **_common_keys(SLIDES_DRAFT),
            "embedding_length": N_EMBD_DRAFT,
            "embedding_length_out": N_EMBD,
            "nextn_predict_layers": len(SLIDES_DRAFT),
        },
        draft,
    )
    return files


FAMILY = Family(ARCH, build)
