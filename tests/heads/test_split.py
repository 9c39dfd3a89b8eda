"""Splitting and stripping: two files that work by themselves, and that join to what they were."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.families import FAMILIES
from models.files import contents, metadata, rewrite
from sampling import GREEDY
from typer.testing import CliRunner

from llama_mtp import Llama
from llama_mtp.commands import main as cli
from llama_mtp.errors import FileWriteError, ModelFileError
from llama_mtp.gguf import write
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import decode, entry, metadata_of
from llama_mtp.gguf.model import Gguf
from llama_mtp.gguf.types import BLOCKS
from llama_mtp.gguf.write import TensorSource, write_gguf
from llama_mtp.heads import split as tool
from llama_mtp.heads.check import check_head
from llama_mtp.heads.graft import graft
from llama_mtp.heads.split import PER_LAYER, split, strip
from llama_mtp.measure.identity import fresh_text, text

HEADS = [("qwen35", 1), ("hy_v3", 1), ("mimo2", 1), ("hy_v3", 2), ("mimo2", 3)]
JOINABLE = [(arch, n) for arch, f in FAMILIES.items() for n in (1, 2, 3) if n <= f.max_heads]
JOINABLE = [(arch, n) for arch, n in JOINABLE if arch != "gemma4-assistant"]


# --- the two files --------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "n_heads"), HEADS)
def test_the_trunk_runs_as_stock_and_says_the_same(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    tmp_path: Path,
    arch: str,
    n_heads: int,
) -> None:
    m = model(arch, n_heads=n_heads)
    trunk = replace(m, path=strip(m.path, tmp_path / "trunk.gguf"))
    report = check_head(trunk.path)
    assert (report.n_heads, report.executable) == (0, False)
    assert "no NextN head" in report.reason
    prompt = m.text(9)
    expected = fresh_text(stock(m), prompt, 60, **GREEDY)
    assert fresh_text(stock(trunk), prompt, 60, **GREEDY) == expected
    assert text(ours(trunk, spec_type="auto"), prompt, 60, **GREEDY) == expected


@pytest.mark.parametrize(("arch", "n_heads"), HEADS)
def test_the_head_runs_beside_its_trunk(
    model: ModelFactory, ours: LlamaFactory, tmp_path: Path, arch: str, n_heads: int
) -> None:
    m = model(arch, n_heads=n_heads)
    trunk, mtp = split(m.path, tmp_path)
    prompt = m.text(9)
    whole, apart = ours(m), ours(replace(m, path=trunk), spec_draft_model=str(mtp))
    expected = text(whole, prompt, 120, **GREEDY)
    assert text(apart, prompt, 120, **GREEDY) == expected
    for count in ("num_drafts", "num_draft_tokens", "num_accepted_per_pos"):
        assert getattr(apart.spec_stats.last, count) == getattr(whole.spec_stats.last, count)
    assert apart.spec_stats.last.num_accepted_tokens > 0


@pytest.mark.parametrize(("arch", "n_heads"), HEADS)
def test_the_heads_file_has_the_form_of_llama_cpps_own(
    model: ModelFactory, tmp_path: Path, arch: str, n_heads: int
) -> None:
    """As the constructed models write it with ``head_only``: counts and metadata of the whole."""
    whole = model(arch, n_heads=n_heads)
    alone = model(arch, n_heads=n_heads, head_only=True)
    mtp = split(whole.path, tmp_path)[1]
    assert mtp == tmp_path / f"mtp-{whole.path.stem}.gguf"
    assert contents(mtp) == contents(alone.path)
    assert metadata(mtp) == metadata(alone.path)


@pytest.mark.parametrize(("arch", "n_heads"), JOINABLE)
def test_every_family_comes_apart_and_together(tmp_path: Path, arch: str, n_heads: int) -> None:
    whole = FAMILIES[arch].build(tmp_path, n_heads, 1).path
    apart = tmp_path / "apart"
    apart.mkdir()
    trunk, mtp = split(whole, apart)
    assert not any("nextn" in name for name in read_header(trunk).tensors)
    for head in (mtp, whole):
        joined = graft(trunk, head, tmp_path / f"joined-{head.name}").path
        assert contents(joined) == contents(whole)
        assert metadata(joined) == metadata(whole)


@pytest.mark.parametrize(("arch", "n_heads"), JOINABLE)
def test_every_familys_trunk_runs_by_itself(tmp_path: Path, arch: str, n_heads: int) -> None:
    whole = FAMILIES[arch].build(tmp_path, n_heads, 1).path
    trunk = strip(whole)
    prompt = [300, 17, 401, 256, 333]
    texts = []
    for path in (whole, trunk):
        with Llama(str(path), **COMMON, spec_type="none") as llama:
            texts.append(list(islice(llama.generate(prompt, temp=0.0), 30)))
    assert texts[0] == texts[1]


def test_a_trunk_in_which_nothing_slides_goes_on_declaring_its_head(
    model: ModelFactory, stock: StockFactory, tmp_path: Path
) -> None:
    """libllama aborts on a mimo2 without a sliding block; the demo's model slides in its head."""
    m = model("mimo2")
    key = "mimo2.attention.sliding_window_pattern"
    whole = rewrite(m.path, tmp_path / "whole.gguf", change={key: [False, False, True]})
    trunk, mtp = split(whole, tmp_path)
    assert decode(key, metadata_of(read_header(trunk))[key]) == [False, False, True]
    assert not check_head(trunk).executable
    llama = stock(replace(m, path=trunk))
    assert len(fresh_text(llama, m.text(9), 20, **GREEDY)) == 20
    joined = graft(trunk, mtp, tmp_path / "joined.gguf").path
    assert contents(joined) == contents(whole)
    assert metadata(joined) == metadata(whole)


def test_a_split_that_fails_leaves_the_files_that_were_there(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With force as well: an old head is not given up for a trunk that cannot be written."""
    whole = model("qwen35").path
    files = split(whole, tmp_path)
    for file in files:
        file.write_bytes(b"old")
    whole_write = tool.write_gguf

    def write_no_trunk(out: Path, *args: Any, **more: Any) -> int:
        if out == files[0]:
            raise FileWriteError("the disk is gone")
        return whole_write(out, *args, **more)

    monkeypatch.setattr(tool, "write_gguf", write_no_trunk)
    with pytest.raises(FileWriteError):
        split(whole, tmp_path, force=True)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert {file.read_bytes() for file in files} == {b"old"}


# --- what cannot be split -------------------------------------------------------------------------


def test_files_without_both_halves_are_refused(model: ModelFactory, tmp_path: Path) -> None:
    trunk, mtp = split(model("qwen35").path, tmp_path)
    before = sorted(tmp_path.iterdir())
    cases = [
        (trunk, "has no NextN head"),
        (mtp, "without its trunk"),
        (model("qwen35", drop_head_tensors=True).path, "has no NextN head"),
        (tmp_path / "missing.gguf", "cannot be read"),
    ]
    for path, cause in cases:
        with pytest.raises(ModelFileError, match=cause):
            split(path, tmp_path, force=True)
        with pytest.raises(ModelFileError, match=cause):
            strip(path, tmp_path / "out.gguf")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("change", [{"block_count": 9}, {"nextn_predict_layers": 2}])
def test_counts_that_contradict_the_tensors_are_refused(
    model: ModelFactory, tmp_path: Path, change: dict[str, int]
) -> None:
    values = {f"qwen35.{key}": value for key, value in change.items()}
    wrong = rewrite(model("qwen35").path, tmp_path / "wrong.gguf", change=values)
    with pytest.raises(ModelFileError, match=r"its NextN tensors are in the blocks \[4\]"):
        split(wrong)


def test_an_undeclared_head_is_found_by_its_tensors(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("hy_v3", n_heads=2).path
    silent = rewrite(whole, tmp_path / "silent.gguf", drop=lambda key: "nextn" in key)
    trunk, mtp = split(silent)
    assert contents(graft(trunk, mtp, tmp_path / "joined.gguf").path) == contents(whole)
    assert metadata(tmp_path / "joined.gguf") == metadata(whole)


def test_a_gemma4_assistant_is_a_head_already(tmp_path: Path) -> None:
    draft = FAMILIES["gemma4-assistant"].build(tmp_path, 1, 1).draft
    assert draft is not None
    with pytest.raises(ModelFileError, match=r"in a file of its own.*spec_draft_model"):
        split(draft)


# --- how they are written -------------------------------------------------------------------------


def test_names_and_overwriting(model: ModelFactory, tmp_path: Path) -> None:
    whole = rewrite(model("qwen35").path, tmp_path / "M-00001-of-00001.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    trunk, mtp = split(whole, folder)
    assert (trunk, mtp) == (folder / "M-trunk.gguf", folder / "mtp-M.gguf")
    assert strip(whole) == tmp_path / "M-trunk.gguf"
    before = trunk.read_bytes(), mtp.read_bytes()
    for again in (lambda: split(whole, folder), lambda: strip(whole)):
        with pytest.raises(FileWriteError, match="exists"):
            again()
    split(whole, folder, force=True)
    assert (trunk.read_bytes(), mtp.read_bytes()) == before
    with pytest.raises(FileWriteError, match="one of the inputs"):
        strip(whole, whole, force=True)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_split_leaves_both_files_or_none(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    writing = tool.write_gguf
    calls = 0

    def sometimes(*args: Any, **options: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt
        return writing(*args, **options)

    monkeypatch.setattr(tool, "write_gguf", sometimes)
    with pytest.raises(KeyboardInterrupt):
        split(model("qwen35").path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_space_for_both_files_is_asked_for_before_the_first(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model("hy_v3").path
    one = max(path.stat().st_size for path in split(whole, tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(write, "free_space", lambda _: one)
    with pytest.raises(FileWriteError, match="are free there"):
        split(whole, tmp_path, progress=lambda *_: pytest.fail("it writes"))
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_both_files(model: ModelFactory, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    split(model("hy_v3").path, tmp_path, progress=lambda *x: seen.append(x))
    assert len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_the_commands(model: ModelFactory, tmp_path: Path) -> None:
    whole = rewrite(model("hy_v3", n_heads=2).path, tmp_path / "M.gguf")
    runner = CliRunner()
    done = runner.invoke(cli.app, ["split", str(whole)])
    assert done.exit_code == 0, done.output
    trunk, mtp = tmp_path / "M-trunk.gguf", tmp_path / "mtp-M.gguf"
    assert str(trunk) in done.output and str(mtp) in done.output
    assert done.output.endswith(f"Next: llama-mtp inspect {trunk} --draft-model {mtp}\n")
    out = tmp_path / "stripped.gguf"
    done = runner.invoke(cli.app, ["strip", str(whole), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == trunk.read_bytes()
    done = runner.invoke(cli.app, ["strip", str(out)])
    assert isinstance(done.exception, ModelFileError)


# --- any file -------------------------------------------------------------------------------------

_HEAD = ("nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight")
_SHAPES = {_HEAD[0]: (64, 32), _HEAD[1]: (32,), _HEAD[2]: (32,), "attn_norm.weight": (32,)}
_PARTS = (
    *("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
    *("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
)
_KINDS = [kind for kind, (elements, _) in BLOCKS.items() if elements <= 32]


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, bytes], list[TensorSource]]:
    """Metadata and tensors of a hy_v3 with a head, of any types, numbers and order."""
    arch, n_embd = "hy_v3", 32
    n_trunk, n_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    count = n_trunk + n_heads
    values: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": count,
        f"{arch}.nextn_predict_layers": n_heads,
        f"{arch}.embedding_length": n_embd,
        # A token that occurs twice is refused.
        "tokenizer.ggml.tokens": draw(
            st.lists(
                st.text(max_size=5),
                min_size=1,
                max_size=9,
                unique_by=lambda token: token.partition("\0")[0],
            )
        ),
    }
    scalar = st.integers(0, 2**31) | st.booleans() | st.text(max_size=9)
    for key in draw(st.sets(st.sampled_from(PER_LAYER), max_size=4)):
        # More experts used than there are is refused when the file is read.
        most = 0 if key == "expert_used_count" else 2**31
        number = st.booleans() if "pattern" in key else st.integers(0, most)
        # Where nothing but the head slides, the trunk's own file is another one (tested above).
        each = draw(st.lists(number, min_size=count, max_size=count))
        if "sliding" in key:
            each[0] = True
        values[f"{arch}.{key}"] = draw(st.just(each) | number)
    for key in draw(st.sets(st.text(min_size=1, max_size=6), max_size=4)):
        numbers = st.lists(st.floats(width=32, allow_nan=False), max_size=5)
        values.setdefault(f"x.{key}", draw(scalar | numbers))
    keys = draw(st.permutations(list(values)))
    if draw(st.booleans()):
        values["general.alignment"] = draw(st.sampled_from([8, 32, 64, 4096]))
        keys.append("general.alignment")

    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_embd, 7)}
    for block in range(count):
        for name in (*_PARTS, *(_HEAD if block >= n_trunk else ())):
            shape = _SHAPES.get(name, (n_embd, draw(st.integers(1, 3))))
            shapes[f"blk.{block}.{name}"] = shape
    tensors = []
    for name in draw(st.permutations(list(shapes))):
        # Embeddings in whole numbers are refused as well.
        kind = 0 if name == "token_embd.weight" else draw(st.sampled_from(_KINDS))
        elements, size = BLOCKS[kind]
        n_bytes = size
        for length in shapes[name]:
            n_bytes *= length
        n_bytes //= elements
        fill = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
        data = (fill * (n_bytes // 8 + 1))[:n_bytes]

        def chunks(data: bytes = data) -> Iterator[bytes]:
            yield data

        tensors.append(TensorSource(name, shapes[name], kind, n_bytes, chunks))
    return {key: entry(key, values[key]) for key in keys}, tensors


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files())
def test_graft_of_split_is_the_file_again(
    tmp_path: Path, file: tuple[dict[str, bytes], list[TensorSource]]
) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, *file)
    trunk, mtp = split(whole, force=True)
    assert not Gguf.open(trunk).heads
    joined = graft(trunk, mtp, tmp_path / "joined.gguf", force=True).path
    assert contents(joined) == contents(whole)
    assert metadata(joined) == metadata(whole)
    # And the other way round: what was joined comes apart to the same two files.
    again = split(joined, force=True)
    assert contents(again[0]) == contents(trunk)
    assert metadata(again[0]) == metadata(trunk)
    assert list(metadata(again[0])) == list(metadata(trunk))
