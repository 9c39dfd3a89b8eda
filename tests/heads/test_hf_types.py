"""Types of an HF checkpoint: BF16 and F16 stay, FP8 becomes BF16, small tensors become F32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from models.hf import (
    BF16,
    Array,
    Oracle,
    Tensors,
    bf16_bits,
    bf16_values,
    express,
    merge_kv_b,
    qkv_rows,
    refused,
    stored_as,
    values_of,
    write_folder,
    write_oracle,
)

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.model import Gguf
from llama_mtp.heads.hf.reader import read_head


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


def test_packed_weights_are_refused(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    model = oracle("qwen35")
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    del tensors["mtp.layers.0.mlp.up_proj.weight"]
    tensors["mtp.layers.0.mlp.up_proj.qweight"] = ("I32", np.zeros((8, 8), dtype="<i4"))
    message = refused(write_folder(tmp_path, model.config(), tensors), model)
    assert "mtp.layers.0.mlp.up_proj.qweight" in message and "BF16" in message
