"""The MTP head of an HF checkpoint comes back bit for bit, in every family and form.

The oracle is the constructed model itself: its head is written down as a checkpoint (`models.hf`).
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
import pytest
from models.families.common import Files
from models.hf import (
    MODEL,
    Array,
    Oracle,
    Tensors,
    qkv_rows,
    squeezed,
    stored_as,
    values_of,
    write_folder,
    write_oracle,
)

from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import entry, metadata_of
from llama_mtp.gguf.model import Gguf
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.graft import graft
from llama_mtp.heads.hf.reader import read_head

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


@pytest.mark.parametrize("arch", ["nemotron_h_moe", "qwen3next", "step35"])
def test_heads_are_counted_where_config_does_not(
    oracle: Callable[..., Oracle], tmp_path: Path, arch: str
) -> None:
    model = oracle(arch)
    config = {k: v for k, v in model.config().items() if "nextn" not in k and "mtp" not in k}
    tensors = {n: stored_as("F32", v) for n, v in model.tensors().items()}
    head = read_head(write_folder(tmp_path, config, tensors), Gguf.open(model.base))
    assert head.n_heads == 1


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
