"""An inflated model says what the small one says, and accepts as many drafts."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import models
import numpy as np
import numpy.typing as npt
import pytest
from conftest import COMMON, ModelFactory
from models import cycles

from llama_mtp import Llama
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import metadata_of
from llama_mtp.gguf.quantize import requantize, type_number
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.graft import graft
from llama_mtp.measure.pairs import PROMPTS, chat_tokens, generate

FOLDER = Path(__file__).parents[2] / "examples" / "inflate"
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
    options: dict[str, Any] = {**COMMON, "spec_adaptive": False}
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


def test_weights_start_on_cache_lines(model: ModelFactory, tmp_path: Path) -> None:
    big = inflated(model("qwen35").path, tmp_path / "big.gguf", "--layers", 3)
    assert not any(t.data_offset % 64 for t in gguf.GGUFReader(big).tensors)


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
    assert "error: " in done.stderr and "Traceback" not in done.stderr
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


# --- a hybrid model whose head is right after a known share of the words --------------------------

SHARES = (0.9, 0.5, 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> cycles.Cycles:
    path = tmp_path_factory.mktemp("cycles") / "small.gguf"
    return cycles.build(path, n_embd=256, shares=SHARES, period=20)


def first_rounds(path: Path, words: npt.NDArray[np.int64], **options: Any) -> tuple[int, int]:
    """Drafted and accepted in one round of one draft after each of the words of a cycle."""
    with Llama(
        str(path), spec_type="draft-mtp", spec_adaptive=False, **{**COMMON, **options}
    ) as llm:
        with llm.spec_constant_depth(1):
            for word in words:
                # The first token is the next word of the cycle, the second comes from the round.
                assert len(list(islice(llm.generate([int(word)], temp=0.0), 2))) == 2
        return llm.spec_stats.num_draft_tokens, llm.spec_stats.num_accepted_tokens


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_each_class_accepts_the_share_that_it_was_made_with(
    made: cycles.Cycles, tmp_path: Path, kind: str
) -> None:
    small = stored_as(made.model.path, tmp_path / "small.gguf", kind)
    big = inflated(small, tmp_path / "big.gguf", "--layers", 8)
    for path in (small, big):
        found = [first_rounds(path, words) for words in made.words]
        assert found == [(20, 18), (20, 10), (20, 0)]


def test_words_that_no_text_has_cost_the_head_nothing_but_time(tmp_path: Path) -> None:
    """Nor does an output matrix of its own in few bits: the right word is right by far."""
    small, own = tmp_path / "small.gguf", tmp_path / "own.gguf"
    made = cycles.build(small, n_embd=256, shares=SHARES, period=20, n_vocab=6000)
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(small).tensors}
    assert shapes["output.weight"] == shapes["token_embd.weight"] == [256, 6000]
    graft(small, small, own, replace_head=True, output_type="Q4_0")
    for path in (small, own):
        found = [first_rounds(path, words) for words in made.words]
        assert found == [(20, 18), (20, 10), (20, 0)]


def test_the_head_is_as_sure_as_it_was_made(made: cycles.Cycles) -> None:
    # Sure of the right words and not of the wrong ones, but for a tenth of each, rounded.
    sure = made.sure.sum(axis=1).tolist()
    assert sure == [18 - 2 + 0, 10 - 1 + 1, 0 + 2]
    for threshold, expected in ((0.35, [20] * 3), (0.45, sure), (0.85, sure), (0.95, [0] * 3)):
        found = [first_rounds(made.model.path, w, spec_draft_p_min=threshold) for w in made.words]
        assert [drafted for drafted, _ in found] == expected, threshold


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_the_prompts_of_the_bench_start_a_cycle_each(made: cycles.Cycles, temp: float) -> None:
    with Llama(str(made.model.path), spec_type="draft-mtp", spec_adaptive=False, **COMMON) as llm:
        for k, prompt in enumerate(PROMPTS.values()):
            tokens = chat_tokens(llm, prompt)
            text = generate(llm, tokens, 60, temp=temp).tokens
            assert set(text) <= set(made.words[k % 3].tolist())
            follows = sum(made.model.follow[a] == b for a, b in pairwise(text))
            assert (follows == 59) if temp == 0 else (30 < follows < 59)
            expected = models.expected_acceptance(made.model, tokens, text, 3)
            last = llm.spec_stats.last
            assert last is not None
            assert last.num_accepted_per_pos == expected.accepted_per_pos(3)
            assert last.num_tested_per_pos == expected.tested_per_pos(3)


def test_any_prompt_that_ends_in_a_digit_starts_that_cycle(made: cycles.Cycles) -> None:
    with Llama(str(made.model.path), spec_type="none", **COMMON) as llm:
        for k in range(3):
            text = generate(llm, llm.tokenize(f"What you like {k}".encode()), 30).tokens
            assert set(text) <= set(made.words[k].tolist())


def test_hybrid_writes_the_type_and_the_shares_that_were_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "hybrid.gguf"
    size = ("--width", 256, "--period", 20)
    done = script("hybrid.py", file, "--type", "Q8_0", "--shares", "0.5,0.25", *size)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[2:4]] == ["0.50", "0.25"]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["blk.4.nextn.eh_proj.weight"] == types["blk.0.ffn_down.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", 256), "do not fit a width of 256"),
        (("--doubtful", 0.2), "doubtful in 0.25 to 1"),
    ],
)
def test_hybrid_says_what_cannot_be_had(
    tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    done = script("hybrid.py", tmp_path / "hybrid.gguf", *options)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.replace("\u2502", " ").split())
    assert not list(tmp_path.iterdir())
