"""An inflated model says what the small one says, and accepts as many drafts."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import models
import numpy as np
import numpy.typing as npt
import pytest
from conftest import COMMON, ModelFactory

from llama_mtp import Llama
from llama_mtp.gguf_tools.entries import metadata_of
from llama_mtp.gguf_tools.header import read_header
from llama_mtp.gguf_tools.quantize import requantize, type_number
from llama_mtp.gguf_tools.write import stored, write_gguf

FOLDER = Path(__file__).parents[1] / "examples" / "inflate"
SIZE = 0.03  # GB: about thirty times the constructed models
TYPES = ("F32", "BF16", "Q8_0", "Q4_0")


def script(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER / name, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def inflated(small: Path, big: Path, *args: object) -> Path:
    done = script("inflate.py", small, big, "--size", SIZE, *args)
    assert done.returncode == 0, done.stderr
    assert str(big) in done.stdout.replace("\n", "")
    return big


def stored_as(small: Path, path: Path, kind: str) -> Path:
    """The model with every matrix in another type."""
    header = read_header(small)
    sources = (stored(header, tensor) for tensor in header.tensors.values())
    write_gguf(
        path, metadata_of(header), [requantize(source, type_number(kind)) for source in sources]
    )
    return path


def logits(path: Path, tokens: list[int]) -> npt.NDArray[np.single]:
    """Logits of the stock class, float32 [n_tokens, n_vocab]: a prompt, then row by row."""
    llm = llama_cpp.Llama(str(path), **COMMON, logits_all=True)
    llm.eval(tokens[:20])
    for token in tokens[20:]:
        llm.eval([token])
    rows = np.array(llm.scores[: len(tokens)])
    llm.close()
    return rows


def text(path: Path, prompt: list[int]) -> tuple[list[int], list[int], list[int]]:
    """160 greedy tokens with drafts, and tested and accepted drafts by position."""
    options: dict[str, Any] = {**COMMON, "spec_draft_adaptive": False}
    with Llama(str(path), spec_type="draft-mtp", **options) as llm:
        tokens = list(islice(llm.generate(prompt, temp=0.0), 160))
        stats = llm.spec_stats
        return tokens, stats.num_tested_per_pos, stats.num_accepted_per_pos


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_output_and_acceptance_stay_those_of_the_small_model(
    model: ModelFactory, tmp_path: Path, arch: str, kind: str
) -> None:
    m = model(arch)
    small = m.path if kind == "F32" else stored_as(m.path, tmp_path / "small.gguf", kind)
    big = inflated(small, tmp_path / "big.gguf")
    assert big.stat().st_size == pytest.approx(SIZE * 1e9, rel=0.1)  # steps of 256 columns
    prompt = m.text(24)
    np.testing.assert_allclose(logits(big, prompt), logits(small, prompt), rtol=0, atol=1e-5)
    tokens, tested, accepted = text(small, prompt)
    assert (tokens, tested, accepted) == text(big, prompt)
    assert 0 < sum(accepted) < sum(tested)


def test_what_is_wider_is_random_and_not_zero(model: ModelFactory, tmp_path: Path) -> None:
    m = model("mimo2")
    big = inflated(m.path, tmp_path / "big.gguf", "--layers", 2)
    before, after = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (m.path, big))
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if re.fullmatch(r"blk\.[012]\.ffn_(gate|up)\.weight", name):
            np.testing.assert_array_equal(new[: len(old)], old)
            rows, counts = np.unique(new[len(old) :], axis=0, return_counts=True)
            assert {row.tobytes() for row in rows} == {row.tobytes() for row in old}
            assert counts.max() < 2 * counts.mean()
        elif re.fullmatch(r"blk\.[012]\.ffn_down\.weight", name):
            np.testing.assert_array_equal(new[:, : old.shape[1]], old)
            assert not new[:, old.shape[1] :].any()
        else:
            np.testing.assert_array_equal(new, old)


def test_new_blocks_are_those_of_the_trunk_but_for_their_outputs(
    model: ModelFactory, tmp_path: Path
) -> None:
    m = model("qwen35")  # four blocks, every second one attends
    big = inflated(m.path, tmp_path / "big.gguf", "--layers", 9)
    before, after = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (m.path, big))
    assert {int(name.split(".")[1]) for name in after if name.startswith("blk.")} == {*range(11)}
    for name, data in after.items():
        _, il, part = name.split(".", 2) if name.startswith("blk.") else ("", "0", name)
        if part.startswith("ffn_"):
            if int(il) in range(4, 10) and part == "ffn_down.weight":
                assert not data.any()
        elif int(il) in range(4, 10) and part in ("attn_output.weight", "ssm_out.weight"):
            assert not data.any()
        else:
            source = 4 if int(il) == 10 else int(il) % 4
            old = before[f"blk.{source}.{part}" if name.startswith("blk.") else name]
            np.testing.assert_array_equal(data, old)


def test_a_file_that_is_there_stays_there(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "big.gguf"
    file.write_text("mine")
    done = script("inflate.py", model("mimo2").path, file, "--size", SIZE)
    assert done.returncode != 0
    assert file.read_text() == "mine"
    inflated(model("mimo2").path, file, "--force")


def test_rate_reads_the_trunk_once(model: ModelFactory) -> None:
    m = model("qwen35")
    done = script("rate.py", m.path, "--tokens", 1, "--copies", 1)
    assert done.returncode == 0, done.stderr
    weights = {t.name: t.n_bytes for t in gguf.GGUFReader(m.path).tensors}
    head = sum(size for name, size in weights.items() if name.startswith("blk.4."))
    read = sum(weights.values()) - head - weights["token_embd.weight"]
    assert f"reads {int(read) / 1e9:.3f} GB" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["1", "2"]
