"""Grafting: the trunk stays what it was, the head works as in its own model, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from models.files import contents, metadata, rewrite
from sampling import GREEDY

from llama_mtp.errors import FileWriteError, LlamaMtpError, ModelFileError
from llama_mtp.gguf import write
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import decode, entry, metadata_of
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads import graft as tool
from llama_mtp.heads.check import check_head
from llama_mtp.heads.graft import graft
from llama_mtp.heads.split import PROVENANCE, split, strip
from llama_mtp.measure.compare_files import compare_greedy
from llama_mtp.measure.identity import fresh_text, text

HEADS = [("qwen35", 1), ("hy_v3", 1), ("mimo2", 1), ("hy_v3", 2), ("mimo2", 3)]

HEAD_FORMS = ("full", "mtp-only", "tensors-only")

COMPARE = partial(compare_greedy, n_tokens=8, n_threads=1)


def head_file(form: str, whole: Path, folder: Path) -> Path:
    """The head of a model in one of the forms that `graft` takes."""
    if form == "full":
        return whole
    mtp = split(whole, folder)[1]
    if form == "mtp-only":
        return mtp
    n_trunk = check_head(whole).n_layer_trunk
    return rewrite(
        mtp,
        folder / "tensors.gguf",
        # Little metadata: neither counts nor a vocabulary. A head that slides has to say so.
        drop=lambda key: (
            key != "general.architecture" and not key.endswith("sliding_window_pattern")
        ),
        keep=lambda name: name.startswith("blk.") and int(name.split(".")[1]) >= n_trunk,
    )


@pytest.mark.parametrize(("arch", "n_heads"), HEADS)
@pytest.mark.parametrize("form", HEAD_FORMS)
def test_graft_gives_back_what_split_took_apart(
    model: ModelFactory, tmp_path: Path, arch: str, n_heads: int, form: str
) -> None:
    whole = model(arch, n_heads=n_heads).path
    head = head_file(form, whole, tmp_path)
    trunk = strip(whole, tmp_path / "trunk.gguf")
    report = graft(trunk, head, tmp_path / "joined.gguf")
    assert contents(report.path) == contents(whole)
    assert metadata(report.path) == metadata(whole)
    assert report.n_heads == n_heads
    assert check_head(report.path) == check_head(whole)


@pytest.mark.parametrize(("arch", "n_heads"), HEADS)
def test_grafted_head_drafts_as_in_its_own_model(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    tmp_path: Path,
    arch: str,
    n_heads: int,
) -> None:
    m = model(arch, n_heads=n_heads)
    trunk, mtp = split(m.path, tmp_path)
    joined = replace(m, path=graft(trunk, mtp, tmp_path / "joined.gguf").path)
    prompt = m.text(9)
    original, grafted = ours(m), ours(joined)
    expected = fresh_text(stock(replace(m, path=trunk)), prompt, 150, **GREEDY)
    assert text(original, prompt, 150, **GREEDY) == expected
    assert text(grafted, prompt, 150, **GREEDY) == expected
    for count in ("num_drafts", "num_draft_tokens", "num_accepted_per_pos"):
        assert getattr(grafted.spec_stats.last, count) == getattr(original.spec_stats.last, count)
    assert grafted.spec_stats.last.num_accepted_tokens > 0


def test_the_trunks_metadata_stays_byte_for_byte_and_in_order(
    model: ModelFactory, tmp_path: Path
) -> None:
    whole = model("mimo2").path
    odd = {
        "a.first": True,
        "zz.bytes": "nul \x00 and ß",
        "zz.floats": [0.1, -0.0, 1e30],
        "zz.texts": ["", "ä" * 300],
        "zz.none": [],
    }
    trunk = rewrite(strip(whole, tmp_path / "t.gguf"), tmp_path / "trunk.gguf", change=odd)
    joined = graft(trunk, whole, tmp_path / "joined.gguf").path
    before, after = metadata(trunk), metadata(joined)
    changed = {"mimo2.block_count", "mimo2.attention.sliding_window_pattern"}
    added = {"mimo2.nextn_predict_layers"}
    assert {k for k in before if before[k] != after[k]} == changed
    assert after.keys() - before.keys() == added
    assert [k for k in after if k not in added] == list(before)


def test_per_layer_arrays_get_the_heads_values(model: ModelFactory, tmp_path: Path) -> None:
    """One value for the trunk and another for the head becomes an array; equal ones stay one."""
    whole = model("hy_v3", n_heads=2).path
    trunk = strip(whole, tmp_path / "trunk.gguf")
    values = {
        "hy_v3.expert_feed_forward_length": [64, 64, 96, 32],
        "hy_v3.feed_forward_length": [64] * 4,
    }
    head = rewrite(whole, tmp_path / "head.gguf", change=values)
    raw = metadata(graft(trunk, head, tmp_path / "joined.gguf").path)
    found = {key: decode(key, raw[key]) for key in values}
    assert found == {
        "hy_v3.expert_feed_forward_length": [64, 64, 96, 32],
        "hy_v3.feed_forward_length": 64,
    }


def test_provenance_is_recorded_and_taken_off(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("hy_v3").path
    trunk, mtp = split(whole, tmp_path)
    joined = graft(trunk, mtp, tmp_path / "joined.gguf", type="F16").path
    recorded = {
        key.removeprefix(PROVENANCE): value
        for key, value in read_header(joined).metadata.items()
        if key.startswith(PROVENANCE)
    }
    version, blanks = recorded.pop("version"), recorded.pop("padding")
    assert isinstance(version, str) and version
    assert isinstance(blanks, str) and not blanks.strip() and len(blanks) < 4096
    assert recorded == {
        "base": trunk.name,
        "base_name": "constructed hy_v3",
        "head": mtp.name,
        "head_type": "F16",
    }
    for path in split(joined, tmp_path, force=True):
        assert not any(key.startswith(PROVENANCE) for key in read_header(path).metadata)


def test_parts_are_read_and_one_file_is_written(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model("qwen35").path
    trunk = strip(whole, tmp_path / "trunk.gguf")
    header = read_header(trunk)
    names = list(header.tensors)
    cut = [names[:3], names[3:10], names[10:]]
    monkeypatch.setattr(write, "_compare", lambda *_: None)  # a part is no model by itself
    for number, part in enumerate(cut):
        counts = {"split.no": number, "split.count": len(cut), "split.tensors.count": len(names)}
        kinds = {"split.no": 2, "split.count": 2, "split.tensors.count": 5}
        raw = metadata_of(header) if number == 0 else {}
        raw |= {key: entry(key, value, kinds[key]) for key, value in counts.items()}
        write_gguf(
            tmp_path / f"m-{number + 1:05}-of-{len(cut):05}.gguf",
            raw,
            [stored(header, header.tensors[n]) for n in part],
        )
    monkeypatch.undo()
    joined = graft(tmp_path / "m-00001-of-00003.gguf", whole, tmp_path / "joined.gguf").path
    assert contents(joined) == contents(whole)
    assert metadata(joined) == metadata(whole)


def test_replacing_a_head(model: ModelFactory, tmp_path: Path) -> None:
    old, new = model("hy_v3", n_heads=2).path, model("hy_v3", right=0.5).path
    with pytest.raises(ModelFileError, match=r"has a NextN head already.*--replace"):
        graft(old, new, tmp_path / "joined.gguf")
    joined = graft(old, new, tmp_path / "joined.gguf", replace_head=True).path
    assert contents(joined) == contents(new)
    assert metadata(joined) == metadata(new)


def test_a_base_that_lost_its_heads_tensors(model: ModelFactory, tmp_path: Path) -> None:
    """It may still say what the head's own file does not."""
    whole = model("mimo2", n_heads=2).path
    lost = model("mimo2", n_heads=2, drop_head_tensors=True).path
    mtp = split(whole, tmp_path)[1]
    silent = rewrite(mtp, tmp_path / "silent.gguf", drop=lambda key: key.endswith("pattern"))
    for head in (whole, mtp, silent):
        joined = graft(lost, head, tmp_path / "joined.gguf", force=True).path
        assert contents(joined) == contents(whole)
        assert metadata(joined) == metadata(whole)


def test_a_head_that_says_nothing_but_its_tensors(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    head = rewrite(
        m.path,
        tmp_path / "head.gguf",
        drop=lambda _: True,
        keep=lambda name: name.startswith("blk.4."),
    )
    joined = graft(trunk, head, tmp_path / "joined.gguf").path
    assert contents(joined) == contents(m.path)
    assert metadata(joined) == metadata(m.path)


def test_a_head_without_a_vocabulary_is_said_to_be_unchecked(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    head = head_file("tensors-only", m.path, tmp_path)
    notes = graft(trunk, head, tmp_path / "joined.gguf").notes
    assert notes == ("tensors.gguf lists no vocabulary: it could not be compared.",)
    assert graft(trunk, m.path, tmp_path / "checked.gguf").notes == ()


def test_verify_accepts_what_is_right(pair: tuple[models.Model, Path], tmp_path: Path) -> None:
    m, trunk = pair
    graft(trunk, m.path, tmp_path / "joined.gguf", verify=COMPARE)
    assert (tmp_path / "joined.gguf").exists()


def test_verify_refuses_another_text(
    pair: tuple[models.Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk's last tensor comes out wrong: only running the file tells."""
    m, trunk = pair
    joining = tool._trunk_sources

    def spoilt(*arguments: Any) -> list[write.TensorSource]:
        return [
            replace(t, path=None, chunks=lambda n=t.n_bytes: iter([bytes(n)]))
            if t.name == "output.weight"
            else t
            for t in joining(*arguments)
        ]

    monkeypatch.setattr(tool, "_trunk_sources", spoilt)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelFileError, match="does not continue a text"):
        graft(trunk, m.path, tmp_path / "joined.gguf", verify=COMPARE)
    assert sorted(tmp_path.iterdir()) == before


def test_verify_survives_a_file_that_ends_the_process(model: ModelFactory, tmp_path: Path) -> None:
    """libllama aborts on a mimo2 in which no block slides."""
    whole = model("mimo2").path
    key = "mimo2.attention.sliding_window_pattern"
    trunk = strip(whole, tmp_path / "t.gguf")
    still = rewrite(trunk, tmp_path / "trunk.gguf", change={key: [False, False]})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelFileError, match=r"trunk\.gguf does not run.*is_swa_any"):
        graft(still, whole, tmp_path / "joined.gguf", verify=COMPARE)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_it_did(pair: tuple[models.Model, Path], tmp_path: Path) -> None:
    m, trunk = pair

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llama_mtp", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )

    out = tmp_path / "joined.gguf"
    done = run("graft", str(trunk), str(m.path), "-o", str(out), "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert "1 NextN head, matrices in Q8_0" in done.stdout
    assert f"llama-mtp inspect {out}" in done.stdout
    assert check_head(out).executable
    again = run("graft", str(trunk), str(m.path), "-o", str(out))
    assert again.returncode == 1
    assert (
        again.stderr == f"error: {out} exists. Name another file, or overwrite it with --force.\n"
    )
    assert run("graft", str(trunk), str(m.path), "-o", str(out), "--type", "Q9").returncode == 2
    odd = tmp_path / "joined [a].gguf"
    done = run("graft", str(trunk), str(m.path), "-o", str(odd))
    assert f"llama-mtp inspect '{odd}'\n" in done.stdout
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(bytes(64))
    done = run("graft", str(trunk), str(shard), "-o", str(out), "--force")
    assert f"Name its folder instead: {tmp_path}\n" in done.stderr


def test_the_example_runs_as_it_stands(pair: tuple[models.Model, Path], tmp_path: Path) -> None:
    m, trunk = pair
    example = Path(__file__).parents[2] / "examples" / "graft" / "run.py"
    out = tmp_path / "joined.gguf"
    done = subprocess.run(
        [sys.executable, example, trunk, m.path, out], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "trunk.gguf: the file has no NextN head" in done.stdout
    assert "joined.gguf: runs with MTP, head in F32" in done.stdout
    assert contents(out) == contents(m.path)


def test_a_kind_of_error_for_each_side() -> None:
    assert issubclass(FileWriteError, LlamaMtpError)
    assert issubclass(FileWriteError, OSError)
