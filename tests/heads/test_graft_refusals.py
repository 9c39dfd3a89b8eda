"""Grafting refuses what does not belong together, and says what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
from conftest import ModelFactory
from models.families import FAMILIES
from models.files import metadata, rewrite

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import decode, entry, metadata_of
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.graft import graft
from llama_mtp.heads.split import split, strip


def test_a_head_that_does_not_say_whether_it_slides_is_refused(
    model: ModelFactory, tmp_path: Path
) -> None:
    whole = model("mimo2").path
    trunk, mtp = split(whole, tmp_path)
    silent = rewrite(mtp, tmp_path / "silent.gguf", drop=lambda key: key.endswith("pattern"))
    with pytest.raises(ModelFileError, match=r"silent\.gguf does not say mimo2.*--mtp output"):
        graft(trunk, silent, tmp_path / "joined.gguf")


def test_one_other_token_is_enough_to_refuse(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    key = "tokenizer.ggml.tokens"
    tokens = decode(key, metadata(m.path)[key])
    for at in (0, 300, len(tokens) - 1):
        other = [*tokens[:at], tokens[at] + "x", *tokens[at + 1 :]]
        head = rewrite(m.path, tmp_path / "head.gguf", change={key: other})
        with pytest.raises(ModelFileError, match=f"number {at} of its tokens is .*x'.*same model"):
            graft(trunk, head, tmp_path / "joined.gguf")
    head = rewrite(m.path, tmp_path / "head.gguf", change={key: [*tokens, "more"]})
    with pytest.raises(ModelFileError, match=f"has {len(tokens) + 1} tokens, not {len(tokens)}"):
        graft(trunk, head, tmp_path / "joined.gguf")


def test_other_merges_are_refused(pair: tuple[models.Model, Path], tmp_path: Path) -> None:
    m, trunk = pair
    key = "tokenizer.ggml.merges"
    ours = rewrite(trunk, tmp_path / "base.gguf", change={key: ["a b", "ab c"]})
    same = rewrite(m.path, tmp_path / "same.gguf", change={key: ["a b", "ab c"]})
    other = rewrite(m.path, tmp_path / "other.gguf", change={key: ["a b", "ab d"]})
    graft(ours, same, tmp_path / "joined.gguf")
    with pytest.raises(ModelFileError, match="number 1 of its merges is 'ab d', not 'ab c'"):
        graft(ours, other, tmp_path / "other-joined.gguf")


def narrow_head(path: Path, name: str, shape: tuple[int, ...]) -> Path:
    """Nothing but the head's tensors, one of them of another shape."""
    writer = gguf.GGUFWriter(path, "qwen35")
    shapes = {
        "nextn.eh_proj": (64, 128),
        "nextn.enorm": (64,),
        "nextn.hnorm": (64,),
        "nextn.embed_tokens": (models.N_VOCAB, 64),
        "attn_norm": (64,),
        "attn_q": (64, 64),
        "ffn_up": (64, 64),
    } | {name: shape}
    for tensor, size in shapes.items():
        writer.add_tensor(f"blk.4.{tensor}.weight", np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("nextn.eh_proj", (64, 96), r"\[96, 64\].*needs \[128, 64\]"),
        ("nextn.enorm", (48,), r"\[48\].*needs \[64\]"),
        ("attn_norm", (32,), r"\[32\].*needs \[64\]"),
        ("nextn.embed_tokens", (models.N_VOCAB + 1, 64), r"\[64, 511\].*needs \[64, 510\]"),
    ],
)
def test_wrong_widths_are_named(
    pair: tuple[models.Model, Path],
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    needed: str,
) -> None:
    head = narrow_head(tmp_path / "head.gguf", name, shape)
    with pytest.raises(ModelFileError, match=needed):
        graft(pair[1], head, tmp_path / "joined.gguf")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"qwen35.embedding_length": 128}, "hidden rows of 128 floats.*have 64"),
        ({"qwen35.attention.key_length": 16}, "attention.key_length = 16.*has 32"),
        ({"qwen35.attention.head_count": 4}, "attention.head_count = 4.*has 2"),
        ({"general.architecture": "qwen35moe"}, "is a head for qwen35moe"),
        ({"qwen35.nextn_predict_layers": 2}, "declares 5 blocks with 2 NextN"),
    ],
)
def test_another_models_head_is_refused(
    pair: tuple[models.Model, Path], tmp_path: Path, change: dict[str, Any], cause: str
) -> None:
    m, trunk = pair
    head = rewrite(m.path, tmp_path / "head.gguf", change=change)
    with pytest.raises(ModelFileError, match=cause):
        graft(trunk, head, tmp_path / "joined.gguf")
    assert not (tmp_path / "joined.gguf").exists()


@pytest.mark.parametrize("value", [["a"] * 3, [0.5] * 3, [True] * 2, [False] * 7])
def test_per_layer_values_of_another_form_are_refused(
    model: ModelFactory, tmp_path: Path, value: list[Any]
) -> None:
    whole = model("mimo2").path
    key = "mimo2.feed_forward_length"
    trunk = strip(whole, tmp_path / "t.gguf")
    trunk = rewrite(trunk, tmp_path / "trunk.gguf", change={key: [64, 64]})
    head = rewrite(whole, tmp_path / "head.gguf", change={key: value})
    if value == [True] * 2:  # one for each block of the trunk: none for the head's
        raw = metadata(graft(trunk, head, tmp_path / "joined.gguf").path)
        assert raw[key] == entry(key, [64, 64])
        return
    with pytest.raises(ModelFileError, match=r"does not go with|has 7 values of"):
        graft(trunk, head, tmp_path / "joined.gguf")


def test_what_is_no_base_or_no_head_is_refused(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("qwen35").path
    trunk, mtp = split(whole, tmp_path)
    two = model("hy_v3", n_heads=2).path
    unable = rewrite(trunk, tmp_path / "glm4.gguf", change={"general.architecture": "glm4"})
    text_file = tmp_path / "text.gguf"
    text_file.write_text("GGUF is a format")
    cases: list[tuple[Path, Path, str]] = [
        (trunk, trunk, "has no NextN head"),
        (mtp, mtp, "holds no trunk"),
        (trunk, two, "is a head for hy_v3"),
        (trunk, model("qwen35", drop_head_tensors=True).path, "has dropped their tensors"),
        (unable, whole, "would not run with a head"),
        (trunk, tmp_path / "missing.gguf", "cannot be read"),
        (trunk, text_file, "."),
    ]
    for base, head, cause in cases:
        with pytest.raises(ModelFileError, match=cause):
            graft(base, head, tmp_path / "joined.gguf")
    assert not (tmp_path / "joined.gguf").exists()


def test_the_head_of_a_deeper_model_is_refused(
    pair: tuple[models.Model, Path], model: ModelFactory, tmp_path: Path
) -> None:
    deeper = model("qwen35", n_trunk=6).path
    with pytest.raises(ModelFileError, match=r"a trunk of 6 blocks, and .* has 4"):
        graft(pair[1], deeper, tmp_path / "joined.gguf")


def test_a_head_that_would_not_run_is_refused(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    head = rewrite(m.path, tmp_path / "head.gguf", keep=lambda n: not n.endswith("hnorm.weight"))
    with pytest.raises(ModelFileError, match=r"lacks blk\.4\.nextn\.hnorm\.weight"):
        graft(trunk, head, tmp_path / "joined.gguf")


def test_a_head_with_top_tensors_of_its_own_stays_apart(tmp_path: Path) -> None:
    """deepseek4's head has other output_hc_ tensors than the trunk, and a file has one place."""
    whole = FAMILIES["deepseek4"].build(tmp_path, 1, 1).path
    trunk, mtp = split(whole, tmp_path)
    graft(trunk, mtp, tmp_path / "same.gguf")
    header = read_header(mtp)
    tensors = [stored(header, tensor) for tensor in header.tensors.values()]
    for i, tensor in enumerate(tensors):
        if tensor.name == "output_hc_base.weight":
            other = b"\x01" * tensor.n_bytes
            tensors[i] = replace(tensor, path=None, chunks=lambda data=other: iter([data]))
    own = tmp_path / "own.gguf"
    write_gguf(own, metadata_of(header), tensors)
    with pytest.raises(ModelFileError, match=r"output_hc_base\.weight of its own.*Keep the files"):
        graft(trunk, own, tmp_path / "joined.gguf")
