"""Files of an HF checkpoint: which are opened, and what damaged and hostile ones end in."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.hf import (
    Oracle,
    refused,
    stored_as,
    values_of,
    write_folder,
    write_oracle,
    write_shard,
)

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.model import Gguf
from llama_mtp.heads.hf.reader import read_head


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
