"""HF checkpoints of the constructed models: names and conventions of every family, once more.

The head of a constructed model is written down as the checkpoint that it would have come from.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.model import Gguf
from llama_mtp.heads.hf.reader import read_head
from llama_mtp.heads.source import HeadSource
from llama_mtp.heads.split import strip
from models.families import FAMILIES

Array = npt.NDArray[Any]

Tensors = dict[str, Array]

# Config keys and tensor names below are those of the checkpoints that these models come from.
MODEL = {
    "qwen35": "Qwen3_5ForConditionalGeneration",
    "qwen35moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3next": "Qwen3NextForCausalLM",
    "glm4moe": "Glm4MoeForCausalLM",
    "deepseek2": "DeepseekV3ForCausalLM",
    "deepseek32": "DeepseekV32ForCausalLM",
    "glm-dsa": "GlmMoeDsaForCausalLM",
    "mimo2": "MiMoV2FlashForCausalLM",
    "step35": "Step3p5ForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "cohere2moe": "Cohere2MoeForCausalLM",
    "nemotron_h_moe": "NemotronHForCausalLM",
    "bailingmoe3": "BailingMoeV3ForCausalLM",
}

MULTIMODAL = ("qwen35", "qwen35moe")  # the language model's config is inside, and its names below

NORMS_LESS_ONE = ("qwen35", "qwen35moe", "qwen3next", "step35")

BF16 = "BF16"


def write_shard(path: Path, tensors: dict[str, tuple[str, Array]]) -> None:
    """Write one safetensors file: name to (type, bits)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, bits) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(bits.shape),
            "data_offsets": [at, at + bits.nbytes],
        }
        at += bits.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, bits in tensors.values():
            file.write(np.ascontiguousarray(bits).tobytes())


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, Array]], shards: int = 2
) -> Path:
    """Write a checkpoint; its tensors go to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    places: dict[str, str] = {}
    for k in range(shards):
        name = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % shards == k}
        write_shard(folder / name, part)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def bf16_bits(values: Array) -> Array:
    """Round to BF16, ties to even: the nearer one of the two neighbours."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
    low, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (low % 2 == 1))
    return (low + up).astype("<u2")


def bf16_values(bits: Array) -> Array:
    return (bits.astype("<u4") << 16).view("<f4")


def stored_as(dtype: str, values: Array) -> tuple[str, Array]:
    if dtype == BF16:
        return dtype, bf16_bits(values)
    return dtype, np.ascontiguousarray(values, dtype={"F32": "<f4", "F16": "<f2"}[dtype])


class Oracle:
    """A constructed model, its head by name, and the same head as a checkpoint."""

    def __init__(self, arch: str, folder: Path, n_heads: int = 1) -> None:
        self.arch = arch
        folder.mkdir()
        self.file = FAMILIES[arch].build(folder, n_heads, 5).path
        self.base = strip(self.file, folder / "trunk.gguf")
        self.reader = gguf.GGUFReader(self.file)
        self.n_heads = n_heads
        self.n_trunk = int(self.key("block_count")) - n_heads
        rng = np.random.default_rng(9)
        self.head: Tensors = {}
        for tensor in self.reader.tensors:
            if match := re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name):
                block = int(match[1]) - self.n_trunk
                if block >= 0:
                    self.head[f"blk.{block}.{match[2]}"] = np.array(tensor.data)
        self.trained = dict(self.head)
        for name, values in self.head.items():
            if "norm" in name:  # all alike in the file; BF16 holds these, and their difference to 1
                self.head[name] = (rng.integers(64, 192, values.shape) / 128).astype("f4")

    def key(self, name: str) -> Any:
        field = self.reader.get_field(f"{self.arch}.{name}")
        assert field is not None
        return field.contents()

    def config(self) -> dict[str, Any]:
        """The config.json of the model, as far as a reader of heads may ask."""
        config: dict[str, Any] = {
            "num_hidden_layers": self.n_trunk,
            "hidden_size": self.key("embedding_length"),
            "vocab_size": len(self.tokens()),
        }
        count = "mtp_num_hidden_layers" if self.arch.startswith("qwen") else ""
        if self.arch != "mimo2":
            config[count or "num_nextn_predict_layers"] = self.n_heads
        if "blk.0.ffn_gate_inp.weight" in self.head:
            count = "num_experts" if "qwen" in self.arch else "n_routed_experts"
            config[count] = self.key("expert_count")
        if "blk.0.attn_k_b.weight" in self.head:
            keys, values = self.head["blk.0.attn_k_b.weight"], self.head["blk.0.attn_v_b.weight"]
            config |= {
                "num_attention_heads": keys.shape[0],
                "qk_nope_head_dim": keys.shape[2],
                "v_head_dim": values.shape[1],
            }
        if self.arch == "mimo2":
            config |= {
                "num_attention_heads": self.key("attention.head_count"),
                "swa_num_key_value_heads": self.key("attention.head_count_kv"),
                "head_dim": self.key("attention.key_length"),
                "v_head_dim": self.key("attention.value_length"),
            }
        if self.arch in ("step35", "cohere2moe"):
            sliding = self.key("attention.sliding_window_pattern")
            config["layer_types"] = [
                "sliding_attention" if s else "full_attention" for s in sliding
            ]
        if self.arch == "step35":
            config["num_attention_heads"] = self.key("attention.head_count")
            config["num_attention_groups"] = self.key("attention.head_count_kv")
        if self.arch == "glm-dsa":
            types = self.key("attention.indexer.types")
            config["indexer_types"] = ["full" if t else "shared" for t in types]
        if self.arch == "nemotron_h_moe":
            config["hybrid_override_pattern"] = "M*EME"
            config["num_key_value_heads"] = self.key("attention.head_count_kv")[-1]
            config["moe_intermediate_size"] = self.key("feed_forward_length")[-1]
        if self.arch in MULTIMODAL:
            config = {"text_config": config, "vision_config": {"hidden_size": 1}}
        return {"architectures": [MODEL[self.arch]], **config}

    def tokens(self) -> list[str]:
        field = self.reader.get_field("tokenizer.ggml.tokens")
        assert field is not None
        return list(field.contents())

    def tensors(self, head: Tensors | None = None) -> Tensors:
        """The head in the names and conventions of the checkpoint."""
        out: Tensors = {}
        for name, values in (self.head if head is None else head).items():
            block, part = name.removeprefix("blk.").split(".", 1)
            if self.arch in NORMS_LESS_ONE and part.endswith("norm.weight"):
                values = values - np.float32(1)
            out |= express(self.arch, int(block), self.n_trunk, part, values)
        return merge_kv_b(out)


def merge_kv_b(tensors: Tensors) -> Tensors:
    """Put the halves of kv_b together: the keys of a head, then its values."""
    for name in [n for n in tensors if n.endswith(".key_half")]:
        place = name.removesuffix(".key_half")
        keys, values = tensors.pop(name), tensors.pop(place + ".value_half")
        both = np.concatenate([keys.transpose(0, 2, 1), values], axis=1)
        tensors[place] = both.reshape(-1, both.shape[-1])
    return tensors


PLAIN = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_sinks.weight": "self_attn.attention_sink_bias",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_k_b.weight": "self_attn.kv_b_proj.weight.key_half",
    "attn_v_b.weight": "self_attn.kv_b_proj.weight.value_half",
    "indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer.proj.weight": "self_attn.indexer.weights_proj.weight",
    "indexer.attn_k.weight": "self_attn.indexer.wk.weight",
    "indexer.attn_q_b.weight": "self_attn.indexer.wq_b.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps.weight": "mlp.experts.N.gate_proj.weight",
    "ffn_up_exps.weight": "mlp.experts.N.up_proj.weight",
    "ffn_down_exps.weight": "mlp.experts.N.down_proj.weight",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.shared_head_norm.weight": "shared_head.norm.weight",
    "nextn.embed_tokens.weight": "embed_tokens.weight",
    "nextn.shared_head_head.weight": "shared_head.head.weight",
}

QWEN_JOIN = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}

OTHERWISE: dict[str, dict[str, str]] = {
    "mimo2": {"ffn_norm.weight": "pre_mlp_layernorm.weight"},
    "step35": {
        "attn_gate.weight": "self_attn.g_proj.weight",
        "ffn_gate_inp.weight": "moe.gate.weight",
        "exp_probs_b.bias": "moe.router_bias",
        "ffn_gate_exps.weight": "moe.gate_proj.weight",
        "ffn_up_exps.weight": "moe.up_proj.weight",
        "ffn_down_exps.weight": "moe.down_proj.weight",
        "ffn_gate_shexp.weight": "share_expert.gate_proj.weight",
        "ffn_up_shexp.weight": "share_expert.up_proj.weight",
        "ffn_down_shexp.weight": "share_expert.down_proj.weight",
        "nextn.shared_head_norm.weight": "transformer.shared_head.norm.weight",
    },
    "hy_v3": {
        "ffn_gate_inp.weight": "mlp.router.gate.weight",
        "exp_probs_b": "mlp.expert_bias",
        "ffn_gate_shexp.weight": "mlp.shared_mlp.gate_proj.weight",
        "ffn_up_shexp.weight": "mlp.shared_mlp.up_proj.weight",
        "ffn_down_shexp.weight": "mlp.shared_mlp.down_proj.weight",
        "nextn.shared_head_norm.weight": "final_layernorm.weight",
    },
    "bailingmoe3": {
        "exp_probs_b.bias": "mlp.gate.expert_bias",
        "attn_output.weight": "self_attn.dense.weight",
        "attn_gate.weight": "self_attn.g_proj.weight",
        "layer_output_norm.weight": "final_layernorm.weight",
    },
}

NEMOTRON = {
    "attn_norm.weight": "0.norm.weight",
    "attn_q.weight": "0.mixer.q_proj.weight",
    "attn_k.weight": "0.mixer.k_proj.weight",
    "attn_v.weight": "0.mixer.v_proj.weight",
    "attn_output.weight": "0.mixer.o_proj.weight",
    "nextn.eh_proj.weight": "0.eh_proj.weight",
    "nextn.enorm.weight": "0.enorm.weight",
    "nextn.hnorm.weight": "0.hnorm.weight",
    "post_attention_norm.weight": "1.norm.weight",
    "ffn_gate_inp.weight": "1.mixer.gate.weight",
    "exp_probs_b.bias": "1.mixer.gate.e_score_correction_bias",
    "ffn_up_exps.weight": "1.mixer.experts.N.up_proj.weight",
    "ffn_down_exps.weight": "1.mixer.experts.N.down_proj.weight",
    "ffn_up_shexp.weight": "1.mixer.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "1.mixer.shared_experts.down_proj.weight",
    "nextn.shared_head_norm.weight": "1.final_layernorm.weight",
}


def express(arch: str, head: int, n_trunk: int, part: str, values: Array) -> Tensors:
    """One tensor of a block as the checkpoint has it."""
    if arch == "nemotron_h_moe":
        name = "mtp.layers." + NEMOTRON[part]
    elif arch.startswith("qwen"):
        if part == "ffn_gate_inp_shexp.weight":
            return {f"mtp.layers.{head}.mlp.shared_expert_gate.weight": values.reshape(1, -1)}
        plain = PLAIN.get(part, "").replace("shared_experts", "shared_expert")
        name = QWEN_JOIN.get(part, f"mtp.layers.{head}.{plain}")
    else:
        name = OTHERWISE.get(arch, {}).get(part) or PLAIN[part]
        if arch == "bailingmoe3":
            name = name.replace("self_attn.", "attention.")
        layer = f"model.mtp.layers.{head}" if arch == "mimo2" else f"model.layers.{n_trunk + head}"
        name = f"{layer}.{name}"
    if ".N." in name:
        return {name.replace(".N.", f".{e}."): one for e, one in enumerate(values)}
    return {name: values}


def write_oracle(
    oracle: Oracle, folder: Path, dtype: str = "F32", head: Tensors | None = None
) -> Path:
    """Write the head as a checkpoint; routers' biases are F32 in every one."""
    tensors = {
        name: stored_as("F32" if "bias" in name else dtype, values)
        for name, values in oracle.tensors(head).items()
    }
    tensors["model.embed_tokens.weight"] = stored_as("F16", np.zeros((4, 4)))
    return write_folder(folder, oracle.config(), tensors)


def values_of(head: HeadSource) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Name to (type, shape in numpy order, data) of a head."""
    found = {}
    for tensor in head.tensors:
        data = b"".join(bytes(memoryview(chunk).cast("B")) for chunk in tensor.chunks())
        assert len(data) == tensor.n_bytes
        found[tensor.name] = (tensor.type, tensor.shape[::-1], data)
    return found


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def refused(folder: Path, model: Oracle) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_head(folder, Gguf.open(model.base))
    return str(caught.value)


def qkv_rows(model: Oracle) -> tuple[int, int, int]:
    config = model.config()
    heads, keys = config["num_attention_heads"], config["swa_num_key_value_heads"]
    return (
        heads * config["head_dim"],
        keys * config["head_dim"],
        keys * config["v_head_dim"],
    )
