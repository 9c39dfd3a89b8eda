"""The MTP head of a Hugging Face checkpoint: names, conventions, types, and what is refused.

The oracle is the constructed model itself: its head is written down as the checkpoint that it would
have come from, with the names and conventions of its family spelt out here once more, and has to
come back bit for bit.
"""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from models.families import FAMILIES
from models.families.common import Files

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import entry, metadata_of
from llama_mtp.gguf.model import Gguf
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.graft import graft
from llama_mtp.heads.hf.reader import read_head
from llama_mtp.heads.source import HeadSource
from llama_mtp.heads.split import strip

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


# --- writing checkpoints --------------------------------------------------------------------------


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


# --- the models -----------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Oracle]:
    built: dict[tuple[str, int], Oracle] = {}

    def get(arch: str, n_heads: int = 1) -> Oracle:
        if (arch, n_heads) not in built:
            folder = tmp_path_factory.mktemp("oracle") / arch
            built[arch, n_heads] = Oracle(arch, folder, n_heads)
        return built[arch, n_heads]

    return get


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


# --- every family ---------------------------------------------------------------------------------

CASES = [(arch, 1) for arch in MODEL] + [("mimo2", 3), ("step35", 3), ("hy_v3", 2)]


@pytest.mark.parametrize(("arch", "n_heads"), CASES)
def test_head_comes_back_bit_for_bit(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, n_heads: int
) -> None:
    model = oracle(arch, n_heads)
    head = read_head(write_oracle(model, tmp_path), Gguf.open(model.base))
    assert (head.architecture, head.n_heads) == (arch, n_heads)
    found = values_of(head)
    assert found.keys() == model.head.keys()
    for name, (kind, shape, data) in found.items():
        assert kind == gguf.GGMLQuantizationType.F32
        assert squeezed(shape) == squeezed(model.head[name].shape), name
        assert data == model.head[name].tobytes(), name


@pytest.mark.parametrize("arch", ["qwen35moe", "deepseek2", "mimo2"])
def test_size_of_the_pieces_does_not_matter(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oracle(arch)
    monkeypatch.setattr("llama_mtp.heads.hf.weights.CHUNK", 600)
    head = read_head(write_oracle(model, tmp_path), Gguf.open(model.base))
    data = {name: data for name, (_, _, data) in values_of(head).items()}
    assert data == {name: values.tobytes() for name, values in model.head.items()}


@pytest.mark.parametrize(("arch", "n_heads"), CASES)
def test_grafted_file_is_the_whole_model_again(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, n_heads: int
) -> None:
    model = oracle(arch, n_heads)
    folder = write_oracle(model, tmp_path / "checkpoint", head=model.trained)
    out = tmp_path / "joined.gguf"
    graft(model.base, folder, out)
    again = gguf.GGUFReader(out)
    assert {t.name: t.data.tobytes() for t in again.tensors} == {
        t.name: t.data.tobytes() for t in model.reader.tensors
    }
    whole = {key: field.contents() for key, field in model.reader.fields.items()}
    whole = {key: value for key, value in whole.items() if not key.startswith("GGUF.")}
    joined = {key: field.contents() for key, field in again.fields.items()}
    assert {key: joined.get(key) for key in whole} == whole


@pytest.mark.parametrize("arch", ["qwen35moe", "deepseek2", "mimo2"])
def test_grafted_model_drafts_what_the_whole_one_drafts(
    oracle: Callable[..., Oracle], tmp_path: Path, ours: Callable[..., Any], arch: str
) -> None:
    model = oracle(arch)
    out = tmp_path / "joined.gguf"
    graft(model.base, write_oracle(model, tmp_path / "checkpoint", head=model.trained), out)
    prompt = list(range(300, 320))
    said = []
    for path in (model.file, out):
        llm = ours(Files(path))
        tokens = [t for t, _ in zip(llm.generate(prompt, temp=0.0), range(64), strict=False)]
        stats = llm.spec_stats
        said.append((tokens, stats.num_draft_tokens, stats.num_accepted_tokens))
    assert said[0] == said[1]
    assert said[0][2] > 0


def test_per_layer_list_is_continued(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    """Newer conversions list the recurrent layers; the head's is none."""
    model = oracle("qwen35")
    header = read_header(model.base)
    key = "qwen35.attention.recurrent_layers"
    metadata = metadata_of(header) | {key: entry(key, [True, False] * 2)}
    base = tmp_path / "base.gguf"
    write_gguf(base, metadata, [stored(header, tensor) for tensor in header.tensors.values()])
    graft(base, write_oracle(model, tmp_path / "checkpoint"), tmp_path / "joined.gguf")
    field = gguf.GGUFReader(tmp_path / "joined.gguf").get_field(key)
    assert field is not None and field.contents() == [True, False, True, False, False]


# --- types ----------------------------------------------------------------------------------------


def expect(model: Oracle, name: str, dtype: str) -> tuple[int, bytes]:
    """Type and data that a tensor must have when the checkpoint holds it as ``dtype``."""
    values = model.head[name]
    one_row = values.ndim == 1 or name.endswith("norm.weight")
    if one_row or "bias" in name or "ffn_gate_inp" in name or "indexer.proj" in name:
        if dtype == "F16" and not one_row and "bias" not in name:
            values = values.astype("f2").astype("f4")
        if dtype == BF16 and not one_row and "bias" not in name:
            values = bf16_values(bf16_bits(values))
        return gguf.GGMLQuantizationType.F32, values.tobytes()
    kind, bits = stored_as(dtype, values)
    return gguf.GGMLQuantizationType[kind], bits.tobytes()


@pytest.mark.parametrize("dtype", [BF16, "F16"])
@pytest.mark.parametrize("arch", ["qwen35", "qwen35moe", "deepseek32", "nemotron_h_moe"])
def test_types_stay_and_small_tensors_become_f32(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, dtype: str
) -> None:
    model = oracle(arch)
    head = read_head(write_oracle(model, tmp_path, dtype), Gguf.open(model.base))
    for name, (kind, _, data) in values_of(head).items():
        if name == "blk.0.ffn_gate_inp_shexp.weight":  # a vector here, a row in the checkpoint
            _, bits = stored_as(dtype, model.head[name])
            wide = bf16_values(bits) if dtype == BF16 else bits.astype("f4")
            assert (kind, data) == (gguf.GGMLQuantizationType.F32, wide.tobytes())
        else:
            assert (kind, data) == expect(model, name, dtype), name


def fp8_value(code: int) -> float:
    """E4M3 by its definition: no infinities, subnormals at exponent 0."""
    sign, exponent, fraction = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


FP8_VALUES = np.array([fp8_value(code) for code in range(256)], dtype="f4")


def in_fp8(
    rng: np.random.Generator, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Return codes, scales by block, and the BF16 bits that they stand for."""
    codes = rng.integers(0, 0x7F, shape).astype("u1") | (rng.integers(0, 2, shape) << 7).astype(
        "u1"
    )
    blocks = tuple(-(-n // b) for n, b in zip(shape[-2:], block, strict=True))
    scales = rng.uniform(0.001, 0.1, (*shape[:-2], *blocks)).astype("f4")
    rows = np.arange(shape[-2]) // block[0]
    columns = np.arange(shape[-1]) // block[1]
    each = scales[..., rows[:, None], columns[None, :]]
    return codes, scales, bf16_bits(FP8_VALUES[codes] * each)


def as_scale(dtype: str, scales: Array) -> tuple[str, Array]:
    """A scale stored otherwise; E8M0 is a power of two, whose bits are an F32's exponent."""
    if dtype == "F8_E8M0":
        return dtype, (np.ascontiguousarray(scales).view("<u4") >> 23).astype("u1")
    return stored_as(dtype, scales)


@pytest.mark.parametrize("arch", ["deepseek2", "glm4moe"])
@pytest.mark.parametrize(
    ("block", "name", "scale_type"),
    [
        ((16, 24), "weight_scale_inv", "F32"),  # the last column of blocks is not full
        ((16, 32), "weight_scale_inv", "F8_E8M0"),
        ((8, 8), "weight_scale_inv", "F32"),  # of 64 columns: as many scales as rows
        ((16, 2**31 - 1), "weight_scale_inv", "F32"),
        ((1, 10**6), "weight_scale", BF16),  # one scale for each row
        ((10**6, 10**6), "weight_scale", "F32"),  # one in all
    ],
)
def test_fp8_becomes_bf16(
    oracle: Callable[..., Oracle],
    tmp_path: Path,
    arch: str,
    block: tuple[int, int],
    name: str,
    scale_type: str,
) -> None:
    model = oracle(arch)
    rng = np.random.default_rng(3)
    tensors: dict[str, tuple[str, Array]] = {}
    wanted: Tensors = {}
    for place, values in model.tensors().items():
        if values.ndim == 1 or place.endswith(("norm.weight", "mlp.gate.weight")):
            tensors[place] = stored_as("F32", values)
            continue
        codes, scales, _ = in_fp8(rng, values.shape, block)
        kind, bits = as_scale(scale_type, scales)
        if scale_type != "F32":
            scales = bf16_values(bits) if scale_type == BF16 else np.exp2(bits.astype("f4") - 127)
        rows = np.arange(values.shape[0])[:, None] // block[0]
        columns = np.arange(values.shape[1])[None, :] // block[1]
        tensors[place] = ("F8_E4M3", codes)
        tensors[place.removesuffix("weight") + name] = (kind, bits)
        wanted[place] = bf16_bits(FP8_VALUES[codes] * scales[rows, columns])
    config = model.config() | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}
    }
    folder = write_folder(tmp_path, config, tensors)
    found = values_of(read_head(folder, Gguf.open(model.base)))
    placed: dict[str, Array] = {}
    for full, (kind_number, shape, data) in found.items():
        if kind_number == gguf.GGMLQuantizationType.BF16:
            part = full.removeprefix("blk.0.")
            bits = np.frombuffer(data, "<u2").reshape(shape)
            placed |= express(arch, 0, model.n_trunk, part, bits)
    merged = merge_kv_b(placed)
    assert merged.keys() == wanted.keys()
    for place, bits in wanted.items():
        np.testing.assert_array_equal(merged[place], bits, err_msg=place)


def test_every_code_of_fp8(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    """Both kinds, with their infinities and what is no number."""
    model = oracle("qwen35")
    codes = np.resize(np.arange(256), (64, 128)).astype("u1")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    for dtype, width, highest in [("F8_E4M3", 3, 15), ("F8_E5M2", 2, 31)]:
        tensors["mtp.fc.weight"] = (dtype, codes)
        tensors["mtp.fc.weight_scale_inv"] = stored_as("F32", np.ones(1))
        head = read_head(write_folder(tmp_path, model.config(), tensors), Gguf.open(model.base))
        found = bf16_values(np.frombuffer(values_of(head)["blk.0.nextn.eh_proj.weight"][2], "<u2"))
        for code, value in zip(range(256), found, strict=False):
            sign = -1.0 if code & 128 else 1.0
            exponent, fraction = (code & 127) >> width, (code & (2**width - 1)) / 2**width
            bias = highest // 2
            wanted = sign * (1 + fraction) * 2.0 ** (exponent - bias)
            if exponent == 0:
                wanted = sign * fraction * 2.0 ** (1 - bias)
            if dtype == "F8_E5M2" and exponent == highest:
                wanted = float("nan") if fraction else sign * float("inf")
            if dtype == "F8_E4M3" and code & 127 == 127:
                wanted = float("nan")
            np.testing.assert_equal(float(value), wanted, err_msg=f"{dtype} {code}")


# --- other forms of the same tensors --------------------------------------------------------------


def stack(tensors: Tensors, kind: str) -> Array:
    """Take the experts' matrices of one kind out of a head and stack them."""
    names = [n for n in tensors if f".{kind}_proj." in n and re.search(r"experts\.\d+\.", n)]
    return np.stack([tensors.pop(n) for n in names])


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("form", ["stacked", "gate above up"])
@pytest.mark.parametrize("arch", ["qwen35moe", "glm4moe"])
def test_experts_may_be_stacked_and_fused(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, form: str, suffix: str
) -> None:
    model = oracle(arch)
    tensors = model.tensors()
    place = next(n for n in tensors if ".experts.0." in n).split(".experts.")[0] + ".experts."
    gate, up, down = (stack(tensors, kind) for kind in ("gate", "up", "down"))
    tensors[f"{place}down_proj{suffix}"] = down
    if form == "stacked":
        tensors |= {f"{place}gate_proj{suffix}": gate, f"{place}up_proj{suffix}": up}
    else:
        tensors[f"{place}gate_up_proj{suffix}"] = np.concatenate([gate, up], axis=1)
    folder = write_folder(
        tmp_path, model.config(), {n: stored_as("F32", v) for n, v in tensors.items()}
    )
    found = values_of(read_head(folder, Gguf.open(model.base)))
    assert {n: d for n, (_, _, d) in found.items()} == {
        n: v.tobytes() for n, v in model.head.items()
    }


def test_fused_experts_may_be_fp8(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35moe")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items() if ".experts." not in n}
    n_experts, n_rows, n_columns = model.head["blk.0.ffn_gate_exps.weight"].shape
    wanted = {}
    place = "mtp.layers.0.mlp.experts."
    for name, shape in {
        "gate_up_proj": (n_experts, 2 * n_rows, n_columns),
        "down_proj": (n_experts, n_columns, n_rows),
    }.items():
        codes, scales, wanted[name] = in_fp8(np.random.default_rng(5), shape, (24, 24))
        tensors[place + name] = ("F8_E4M3", codes)
        tensors[place + name + "_scale_inv"] = ("F32", scales)
    config = model.config() | {"quantization_config": {"weight_block_size": [24, 24]}}
    found = values_of(read_head(write_folder(tmp_path, config, tensors), Gguf.open(model.base)))
    halves = {
        "gate": wanted["gate_up_proj"][:, :n_rows],
        "up": wanted["gate_up_proj"][:, n_rows:],
        "down": wanted["down_proj"],
    }
    for kind, bits in halves.items():
        assert found[f"blk.0.ffn_{kind}_exps.weight"][2] == bits.tobytes(), kind


def qkv_rows(model: Oracle) -> tuple[int, int, int]:
    config = model.config()
    heads, keys = config["num_attention_heads"], config["swa_num_key_value_heads"]
    return (
        heads * config["head_dim"],
        keys * config["head_dim"],
        keys * config["v_head_dim"],
    )


def test_query_key_and_value_are_fused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("mimo2", 3)
    tensors = model.tensors()
    n_q, n_k, _ = qkv_rows(model)
    for head in range(3):
        place = f"model.mtp.layers.{head}.self_attn."
        fused = tensors.pop(place + "qkv_proj.weight")
        for part, rows in zip("qkv", np.split(fused, [n_q, n_q + n_k]), strict=True):
            tensors[f"{place}{part}_proj.weight"] = rows
    folder = write_folder(
        tmp_path, model.config(), {n: stored_as("F32", v) for n, v in tensors.items()}
    )
    found = values_of(read_head(folder, Gguf.open(model.base)))
    assert {n: d for n, (_, _, d) in found.items()} == {
        n: v.tobytes() for n, v in model.head.items()
    }


@pytest.mark.parametrize(("ranks", "block"), [(1, 12), (4, 12), (8, 12), (2, 28)])
def test_fused_fp8_rows_are_put_in_order_again(
    oracle: Callable[..., Oracle], tmp_path: Path, ranks: int, block: int
) -> None:
    """Checkpoints in FP8 hold query, key and value by rank, with blocks that start anew in each."""
    model = oracle("mimo2")
    config, rng = model.config(), np.random.default_rng(4)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, 32]}
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    n_columns = config["hidden_size"]
    rows = [n // ranks for n in qkv_rows(model)]
    shards = [in_fp8(rng, (sum(rows), n_columns), (block, 32)) for _ in range(ranks)]
    place = "model.mtp.layers.0.self_attn.qkv_proj.weight"
    tensors[place] = ("F8_E4M3", np.concatenate([codes for codes, _, _ in shards]))
    tensors[place + "_scale_inv"] = ("F32", np.concatenate([s for _, s, _ in shards]))
    split_at = [rows[0], rows[0] + rows[1]]
    parts = [np.split(bits, split_at) for _, _, bits in shards]
    wanted = np.concatenate([part[i] for i in range(3) for part in parts])
    folder = write_folder(tmp_path, config, tensors)
    if ranks == 2:  # no model is known that was made on two
        with pytest.raises(ModelFileError, match=r"qkv_proj\.weight_scale_inv"):
            read_head(folder, Gguf.open(model.base))
        return
    found = values_of(read_head(folder, Gguf.open(model.base)))
    assert found["blk.0.attn_qkv.weight"][2] == wanted.tobytes()


def test_query_without_low_rank(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("deepseek2")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items() if ".q_" not in n}
    place = f"model.layers.{model.n_trunk}.self_attn.q_proj.weight"
    query = np.random.default_rng(0).normal(0, 1, (64, 64)).astype("f4")
    tensors[place] = ("F32", query)
    head = read_head(write_folder(tmp_path, model.config(), tensors), Gguf.open(model.base))
    found = values_of(head)
    assert found["blk.0.attn_q.weight"][2] == query.tobytes()
    assert not any("attn_q_" in name for name in found)


@pytest.mark.parametrize(
    "prefix", ["model.mtp.", "language_model.mtp.", "model.language_model.mtp."]
)
def test_prefixes_of_multimodal_models(
    oracle: Callable[..., Oracle], tmp_path: Path, prefix: str
) -> None:
    model = oracle("qwen35")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    tensors = {n.replace("mtp.", prefix, 1): t for n, t in tensors.items()}
    head = read_head(write_folder(tmp_path, model.config(), tensors), Gguf.open(model.base))
    assert {t.name for t in head.tensors} == model.head.keys()


def test_own_embedding_and_output_come_along(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("glm4moe")
    table = np.random.default_rng(0).normal(0, 1, (len(model.tokens()), 64)).astype("f4")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    layer = f"model.layers.{model.n_trunk}."
    tensors[layer + "embed_tokens.weight"] = ("F32", table)
    tensors[layer + "shared_head.head.weight"] = ("F32", 2 * table)
    folder = write_folder(tmp_path / "checkpoint", model.config(), tensors)
    graft(model.base, folder, tmp_path / "joined.gguf")
    joined = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "joined.gguf").tensors}
    place = f"blk.{model.n_trunk}.nextn."
    np.testing.assert_array_equal(joined[place + "embed_tokens.weight"], table)
    np.testing.assert_array_equal(joined[place + "shared_head_head.weight"], 2 * table)


# --- files ----------------------------------------------------------------------------------------


def test_only_the_needed_shards_are_opened(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("glm4moe")
    folder = write_folder(
        tmp_path, model.config(), {n: stored_as("F32", v) for n, v in model.tensors().items()}
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {
        "model.layers.0.mlp.up_proj.weight": "not-downloaded.safetensors",
        "model.layers.1.mlp.up_proj.weight": "damaged.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "damaged.safetensors").write_bytes(b"no tensors")
    assert read_head(folder, Gguf.open(model.base)).n_heads == 1


@pytest.mark.parametrize("name", ["model.safetensors", "mtp.safetensors"])
def test_files_that_no_index_lists_are_found(
    oracle: Callable[..., Oracle], tmp_path: Path, name: str
) -> None:
    model = oracle("qwen35")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    if name == "mtp.safetensors":  # a head beside the model's own shards
        write_folder(tmp_path, {}, {"model.norm.weight": stored_as("F32", np.ones(4))}, shards=1)
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    write_shard(tmp_path / name, tensors)
    assert len(read_head(tmp_path, Gguf.open(model.base)).tensors) == len(model.head)


def test_what_the_index_says_counts(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    """Another file in the folder, such as one in another format, may have the same names."""
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    others = {n: stored_as("F32", np.zeros_like(v)) for n, v in model.tensors().items()}
    write_shard(folder / "a-copy.safetensors", others)
    found = values_of(read_head(folder, Gguf.open(model.base)))
    assert {n: data for n, (_, _, data) in found.items()} == {
        n: values.tobytes() for n, values in model.head.items()
    }


def test_data_is_streamed(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    """Of 130 MB of experts, memory holds a few at a time, in FP8 as well."""
    model = oracle("qwen35moe")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items() if ".experts." not in n}
    write_folder(tmp_path, model.config(), tensors)
    header: dict[str, Any] = {}
    at = 0
    for kind, shape, dtype, width in [
        ("gate_up_proj", [32, 16384, 64], "F8_E4M3", 1),
        ("gate_up_proj_scale_inv", [32, 128, 1], "F32", 4),
        ("down_proj", [32, 64, 16384], "BF16", 2),
    ]:
        size = int(np.prod(shape)) * width
        place = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        header["mtp.layers.0.mlp.experts." + kind] = place
        at += size
    text = json.dumps(header).encode()
    with (tmp_path / "experts.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)  # zeros, which take no space

    base = tmp_path / "wide.gguf"  # the trunk's experts are of another width: leave them out
    writer = gguf.GGUFWriter(base, "qwen35moe")
    for key, value in {"block_count": model.n_trunk, "embedding_length": 64}.items():
        writer.add_uint32(f"qwen35moe.{key}", value)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, dtype="f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    config = model.config()
    del config["text_config"]["num_experts"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        head = read_head(tmp_path, Gguf.open(base))
        n_bytes, largest = 0, 0
        for tensor in head.tensors:
            for chunk in tensor.chunks():
                n_bytes += len(chunk)
                largest = max(largest, len(chunk))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_bytes > 130e6
    assert largest <= 16e6
    assert peak < 60e6


# --- refusals -------------------------------------------------------------------------------------


def refused(folder: Path, model: Oracle) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_head(folder, Gguf.open(model.base))
    return str(caught.value)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("qwen35", "mtp.fc.weight"),
        ("qwen35", "mtp.layers.0.self_attn.q_norm.weight"),
        ("qwen35moe", "mtp.layers.0.mlp.experts.3.up_proj.weight"),
        ("qwen35moe", "mtp.layers.0.mlp.gate.weight"),
        ("glm4moe", "model.layers.3.shared_head.norm.weight"),
        ("deepseek2", "model.layers.2.self_attn.kv_b_proj.weight"),
        ("deepseek2", "model.layers.2.self_attn.q_a_proj.weight"),
        ("mimo2", "mtp.layers.0.self_attn.qkv_proj.weight"),
        ("step35", "model.layers.3.mlp.down_proj.weight"),
    ],
)
def test_missing_tensor_is_named_as_in_the_checkpoint(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, name: str
) -> None:
    model = oracle(arch)
    tensors = {
        n: stored_as("F32", v)
        for n, v in model.tensors().items()
        if n.removeprefix("model.") != name.removeprefix("model.")
    }
    if arch == "step35":  # whose head may have either network: here the dense one, but for a part
        tensors = {n: t for n, t in tensors.items() if ".moe." not in n}
        tensors["model.layers.3.mlp.gate_proj.weight"] = stored_as("F32", np.ones((64, 64)))
        tensors["model.layers.3.mlp.up_proj.weight"] = stored_as("F32", np.ones((64, 64)))
    assert name in refused(write_folder(tmp_path, model.config(), tensors), model)


@pytest.mark.parametrize("arch", ["nemotron_h_moe", "qwen3next", "step35"])
def test_heads_are_counted_where_config_does_not(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str
) -> None:
    model = oracle(arch)
    config = {k: v for k, v in model.config().items() if "nextn" not in k and "mtp" not in k}
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    head = read_head(write_folder(tmp_path, config, tensors), Gguf.open(model.base))
    assert head.n_heads == 1


def test_checkpoint_without_head(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("mimo2")
    write_folder(tmp_path, model.config(), {"model.norm.weight": stored_as("F32", np.ones(4))})
    message = refused(tmp_path, model)
    assert "no MTP head" in message and "mtp.layers.0.input_layernorm.weight" in message


@pytest.mark.parametrize("arch", ["glm4moe", "qwen35"])
def test_missing_shards_are_named_together(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str
) -> None:
    model = oracle(arch)
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    folder = write_folder(tmp_path, model.config(), tensors, shards=3)
    for number in (1, 3):
        (folder / f"model-{number:05}-of-00003.safetensors").unlink()
    message = refused(folder, model)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message
    assert "model-00002" not in message


def test_packed_weights_are_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    del tensors["mtp.layers.0.mlp.up_proj.weight"]
    tensors["mtp.layers.0.mlp.up_proj.qweight"] = ("I32", np.zeros((8, 8), dtype="<i4"))
    message = refused(write_folder(tmp_path, model.config(), tensors), model)
    assert "mtp.layers.0.mlp.up_proj.qweight" in message and "BF16" in message


def test_fp8_without_its_scale_is_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    tensors["mtp.fc.weight"] = ("F8_E4M3", np.zeros((64, 128), dtype="u1"))
    message = refused(write_folder(tmp_path, model.config(), tensors), model)
    assert "mtp.fc.weight_scale_inv" in message


@pytest.mark.parametrize("dtype", ["F4", "I32"])
def test_scales_of_another_type_are_refused(
    oracle: Callable[..., Oracle], tmp_path: Path, dtype: str
) -> None:
    model = oracle("qwen35")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    tensors["mtp.fc.weight"] = ("F8_E4M3", np.zeros((64, 128), dtype="u1"))
    tensors["mtp.fc.weight_scale_inv"] = (dtype, np.ones((1, 1), dtype="<i4"))
    message = refused(write_folder(tmp_path, model.config(), tensors), model)
    assert "mtp.fc.weight_scale_inv" in message and dtype in message


def test_unknown_family_is_told_which_are_known(
    oracle: Callable[..., Oracle], tmp_path: Path
) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    message = refused(folder, model)
    assert "LlamaForCausalLM" in message
    assert all(name in message for name in MODEL.values())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 7, "number of layers is 7"),
        ("hidden_size", 32, "hidden size is 32"),
        ("hidden_size", "64", "hidden_size = '64'"),
        ("hidden_size", None, "hidden_size = None"),
        ("num_nextn_predict_layers", 2, "model.layers.4."),
        ("n_routed_experts", 5, "experts.4."),
    ],
)
def test_another_config_is_refused(
    oracle: Callable[..., Oracle], tmp_path: Path, key: str, value: Any, words: str
) -> None:
    model = oracle("glm4moe")
    folder = write_oracle(model, tmp_path)
    (folder / "config.json").write_text(json.dumps(model.config() | {key: value}))
    assert words in refused(folder, model)


def test_folder_without_config_is_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path, oracle("qwen35"))


def test_another_architecture_is_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    folder = write_oracle(oracle("glm4moe"), tmp_path)
    message = refused(folder, oracle("qwen35"))
    assert "glm4moe" in message and "qwen35" in message


def test_other_shapes_are_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("glm4moe")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    name = f"model.layers.{model.n_trunk}.self_attn.q_proj.weight"
    tensors[name] = stored_as("F32", np.ones((32, 64)))
    message = refused(write_folder(tmp_path, model.config(), tensors), model)
    assert "attn_q.weight" in message and "64 x 32" in message and "64 x 64" in message


def test_base_from_before_mla_is_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("deepseek2")
    header = read_header(model.base)
    old = [
        stored(header, tensor, name.replace("attn_v_b", "attn_kv_b"))
        for name, tensor in header.tensors.items()
        if "attn_k_b" not in name
    ]
    base = tmp_path / "old.gguf"
    write_gguf(base, metadata_of(header), old)
    with pytest.raises(ModelFileError, match="attn_kv_b"):
        read_head(write_oracle(model, tmp_path / "checkpoint"), Gguf.open(base))


# --- vocabulary -----------------------------------------------------------------------------------


def write_tokenizer(folder: Path, tokens: list[str], form: str) -> None:
    """Write a tokenizer's file; the last ten tokens were added by users."""
    own = {text: i for i, text in enumerate(tokens[:-10])}
    added = {text: len(tokens) - 10 + i for i, text in enumerate(tokens[-10:])}
    if form == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(own))
        (folder / "added_tokens.json").write_text(json.dumps(added))
        return
    vocab: Any = [[text, -1.0] for text in own] if form == "unigram" else own
    more = [{"id": i, "content": text, "special": True} for text, i in added.items()]
    content = {"model": {"vocab": vocab}, "added_tokens": more}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["bpe", "unigram", "vocab.json"])
def test_vocabulary_is_compared_token_by_token(
    oracle: Callable[..., Oracle], tmp_path: Path, form: str
) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    tokens = model.tokens()
    assert "tokenizer.ggml.tokens" not in read_head(folder, Gguf.open(model.base)).metadata
    write_tokenizer(folder, tokens, form)
    assert "tokenizer.ggml.tokens" in read_head(folder, Gguf.open(model.base)).metadata
    for number in (300, len(tokens) - 1):
        other = [*tokens[:number], "another", *tokens[number + 1 :]]
        write_tokenizer(folder, other, form)
        message = refused(folder, model)
        assert f"token {number} is 'another'" in message and repr(tokens[number]) in message


def test_base_may_have_tokens_that_fill_up(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    write_tokenizer(folder, model.tokens()[:-20], "bpe")
    assert read_head(folder, Gguf.open(model.base)).n_vocab == len(model.tokens())
    write_tokenizer(folder, [*model.tokens(), "one more"], "bpe")
    assert "one more" in refused(folder, model)


@pytest.mark.parametrize(("arch", "kept"), [("nemotron_h_moe", False), ("glm4moe", True)])
def test_conversion_may_fill_the_vocabulary_up(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str, kept: bool
) -> None:
    model = oracle(arch)
    n_tokens = len(model.tokens())
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    config = model.config() | {"vocab_size": n_tokens - 7}
    head = read_head(write_folder(tmp_path, config, tensors), Gguf.open(model.base))
    assert head.n_vocab == (n_tokens - 7 if kept else n_tokens)


def test_tokens_that_conversion_spells_otherwise(
    oracle: Callable[..., Oracle], tmp_path: Path
) -> None:
    """Spaces of added tokens, and names for ids that had no token yet."""
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path / "checkpoint")
    tokens = model.tokens()
    header = read_header(model.base)
    here = [*tokens[:-2], f"[PAD{len(tokens) - 2}]", "<a new one>"]
    metadata = metadata_of(header)
    metadata["tokenizer.ggml.tokens"] = entry("tokenizer.ggml.tokens", here)
    base = tmp_path / "base.gguf"
    write_gguf(base, metadata, [stored(header, tensor) for tensor in header.tensors.values()])
    write_tokenizer(folder, [*tokens[:-2], "<added later>", "<a\u2581new\u2581one>"], "bpe")
    assert "tokenizer.ggml.tokens" in read_head(folder, Gguf.open(base)).metadata


# --- damaged and hostile files --------------------------------------------------------------------


def with_header(text: bytes, data: bytes = bytes(64)) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def one(**entry: Any) -> bytes:
    good = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    return with_header(json.dumps({"mtp.fc.weight": {**good, **entry}}).encode())


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08",
    "length beyond the file": struct.pack("<Q", 2**63) + b"{}",
    "length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "no JSON": with_header(b"\x00\xff{"),
    "a list": with_header(b"[]"),
    "deep": with_header(b"[" * 200_000),
    "no entry": with_header(b'{"mtp.fc.weight": 3}'),
    "end beyond the file": one(data_offsets=[0, 65]),
    "start beyond the file": one(data_offsets=[2**62, 2**62 + 64]),
    "start after end": one(data_offsets=[64, 0]),
    "negative start": one(data_offsets=[-64, 0]),
    "size that is not the shape's": one(shape=[4, 5]),
    "shape beyond 64 bits": one(shape=[2**40, 2**40]),
    "nothing, in many rows": one(shape=[2**40, 0], data_offsets=[0, 0]),
    "nothing, in too many rows": one(shape=[2**70, 0], data_offsets=[0, 0]),
    "negative shape": one(shape=[-4, -4]),
    "shape of text": one(shape=["4", 4]),
    "truth as a number": one(shape=[True, 16]),
    "many dimensions": one(shape=[1] * 100_000 + [16]),
    "no type": one(dtype=None),
    "type that is no name": one(dtype=["F32"]),
    "huge number": with_header(
        b'{"mtp.fc.weight": {"dtype": "F32", "shape": ['
        + b"9" * 5000
        + b'], "data_offsets": [0,1]}}'
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_shard_is_an_error(
    oracle: Callable[..., Oracle], tmp_path: Path, case: str
) -> None:
    model = oracle("qwen35")
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    assert "model.safetensors" in refused(tmp_path, model)


@pytest.mark.parametrize("shard", ["../secret", "/etc/passwd", "a/b", "", 3, None, ".."])
def test_index_does_not_lead_out_of_its_folder(
    oracle: Callable[..., Oracle], tmp_path: Path, shard: Any
) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    index = {"weight_map": {"mtp.fc.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(folder, model)
    assert "index.json" in message or "no name of a file" in message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', "[" * 200_000])
def test_damaged_json_is_an_error(oracle: Callable[..., Oracle], tmp_path: Path, text: str) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refused(folder, model)
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder, model) or text == '{"weight_map": []}'


def test_huge_json_is_not_read(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**33)
    message = refused(folder, model)
    assert "tokenizer.json" in message and str(2**33) in message


def test_mutated_headers_end_in_an_error_or_in_a_head(
    oracle: Callable[..., Oracle], tmp_path: Path
) -> None:
    model = oracle("deepseek2")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    folder = write_folder(tmp_path, model.config(), tensors, shards=1)
    shard = folder / "model-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    header = Gguf.open(model.base)
    length = int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    n_refused = 0
    for _ in range(300):
        mutated = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            mutated[int(rng.integers(0, 8 + length))] = int(rng.choice(list(b'019{}[]",:F-e\xff')))
        shard.write_bytes(mutated)
        try:
            values_of(read_head(folder, header))
        except ModelFileError:
            n_refused += 1
    assert n_refused > 200


def test_shard_that_shrinks_while_it_is_read(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    head = read_head(folder, Gguf.open(model.base))
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100_000])
    with pytest.raises(ModelFileError, match="ends inside"):
        values_of(head)
