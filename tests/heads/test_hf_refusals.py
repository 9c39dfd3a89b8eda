"""What does not belong together, or is not all there, is refused by its name in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.hf import (
    MODEL,
    Oracle,
    refused,
    stored_as,
    write_folder,
    write_oracle,
)

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import entry, metadata_of
from llama_mtp.gguf.model import Gguf
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.hf.reader import read_head


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


def test_unknown_family_is_told_which_are_known(
    oracle: Callable[..., Oracle], tmp_path: Path
) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    message = refused(folder, model)
    assert "LlamaForCausalLM" in message
    assert all(name in message for name in MODEL.values())


@pytest.mark.parametrize("value", [None, 5, "Qwen3NextForCausalLM", {}, [3, ["a"], {}]])
def test_a_config_that_names_no_model_is_refused(
    oracle: Callable[..., Oracle], tmp_path: Path, value: Any
) -> None:
    model = oracle("qwen35")
    folder = write_oracle(model, tmp_path)
    (folder / "config.json").write_text(json.dumps({"architectures": value}))
    assert "whose head this release cannot read" in refused(folder, model)


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
