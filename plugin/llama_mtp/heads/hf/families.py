"""How the HF checkpoints of each family name and keep the tensors of their MTP head.

A table says, line by line, what a tensor of a NextN block is called in a GGUF (without ``blk.N.``)
and in the HF checkpoint. There may be several names: the first that is there counts, and an error
names the first. A line that ends in ``?`` stands for a tensor that not all models have, and
``[prefix]`` is put before the names of the lines that follow. Names may hold ``{layer}`` (counted
on from the trunk), ``{head}`` (from 0) and ``{e}`` (the expert), and before a name may stand how
the tensor is made from what the HF checkpoint has (see `Way`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Config = Mapping[str, Any]
Arrays = Mapping[str, list[Any]]
"""Metadata key without the architecture to one value per head."""


class Way(NamedTuple):
    """A way in which an HF checkpoint may keep a tensor.

    Attributes:
        how: empty: as it is; ``experts``: stacked from one tensor per expert; ``gate_half``,
            ``up_half``: the upper or lower half of stacked experts; ``k_b``: the key half of MLA's
            kv_b, each head transposed; ``v_b``: its value half; ``qkv``: rows one below the other.
        name: template of the tensor's name.
    """

    how: str
    name: str


@dataclass(frozen=True)
class Part:
    """Where one tensor of a block comes from."""

    ways: tuple[Way, ...]
    optional: bool


Parts = dict[str, Part]
"""GGUF name to where that tensor comes from."""


@dataclass(frozen=True)
class Family:
    """A family of HF checkpoints whose head can be read.

    Attributes:
        arch: ``general.architecture`` of its GGUF files.
        models: what ``architectures`` in config.json says.
        parts: table of the tensors that every block has.
        choices: tables of what may be built in several ways, such as a dense or a sparse
            feed-forward network; of each choice the first way counts whose first tensor is there.
        count_key: where config.json says how many heads there are; empty if nowhere.
        norms_less_one: norms are kept as the difference to 1.
        vocab_multiple: conversion fills the vocabulary up to a multiple of this.
        arrays: ``arrays(config, first, n)`` gives the per-layer metadata of ``n`` heads, the first
            of them being layer ``first``; of it, keys that the base has are used.
    """

    arch: str
    models: tuple[str, ...]
    parts: str
    choices: tuple[tuple[str, ...], ...]
    count_key: str = "num_nextn_predict_layers"
    norms_less_one: bool = False
    vocab_multiple: int = 1
    arrays: Callable[[Config, int, int], Arrays] = lambda *_: {}

    @property
    def place(self) -> str:
        """Template of what the names of a head's tensors begin with."""
        return _TRUNK_LAYER if self.parts.startswith(_LAYER) else "mtp."


def family_of(config: Config) -> Family | None:
    """Find the family of an HF checkpoint by its config.json."""
    models = config.get("architectures")
    models = models if isinstance(models, list) else []
    return next((f for model in models for f in FAMILIES if model in f.models), None)


def parts_of(table: str) -> Parts:
    """Read a table; of two lines with one GGUF name the later counts."""
    parts: Parts = {}
    prefix = ""
    for gguf, *names in filter(None, map(str.split, table.splitlines())):
        if gguf.startswith("["):
            prefix = gguf[1:-1]
            continue
        ways = [name.rpartition(":") for name in names if name != "?"]
        found = tuple(Way(how, prefix + name) for how, _, name in ways)
        parts[gguf] = Part(found, names[-1] == "?")
    return parts


# --- pieces of tables -----------------------------------------------------------------------------


def _each(kinds: str, line: str) -> str:
    """Repeat a line for each kind, which stands in it as ``*``."""
    return "\n".join(line.replace("*", kind) for kind in kinds.split()) + "\n"


def _optional(table: str) -> str:
    return "".join(f"{line} ?\n" for line in table.strip().splitlines())


def _experts(place: str = "mlp.experts", fused: str = "gate up") -> str:
    """Routed experts: a tensor each, or stacked, or stacked with gate above up."""
    apart = f"ffn_*_exps.weight experts:{place}.{{e}}.*_proj.weight"
    stacked = f" {place}.*_proj.weight {place}.*_proj"
    both = f" *_half:{place}.gate_up_proj.weight *_half:{place}.gate_up_proj"
    return _each(fused, apart + stacked + both) + _each("down", apart + stacked)


_TRUNK_LAYER = "model.layers.{layer}."
_LAYER = f"[{_TRUNK_LAYER}]\n"
_MTP_LAYER = "[mtp.layers.{head}.]\n"
_JOIN = """
    nextn.eh_proj.weight            eh_proj.weight
    nextn.enorm.weight              enorm.weight
    nextn.hnorm.weight              hnorm.weight
"""
_SHARED_HEAD = """
    nextn.shared_head_norm.weight   shared_head.norm.weight
    nextn.embed_tokens.weight       embed_tokens.weight ?
    nextn.shared_head_head.weight   shared_head.head.weight ?
"""
_NORM = "attn_norm.weight input_layernorm.weight\n"
_FFN_NORM = _NORM + "ffn_norm.weight post_attention_layernorm.weight\n"
_POST_NORM = _NORM + "post_attention_norm.weight post_attention_layernorm.weight\n"
_ATTENTION = _each(
    "q k v",
    "attn_*.weight self_attn.*_proj.weight\nattn_*.bias self_attn.*_proj.bias ?",
)
_ATTENTION += "attn_output.weight self_attn.o_proj.weight\n"
_QK_NORM = _each("q k", "attn_*_norm.weight self_attn.*_norm.weight")
_GATE = "ffn_gate_inp.weight mlp.gate.weight\n"
_MLP = _each("gate up down", "ffn_*.weight mlp.*_proj.weight")
_SHARED_EXPERTS = _each("gate up down", "ffn_*_shexp.weight mlp.shared_experts.*_proj.weight ?")
_LOW_RANK_QUERY = """
    attn_q_a.weight                 self_attn.q_a_proj.weight
    attn_q_a_norm.weight            self_attn.q_a_layernorm.weight
    attn_q_b.weight                 self_attn.q_b_proj.weight
"""
_QUERY = "attn_q.weight self_attn.q_proj.weight\n"
_LATENT_ATTENTION = """
    attn_kv_a_mqa.weight            self_attn.kv_a_proj_with_mqa.weight
    attn_kv_a_norm.weight           self_attn.kv_a_layernorm.weight
    attn_k_b.weight                 k_b:self_attn.kv_b_proj.weight
    attn_v_b.weight                 v_b:self_attn.kv_b_proj.weight
    attn_output.weight              self_attn.o_proj.weight
"""
_INDEXER = """
    indexer.k_norm.weight           self_attn.indexer.k_norm.weight
    indexer.k_norm.bias             self_attn.indexer.k_norm.bias
    indexer.proj.weight             self_attn.indexer.weights_proj.weight
    indexer.attn_k.weight           self_attn.indexer.wk.weight
    indexer.attn_q_b.weight         self_attn.indexer.wq_b.weight
"""

# --- tables of one family or a few ----------------------------------------------------------------

_DENSE = _LAYER + _MLP
_DEEPSEEK = _LAYER + _JOIN + _SHARED_HEAD + _FFN_NORM + _LATENT_ATTENTION
_DEEPSEEK_QUERY = (_LAYER + _LOW_RANK_QUERY, _LAYER + _QUERY)
_CORRECTION = (
    "exp_probs_b.bias mlp.gate.e_score_correction_bias mlp.gate.e_score_correction.bias ?\n"
)
_DEEPSEEK_MOE = _LAYER + _GATE + _CORRECTION + _experts() + _SHARED_EXPERTS

# The head of Qwen's is a layer of its own folder; what joins and ends it stands outside the layer.
_QWEN = f"""
    [mtp.]
    nextn.eh_proj.weight            fc.weight
    nextn.enorm.weight              pre_fc_norm_embedding.weight
    nextn.hnorm.weight              pre_fc_norm_hidden.weight
    nextn.shared_head_norm.weight   norm.weight
    {_MTP_LAYER}
"""
_QWEN += _POST_NORM + _ATTENTION + _QK_NORM
_QWEN_MOE = _MTP_LAYER + _GATE + _experts()
_QWEN_MOE += _SHARED_EXPERTS.replace("shared_experts", "shared_expert")
_QWEN_MOE += "ffn_gate_inp_shexp.weight mlp.shared_expert_gate.weight\n"

# llama.cpp's graph for these heads knows only query, key and value in one matrix.
_MIMO = f"""
    {_MTP_LAYER}{_JOIN}{_NORM}
    attn_qkv.weight                 qkv:self_attn.qkv_proj.weight
    attn_sinks.weight  self_attn.attention_sink_bias self_attn.attention_sink_bias.weight ?
    attn_output.weight              self_attn.o_proj.weight
    ffn_norm.weight                 pre_mlp_layernorm.weight post_attention_layernorm.weight
    layer_output_norm.weight        final_layernorm.weight ?
    nextn.shared_head_norm.weight   shared_head.norm.weight ?
"""

_STEP_NORM = "transformer.shared_head.norm.weight shared_head.norm.weight"
_STEP_OUTPUT = (
    "transformer.shared_head.output.weight shared_head.output.weight shared_head.head.weight"
)
_STEP = f"""{_LAYER}{_JOIN}{_FFN_NORM}{_ATTENTION}{_optional(_QK_NORM)}
    attn_gate.weight                self_attn.g_proj.weight ?
    nextn.embed_tokens.weight       embed_tokens.weight ?
    nextn.shared_head_norm.weight   {_STEP_NORM}
    nextn.shared_head_head.weight   {_STEP_OUTPUT} ?
"""
_STEP_MOE = f"""{_LAYER}
    ffn_gate_inp.weight             moe.gate.weight
    exp_probs_b.bias                moe.router_bias ?
"""
_STEP_MOE += _each("gate up down", "ffn_*_exps.weight moe.*_proj.weight")
_STEP_MOE += _each("gate up down", "ffn_*_shexp.weight share_expert.*_proj.weight ?")

_HY = _LAYER + _JOIN + _SHARED_HEAD + _FFN_NORM + _ATTENTION + _QK_NORM
_HY += "nextn.shared_head_norm.weight final_layernorm.weight shared_head.norm.weight\n"
_HY_MOE = f"""{_LAYER}
    ffn_gate_inp.weight             mlp.router.gate.weight mlp.gate.weight
    exp_probs_b                     mlp.expert_bias mlp.gate.expert_bias ?
"""
_HY_MOE += _experts() + _each(
    "gate up down",
    "ffn_*_shexp.weight mlp.shared_mlp.*_proj.weight mlp.shared_experts.*_proj.weight ?",
)

_COHERE = _LAYER + _JOIN + _SHARED_HEAD + _NORM + _ATTENTION
_COHERE += "nextn.shared_head_norm.weight shared_head.norm.weight ?\n"

# Two entries of the checkpoint make one block: attention, then experts without a gate, which may
# work in a space narrower than the residual stream. The attention has no positions, and so no order
# of rows within a head that would matter.
_NEMOTRON = f"""
    [mtp.layers.0.]{_JOIN}
    attn_norm.weight                norm.weight
    attn_q.weight                   mixer.q_proj.weight
    attn_k.weight                   mixer.k_proj.weight
    attn_v.weight                   mixer.v_proj.weight
    attn_output.weight              mixer.o_proj.weight
    [mtp.layers.1.]
    post_attention_norm.weight      norm.weight
    nextn.shared_head_norm.weight   final_layernorm.weight
"""
_NEMOTRON_BIAS = "gate.e_score_correction_bias gate.e_score_correction.bias"
_NEMOTRON_MOE = f"""
    [mtp.layers.1.mixer.]
    ffn_gate_inp.weight             gate.weight
    exp_probs_b.bias                {_NEMOTRON_BIAS}
    {_experts("experts", "up")}
    ffn_up_shexp.weight             shared_experts.up_proj.weight
    ffn_down_shexp.weight           shared_experts.down_proj.weight
    ffn_latent_down.weight          fc1_latent_proj.weight ?
    ffn_latent_up.weight            fc2_latent_proj.weight ?
"""

_BAILING = _LAYER + _JOIN + _FFN_NORM
_BAILING += _LATENT_ATTENTION.replace("self_attn.o_proj", "self_attn.dense.weight self_attn.o_proj")
_BAILING += """
    attn_gate.weight                self_attn.g_proj.weight
    layer_output_norm.weight        final_layernorm.weight
"""
_BAILING = _BAILING.replace("self_attn.", "attention.")
_BAILING_QUERY = tuple(table.replace("self_attn.", "attention.") for table in _DEEPSEEK_QUERY)
_BAILING_MOE = _LAYER + _GATE + "exp_probs_b.bias mlp.gate.expert_bias ?\n"
_BAILING_MOE += _experts() + _SHARED_EXPERTS


# --- per-layer metadata ---------------------------------------------------------------------------


def _of_heads(config: Config, key: str, first: int, n: int) -> list[Any]:
    """What a list of config.json says of the heads; None beyond its end."""
    values = config.get(key)
    return [*(values if isinstance(values, list) else []), *[None] * (first + n)][first : first + n]


def _sliding(config: Config, first: int, n: int) -> list[bool]:
    return [t == "sliding_attention" for t in _of_heads(config, "layer_types", first, n)]


def _step_arrays(config: Config, first: int, n: int) -> Arrays:
    sliding, other = _sliding(config, first, n), config.get("attention_other_setting")

    def each(key: str) -> list[Any]:
        own = other if isinstance(other, dict) and key in other else config
        return [(own if s else config).get(key) for s in sliding]

    def limits(key: str) -> list[float]:
        return [float(v or 0.0) for v in _of_heads(config, key, first, n)]

    return {
        "attention.head_count": each("num_attention_heads"),
        "attention.head_count_kv": each("num_attention_groups"),
        "attention.sliding_window_pattern": sliding,
        "swiglu_clamp_exp": limits("swiglu_limits"),
        "swiglu_clamp_shexp": limits("swiglu_limits_shared"),
    }


def _mimo_arrays(config: Config, first: int, n: int) -> Arrays:
    return {
        "attention.head_count_kv": [config.get("swa_num_key_value_heads")] * n,
        "attention.sliding_window_pattern": [True] * n,
    }


def _sparse_arrays(config: Config, first: int, n: int) -> Arrays:
    # One for each layer of the trunk: the heads' attention is dense, and the host wants none.
    types = config.get("indexer_types")
    types = types if isinstance(types, list) else []
    return {"attention.indexer.types": [t == "full" for t in types][:first]}


def _nemotron_arrays(config: Config, first: int, n: int) -> Arrays:
    return {
        "attention.head_count_kv": [config.get("num_key_value_heads")] * n,
        "feed_forward_length": [config.get("moe_intermediate_size")] * n,
    }


# --- the families ---------------------------------------------------------------------------------


def _qwen(arch: str, models: tuple[str, ...], network: str) -> Family:
    return Family(
        arch,
        models,
        _QWEN,
        ((network,),),
        count_key="mtp_num_hidden_layers",
        norms_less_one=True,
        arrays=lambda config, first, n: {"attention.recurrent_layers": [False] * n},
    )


FAMILIES: tuple[Family, ...] = (
    _qwen("qwen35", ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"), _MTP_LAYER + _MLP),
    _qwen("qwen35moe", ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"), _QWEN_MOE),
    _qwen("qwen3next", ("Qwen3NextForCausalLM",), _QWEN_MOE),
    Family(
        "glm4moe",
        ("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration"),
        _LAYER + _JOIN + _SHARED_HEAD + _POST_NORM + _ATTENTION + _optional(_QK_NORM),
        ((_DEEPSEEK_MOE, _DENSE),),
    ),
    Family(
        "deepseek2",
        ("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "DeepseekV2ForCausalLM"),
        _DEEPSEEK,
        (_DEEPSEEK_QUERY, (_DEEPSEEK_MOE, _DENSE)),
    ),
    Family(
        "deepseek32",
        ("DeepseekV32ForCausalLM",),
        _DEEPSEEK + _INDEXER,
        (_DEEPSEEK_QUERY, (_DEEPSEEK_MOE,)),
    ),
    Family(
        "glm-dsa",
        ("GlmMoeDsaForCausalLM",),
        _DEEPSEEK + _optional(_INDEXER),
        (_DEEPSEEK_QUERY, (_DEEPSEEK_MOE,)),
        arrays=_sparse_arrays,
    ),
    Family(
        "mimo2",
        ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
        _MIMO,
        ((_MTP_LAYER + _MLP,),),
        count_key="",
        arrays=_mimo_arrays,
    ),
    Family(
        "step35",
        ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
        _STEP,
        ((_DENSE, _STEP_MOE),),
        norms_less_one=True,
        arrays=_step_arrays,
    ),
    Family("hy_v3", ("HYV3ForCausalLM",), _HY, ((_HY_MOE, _DENSE),)),
    Family(
        "cohere2moe",
        ("Cohere2MoeForCausalLM",),
        _COHERE,
        ((_LAYER + _GATE + _experts() + _SHARED_EXPERTS,),),
        arrays=lambda *heads: {"attention.sliding_window_pattern": _sliding(*heads)},
    ),
    Family(
        "nemotron_h_moe",
        ("NemotronHForCausalLM",),
        _NEMOTRON,
        ((_NEMOTRON_MOE,),),
        vocab_multiple=8,
        arrays=_nemotron_arrays,
    ),
    Family(
        "bailingmoe3",
        ("BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"),
        _BAILING,
        (_BAILING_QUERY, (_BAILING_MOE,)),
        arrays=lambda config, first, n: {"attention.head_count_kv": [1] * n},
    ),
)
