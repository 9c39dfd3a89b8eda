"""How the checkpoints of each family name and keep the tensors of their MTP head.

One table per family says, for every tensor of a NextN block as llama.cpp names it (without
``blk.N.``), what the checkpoint calls it and what has to be done with it. The templates know
``{layer}`` (counted on from the trunk), ``{head}`` (from 0) and ``{e}`` (the expert).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "Part", "family_of"]

How = Literal["tensor", "experts", "gate_half", "up_half", "k_b", "v_b", "qkv"]


@dataclass(frozen=True)
class Part:
    """Where one tensor of the block comes from.

    Attributes:
        names: what the checkpoint may call it; the first that is there counts, and an error names
            the first.
        optional: the block does without it.
        how: ``tensor`` as it is; ``experts`` stacked, one tensor per expert; the upper or lower
            half of stacked experts (``gate_half``, ``up_half``); the key half of MLA's kv_b, each
            head transposed (``k_b``), or its value half (``v_b``); ``qkv`` rows one below the
            other.
    """

    names: tuple[str, ...]
    optional: bool = False
    how: How = "tensor"


Parts = dict[str, tuple[Part, ...]]
"""GGUF name to the ways in which a checkpoint may keep that tensor."""

Arrays = Mapping[str, list[Any]]
"""Metadata key without the architecture to one value per head."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints whose head can be read.

    Attributes:
        arch: ``general.architecture`` of its GGUF files.
        models: what ``architectures`` in config.json says.
        parts: the tensors that every block has.
        choices: what may be built in several ways, such as a dense or a sparse feed-forward
            network; of each choice the first way counts whose first tensor is there.
        count_key: where config.json says how many heads there are; empty if nowhere.
        norms_less_one: norms are kept as the difference to 1.
        vocab_multiple: conversion fills the vocabulary up to a multiple of this.
        arrays: ``arrays(config, first, n)`` gives the per-layer metadata of ``n`` heads, the first
            of them being layer ``first``; of it, keys that the base has are used.
    """

    arch: str
    models: tuple[str, ...]
    parts: Parts
    choices: tuple[tuple[Parts, ...], ...]
    count_key: str = "num_nextn_predict_layers"
    norms_less_one: bool = False
    vocab_multiple: int = 1
    arrays: Callable[[Mapping[str, Any], int, int], Arrays] = field(default=lambda *_: {})

    @property
    def place(self) -> str:
        """Template of what the names of a head's tensors begin with."""
        name = self.parts["attn_norm.weight"][0].names[0]
        return _LAYER if name.startswith(_LAYER) else "mtp."


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Find the family of a checkpoint by its config.json."""
    models = config.get("architectures")
    for model in models if isinstance(models, list) else []:
        for family in FAMILIES:
            if model in family.models:
                return family
    return None


# --- pieces of tables -----------------------------------------------------------------------------


def _one(*names: str, optional: bool = False, how: How = "tensor") -> tuple[Part, ...]:
    return (Part(names, optional, how),)


def _under(prefix: str, parts: Parts) -> Parts:
    """Put every name of a table below ``prefix``."""
    return {
        gguf: tuple(
            Part(tuple(prefix + name for name in part.names), part.optional, part.how)
            for part in ways
        )
        for gguf, ways in parts.items()
    }


def _experts(folder: str) -> Parts:
    """Routed experts: a tensor each, or stacked, or stacked with gate above up."""
    parts: Parts = {}
    for kind in ("gate", "up", "down"):
        apart = Part((f"{folder}.{{e}}.{kind}_proj.weight",), how="experts")
        stacked = Part((f"{folder}.{kind}_proj.weight", f"{folder}.{kind}_proj"))
        ways = [apart, stacked]
        if kind != "down":
            both = (f"{folder}.gate_up_proj.weight", f"{folder}.gate_up_proj")
            ways.append(Part(both, how="gate_half" if kind == "gate" else "up_half"))
        parts[f"ffn_{kind}_exps.weight"] = tuple(ways)
    return parts


def _mlp(folder: str, suffix: str = "", *, optional: bool = False) -> Parts:
    return {
        f"ffn_{kind}{suffix}.weight": _one(f"{folder}.{kind}_proj.weight", optional=optional)
        for kind in ("gate", "up", "down")
    }


def _moe(router: str, bias: tuple[str, ...], shared: str) -> Parts:
    """Router, routed experts, and the shared expert, which not all models have."""
    return {
        "ffn_gate_inp.weight": _one(router),
        **({"exp_probs_b.bias": _one(*bias, optional=True)} if bias else {}),
        **_experts("mlp.experts"),
        **_mlp(shared, "_shexp", optional=True),
    }


def _attention(*, qk_norm: bool | None) -> Parts:
    """Grouped attention; ``qk_norm`` None: some models of the family have the norms."""
    parts: Parts = {}
    for part in "qkv":
        parts[f"attn_{part}.weight"] = _one(f"self_attn.{part}_proj.weight")
        parts[f"attn_{part}.bias"] = _one(f"self_attn.{part}_proj.bias", optional=True)
    parts["attn_output.weight"] = _one("self_attn.o_proj.weight")
    if qk_norm is not False:
        for part in "qk":
            name = f"self_attn.{part}_norm.weight"
            parts[f"attn_{part}_norm.weight"] = _one(name, optional=qk_norm is None)
    return parts


def _latent_query(folder: str) -> tuple[Parts, ...]:
    """The query of MLA: of low rank in large models, one matrix in small ones."""
    low_rank = {
        "attn_q_a.weight": _one(f"{folder}.q_a_proj.weight"),
        "attn_q_a_norm.weight": _one(f"{folder}.q_a_layernorm.weight"),
        "attn_q_b.weight": _one(f"{folder}.q_b_proj.weight"),
    }
    return low_rank, {"attn_q.weight": _one(f"{folder}.q_proj.weight")}


def _latent_attention(folder: str, *outputs: str) -> Parts:
    """MLA but for its query."""
    return {
        "attn_kv_a_mqa.weight": _one(f"{folder}.kv_a_proj_with_mqa.weight"),
        "attn_kv_a_norm.weight": _one(f"{folder}.kv_a_layernorm.weight"),
        "attn_k_b.weight": _one(f"{folder}.kv_b_proj.weight", how="k_b"),
        "attn_v_b.weight": _one(f"{folder}.kv_b_proj.weight", how="v_b"),
        "attn_output.weight": _one(*(f"{folder}.{name}.weight" for name in outputs)),
    }


def _norms(after: str) -> Parts:
    return {
        "attn_norm.weight": _one("input_layernorm.weight"),
        after: _one("post_attention_layernorm.weight"),
    }


_JOIN: Parts = {
    "nextn.eh_proj.weight": _one("eh_proj.weight"),
    "nextn.enorm.weight": _one("enorm.weight"),
    "nextn.hnorm.weight": _one("hnorm.weight"),
}
_SHARED_HEAD: Parts = {
    "nextn.shared_head_norm.weight": _one("shared_head.norm.weight"),
    "nextn.embed_tokens.weight": _one("embed_tokens.weight", optional=True),
    "nextn.shared_head_head.weight": _one("shared_head.head.weight", optional=True),
}
_LAYER = "model.layers.{layer}."
_DENSE = _under(_LAYER, _mlp("mlp"))
_DEEPSEEK_MOE = _under(
    _LAYER,
    _moe(
        "mlp.gate.weight",
        ("mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction.bias"),
        "mlp.shared_experts",
    ),
)
_DEEPSEEK = _under(
    _LAYER,
    {
        **_JOIN,
        **_SHARED_HEAD,
        **_norms("ffn_norm.weight"),
        **_latent_attention("self_attn", "o_proj"),
    },
)
_DEEPSEEK_QUERY = tuple(_under(_LAYER, way) for way in _latent_query("self_attn"))


def _indexer(*, optional: bool) -> Parts:
    return _under(
        _LAYER + "self_attn.indexer.",
        {
            "indexer.k_norm.weight": _one("k_norm.weight", optional=optional),
            "indexer.k_norm.bias": _one("k_norm.bias", optional=optional),
            "indexer.proj.weight": _one("weights_proj.weight", optional=optional),
            "indexer.attn_k.weight": _one("wk.weight", optional=optional),
            "indexer.attn_q_b.weight": _one("wq_b.weight", optional=optional),
        },
    )


# The head of Qwen's is a layer of its own folder; what joins and ends it stands outside the layer.
_QWEN = {
    **_under(
        "mtp.",
        {
            "nextn.eh_proj.weight": _one("fc.weight"),
            "nextn.enorm.weight": _one("pre_fc_norm_embedding.weight"),
            "nextn.hnorm.weight": _one("pre_fc_norm_hidden.weight"),
            "nextn.shared_head_norm.weight": _one("norm.weight"),
        },
    ),
    **_under(
        "mtp.layers.{head}.",
        {**_norms("post_attention_norm.weight"), **_attention(qk_norm=True)},
    ),
}
_MTP_DENSE = _under("mtp.layers.{head}.", _mlp("mlp"))
_QWEN_MOE = _under(
    "mtp.layers.{head}.",
    {
        **_moe("mlp.gate.weight", (), "mlp.shared_expert"),
        "ffn_gate_inp_shexp.weight": _one("mlp.shared_expert_gate.weight"),
    },
)
_STEP_MOE = _under(
    _LAYER,
    {
        "ffn_gate_inp.weight": _one("moe.gate.weight"),
        "exp_probs_b.bias": _one("moe.router_bias", optional=True),
        **_mlp("moe", "_exps"),
        **_mlp("share_expert", "_shexp", optional=True),
    },
)
_HY_MOE = _under(
    _LAYER,
    {
        "ffn_gate_inp.weight": _one("mlp.router.gate.weight", "mlp.gate.weight"),
        "exp_probs_b": _one("mlp.expert_bias", "mlp.gate.expert_bias", optional=True),
        **_experts("mlp.experts"),
        **{
            f"ffn_{kind}_shexp.weight": _one(
                f"mlp.shared_mlp.{kind}_proj.weight",
                f"mlp.shared_experts.{kind}_proj.weight",
                optional=True,
            )
            for kind in ("gate", "up", "down")
        },
    },
)
# Experts without a gate, which may work in a space narrower than the residual stream.
_NEMOTRON_MOE = _under(
    "mtp.layers.1.mixer.",
    {
        "ffn_gate_inp.weight": _one("gate.weight"),
        "exp_probs_b.bias": _one("gate.e_score_correction_bias", "gate.e_score_correction.bias"),
        **{name: ways for name, ways in _experts("experts").items() if "gate" not in name},
        "ffn_up_shexp.weight": _one("shared_experts.up_proj.weight"),
        "ffn_down_shexp.weight": _one("shared_experts.down_proj.weight"),
        "ffn_latent_down.weight": _one("fc1_latent_proj.weight", optional=True),
        "ffn_latent_up.weight": _one("fc2_latent_proj.weight", optional=True),
    },
)
_BAILING_QUERY = tuple(_under(_LAYER, way) for way in _latent_query("attention"))
_BAILING_MOE = _under(
    _LAYER, _moe("mlp.gate.weight", ("mlp.gate.expert_bias",), "mlp.shared_experts")
)


# --- per-layer metadata ---------------------------------------------------------------------------


def _qwen_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    return {"attention.recurrent_layers": [False] * n}


def _mimo_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    return {
        "attention.head_count_kv": [config.get("swa_num_key_value_heads")] * n,
        "attention.sliding_window_pattern": [True] * n,
    }


def _layer_types(config: Mapping[str, Any], first: int, n: int) -> list[bool]:
    """Which of the heads have a sliding window; those that the list does not reach have none."""
    types = config.get("layer_types")
    types = list(types) if isinstance(types, list) else []
    return [t == "sliding_attention" for t in (types + [""] * (first + n))[first : first + n]]


def _step_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    sliding = _layer_types(config, first, n)
    other = config.get("attention_other_setting")
    other = other if isinstance(other, dict) else {}

    def each(key: str) -> list[Any]:
        return [(other if s and key in other else config).get(key) for s in sliding]

    def limits(key: str) -> list[float]:
        values = config.get(key)
        values = list(values) if isinstance(values, list) else []
        return [float(v or 0.0) for v in (values + [0.0] * (first + n))[first : first + n]]

    return {
        "attention.head_count": each("num_attention_heads"),
        "attention.head_count_kv": each("num_attention_groups"),
        "attention.sliding_window_pattern": sliding,
        "swiglu_clamp_exp": limits("swiglu_limits"),
        "swiglu_clamp_shexp": limits("swiglu_limits_shared"),
    }


def _sparse_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    # One for each layer of the trunk: the heads' attention is dense, and the host wants none.
    types = config.get("indexer_types")
    types = list(types) if isinstance(types, list) else []
    return {"attention.indexer.types": [t == "full" for t in types][:first]}


def _cohere_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    return {"attention.sliding_window_pattern": _layer_types(config, first, n)}


def _nemotron_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    return {
        "attention.head_count_kv": [config.get("num_key_value_heads")] * n,
        "feed_forward_length": [config.get("moe_intermediate_size")] * n,
    }


def _bailing_arrays(config: Mapping[str, Any], first: int, n: int) -> Arrays:
    return {"attention.head_count_kv": [1] * n}


# --- the families ---------------------------------------------------------------------------------

FAMILIES: tuple[Family, ...] = (
    Family(
        arch="qwen35",
        models=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
        parts=_QWEN,
        choices=((_MTP_DENSE,),),
        count_key="mtp_num_hidden_layers",
        norms_less_one=True,
        arrays=_qwen_arrays,
    ),
    Family(
        arch="qwen35moe",
        models=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
        parts=_QWEN,
        choices=((_QWEN_MOE,),),
        count_key="mtp_num_hidden_layers",
        norms_less_one=True,
        arrays=_qwen_arrays,
    ),
    Family(
        arch="qwen3next",
        models=("Qwen3NextForCausalLM",),
        parts=_QWEN,
        choices=((_QWEN_MOE,),),
        count_key="mtp_num_hidden_layers",
        norms_less_one=True,
        arrays=_qwen_arrays,
    ),
    Family(
        arch="glm4moe",
        models=("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration"),
        parts=_under(
            _LAYER,
            {
                **_JOIN,
                **_SHARED_HEAD,
                **_norms("post_attention_norm.weight"),
                **_attention(qk_norm=None),
            },
        ),
        choices=((_DEEPSEEK_MOE, _DENSE),),
    ),
    Family(
        arch="deepseek2",
        models=("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "DeepseekV2ForCausalLM"),
        parts=_DEEPSEEK,
        choices=(_DEEPSEEK_QUERY, (_DEEPSEEK_MOE, _DENSE)),
    ),
    Family(
        arch="deepseek32",
        models=("DeepseekV32ForCausalLM",),
        parts=_DEEPSEEK | _indexer(optional=False),
        choices=(_DEEPSEEK_QUERY, (_DEEPSEEK_MOE,)),
    ),
    Family(
        arch="glm-dsa",
        models=("GlmMoeDsaForCausalLM",),
        parts=_DEEPSEEK | _indexer(optional=True),
        choices=(_DEEPSEEK_QUERY, (_DEEPSEEK_MOE,)),
        arrays=_sparse_arrays,
    ),
    Family(
        # llama.cpp's graph for these heads knows only query, key and value in one matrix.
        arch="mimo2",
        models=("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
        parts=_under(
            "mtp.layers.{head}.",
            {
                **_JOIN,
                "attn_norm.weight": _one("input_layernorm.weight"),
                "attn_qkv.weight": _one("self_attn.qkv_proj.weight", how="qkv"),
                "attn_sinks.weight": _one(
                    "self_attn.attention_sink_bias",
                    "self_attn.attention_sink_bias.weight",
                    optional=True,
                ),
                "attn_output.weight": _one("self_attn.o_proj.weight"),
                "ffn_norm.weight": _one(
                    "pre_mlp_layernorm.weight", "post_attention_layernorm.weight"
                ),
                "layer_output_norm.weight": _one("final_layernorm.weight", optional=True),
                "nextn.shared_head_norm.weight": _one("shared_head.norm.weight", optional=True),
            },
        ),
        choices=((_MTP_DENSE,),),
        count_key="",
        arrays=_mimo_arrays,
    ),
    Family(
        arch="step35",
        models=("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
        parts=_under(
            _LAYER,
            {
                **_JOIN,
                **_norms("ffn_norm.weight"),
                **_attention(qk_norm=None),
                "attn_gate.weight": _one("self_attn.g_proj.weight", optional=True),
                "nextn.embed_tokens.weight": _one("embed_tokens.weight", optional=True),
                "nextn.shared_head_norm.weight": _one(
                    "transformer.shared_head.norm.weight", "shared_head.norm.weight"
                ),
                "nextn.shared_head_head.weight": _one(
                    "transformer.shared_head.output.weight",
                    "shared_head.output.weight",
                    "shared_head.head.weight",
                    optional=True,
                ),
            },
        ),
        choices=((_DENSE, _STEP_MOE),),
        norms_less_one=True,
        arrays=_step_arrays,
    ),
    Family(
        arch="hy_v3",
        models=("HYV3ForCausalLM",),
        parts=_under(
            _LAYER,
            {
                **_JOIN,
                **_SHARED_HEAD,
                **_norms("ffn_norm.weight"),
                **_attention(qk_norm=True),
                "nextn.shared_head_norm.weight": _one(
                    "final_layernorm.weight", "shared_head.norm.weight"
                ),
            },
        ),
        choices=((_HY_MOE, _DENSE),),
    ),
    Family(
        arch="cohere2moe",
        models=("Cohere2MoeForCausalLM",),
        parts=_under(
            _LAYER,
            {
                **_JOIN,
                **_SHARED_HEAD,
                "nextn.shared_head_norm.weight": _one("shared_head.norm.weight", optional=True),
                "attn_norm.weight": _one("input_layernorm.weight"),
                **_attention(qk_norm=False),
            },
        ),
        choices=((_under(_LAYER, _moe("mlp.gate.weight", (), "mlp.shared_experts")),),),
        arrays=_cohere_arrays,
    ),
    Family(
        # Two entries of the checkpoint make one block: attention, then experts without a gate. The
        # attention has no positions, and so no order of rows within a head that would matter.
        arch="nemotron_h_moe",
        models=("NemotronHForCausalLM",),
        parts=_under(
            "mtp.layers.0.",
            {
                **_JOIN,
                "attn_norm.weight": _one("norm.weight"),
                **{
                    f"attn_{part}.weight": _one(f"mixer.{part}_proj.weight")
                    for part in ("q", "k", "v")
                },
                "attn_output.weight": _one("mixer.o_proj.weight"),
            },
        )
        | _under(
            "mtp.layers.1.",
            {
                "post_attention_norm.weight": _one("norm.weight"),
                "nextn.shared_head_norm.weight": _one("final_layernorm.weight"),
            },
        ),
        choices=((_NEMOTRON_MOE,),),
        vocab_multiple=8,
        arrays=_nemotron_arrays,
    ),
    Family(
        arch="bailingmoe3",
        models=("BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"),
        parts=_under(
            _LAYER,
            {
                **_JOIN,
                **_norms("ffn_norm.weight"),
                **_latent_attention("attention", "dense", "o_proj"),
                "attn_gate.weight": _one("attention.g_proj.weight"),
                "layer_output_norm.weight": _one("final_layernorm.weight"),
            },
        ),
        choices=(_BAILING_QUERY, (_BAILING_MOE,)),
        arrays=_bailing_arrays,
    ),
)
