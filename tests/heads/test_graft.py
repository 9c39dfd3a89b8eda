"""Grafting: the trunk stays what it was, the head works as in its own model, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from models.families import FAMILIES
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


def contents(path: Path) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """Every tensor: shape, type, data."""
    header = read_header(path)
    return {
        name: (t.shape, t.type, b"".join(stored(header, t).chunks()))
        for name, t in header.tensors.items()
    }


def metadata(path: Path) -> dict[str, bytes]:
    """Metadata without what says how the file was joined, in the file's order."""
    raw = metadata_of(read_header(path))
    return {key: value for key, value in raw.items() if not key.startswith(PROVENANCE)}


def rewrite(
    path: Path,
    out: Path,
    *,
    change: dict[str, Any] | None = None,
    drop: Callable[[str], bool] = lambda _: False,
    keep: Callable[[str], bool] = lambda _: True,
) -> Path:
    """A copy with other metadata (new values in ``change``, keys to ``drop``), fewer tensors."""
    header = read_header(path)
    raw = {key: value for key, value in metadata_of(header).items() if not drop(key)}
    raw |= {key: entry(key, value) for key, value in (change or {}).items()}
    write_gguf(out, raw, [stored(header, t) for n, t in header.tensors.items() if keep(n)])
    return out


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


@pytest.fixture
def pair(model: ModelFactory, tmp_path: Path) -> tuple[models.Model, Path]:
    """A hybrid model with a head, and its trunk in a file of its own."""
    m = model("qwen35")
    return m, strip(m.path, tmp_path / "trunk.gguf")


# --- what the joined file is ----------------------------------------------------------------------


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


def test_a_head_that_does_not_say_whether_it_slides_is_refused(
    model: ModelFactory, tmp_path: Path
) -> None:
    whole = model("mimo2").path
    trunk, mtp = split(whole, tmp_path)
    silent = rewrite(mtp, tmp_path / "silent.gguf", drop=lambda key: key.endswith("pattern"))
    with pytest.raises(ModelFileError, match=r"silent\.gguf does not say mimo2.*--mtp output"):
        graft(trunk, silent, tmp_path / "joined.gguf")


# --- what does not belong together ----------------------------------------------------------------


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


def test_a_head_without_a_vocabulary_is_said_to_be_unchecked(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    head = head_file("tensors-only", m.path, tmp_path)
    notes = graft(trunk, head, tmp_path / "joined.gguf").notes
    assert notes == ("tensors.gguf lists no vocabulary: it could not be compared.",)
    assert graft(trunk, m.path, tmp_path / "checked.gguf").notes == ()


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


# --- how it is written ----------------------------------------------------------------------------


def test_files_that_are_there_are_safe(pair: tuple[models.Model, Path], tmp_path: Path) -> None:
    m, trunk = pair
    out = tmp_path / "joined.gguf"
    graft(trunk, m.path, out)
    before = out.read_bytes()
    with pytest.raises(FileWriteError, match="exists"):
        graft(trunk, m.path, out)
    graft(trunk, m.path, out, force=True)
    assert out.read_bytes() == before
    link = tmp_path / "link.gguf"
    os.link(trunk, link)
    for target in (trunk, link):
        with pytest.raises(FileWriteError, match="one of the inputs"):
            graft(trunk, m.path, target, force=True)
    with pytest.raises(FileWriteError, match="no folder"):
        graft(trunk, m.path, tmp_path / "nowhere" / "joined.gguf")
    with pytest.raises(FileWriteError, match="is a folder"):
        graft(trunk, m.path, tmp_path, force=True)


def test_a_full_disk_is_noticed_before_writing(
    pair: tuple[models.Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, trunk = pair
    size = graft(trunk, m.path, tmp_path / "joined.gguf").n_bytes
    before = sorted(tmp_path.iterdir())

    def written(*_: object) -> None:
        raise AssertionError("something was written")

    for free in (0, size - 1):
        with monkeypatch.context() as patch:
            patch.setattr(write, "free_space", lambda _, free=free: free)
            patch.setattr(write, "_write_data", written)
            with pytest.raises(FileWriteError, match=r"needs 0\.00 GB.*Make room"):
                graft(trunk, m.path, tmp_path / "joined.gguf", force=True)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(write, "free_space", lambda _: size)
    graft(trunk, m.path, tmp_path / "joined.gguf", force=True)


def test_a_disk_that_fills_up_leaves_nothing(
    pair: tuple[models.Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, trunk = pair
    before = sorted(tmp_path.iterdir())

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for function in ("copy_file_range", "write", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail, raising=False)
            with pytest.raises(FileWriteError, match="No space left"):
                graft(trunk, m.path, tmp_path / "joined.gguf")
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_nothing_and_keeps_the_old_file(
    pair: tuple[models.Model, Path], tmp_path: Path, error: type[BaseException]
) -> None:
    m, trunk = pair
    out = tmp_path / "joined.gguf"
    out.write_bytes(b"the old file")
    before = sorted(tmp_path.iterdir())
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        assert 0 < done <= total
        if calls == 5:
            raise error

    with pytest.raises(error):
        graft(trunk, m.path, out, force=True, progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    assert out.read_bytes() == b"the old file"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_leaves_nothing(
    pair: tuple[models.Model, Path], tmp_path: Path, number: signal.Signals
) -> None:
    m, trunk = pair
    before = sorted(tmp_path.iterdir())
    # The command itself, made slow enough to be hit while it writes.
    slow = (
        "import time; from llama_mtp.commands.main import main; from llama_mtp.gguf import write\n"
        "add = write._Meter.add\n"
        "write._Meter.add = lambda meter, n: (time.sleep(0.05), add(meter, n))\n"
        "main()"
    )
    arguments = ["graft", str(trunk), str(m.path), "-o", str(tmp_path / "joined.gguf")]
    child = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".joined.gguf.*.part")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(60) != 0
    assert sorted(tmp_path.iterdir()) == before


def test_what_reads_back_otherwise_is_refused(
    pair: tuple[models.Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses bits: in the header, and in the head's data."""
    m, trunk = pair
    before = sorted(tmp_path.iterdir())
    compare = write._compare
    for at, cause in ((0.3, "another header"), (0.999, "does not read back")):

        def damage(path: Path, *rest: Any, at: float = at) -> None:
            header = read_header(path)
            start = (
                header.entries["general.name"][1] - 1 if at < 0.5 else int(header.file_size * at)
            )
            with path.open("r+b") as file:
                file.seek(start)
                byte = file.read(1)[0]
                file.seek(start)
                file.write(bytes([byte ^ 1]))
            compare(path, *rest)

        monkeypatch.setattr(write, "_compare", damage)
        with pytest.raises(FileWriteError, match=cause):
            graft(trunk, m.path, tmp_path / "joined.gguf")
        assert sorted(tmp_path.iterdir()) == before


def test_an_input_that_ends_early_leaves_nothing(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    shrinking = rewrite(trunk, tmp_path / "shrinking.gguf")
    before = sorted(tmp_path.iterdir())
    size = shrinking.stat().st_size

    def truncate(done: int, total: int) -> None:
        os.truncate(shrinking, size // 2)

    with pytest.raises(ModelFileError, match="ended while it was read"):
        graft(shrinking, m.path, tmp_path / "joined.gguf", progress=truncate)
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_kernels_copy_the_file_is_the_same(
    pair: tuple[models.Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, trunk = pair
    expected = graft(trunk, m.path, tmp_path / "a.gguf").path.read_bytes()

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert graft(trunk, m.path, tmp_path / "b.gguf").path.read_bytes() == expected
    monkeypatch.delattr(os, "copy_file_range")
    assert graft(trunk, m.path, tmp_path / "c.gguf").path.read_bytes() == expected


def test_the_trunks_data_lies_in_its_pages_as_before(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    """Only then does the kernel copy whole pages."""
    m, trunk = pair
    for length in (0, 1, 31, 32, 4000):
        base = rewrite(trunk, tmp_path / "base.gguf", change={"x": "x" * length})
        before, after = (
            read_header(base),
            read_header(graft(base, m.path, tmp_path / "joined.gguf", force=True).path),
        )
        for name, tensor in before.tensors.items():
            place = before.data_offsets[0] + tensor.offset
            assert (after.data_offsets[0] + after.tensors[name].offset - place) % 4096 == 0


def test_progress_ends_at_the_total(pair: tuple[models.Model, Path], tmp_path: Path) -> None:
    m, trunk = pair
    seen: list[tuple[int, int]] = []
    out = tmp_path / "joined.gguf"
    graft(trunk, m.path, out, progress=lambda *x: seen.append(x))
    header = read_header(out)
    assert seen[-1] == (header.file_size - header.data_offsets[0],) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_alignment_of_the_base_is_respected(
    pair: tuple[models.Model, Path], tmp_path: Path
) -> None:
    m, trunk = pair
    wide = rewrite(trunk, tmp_path / "wide.gguf", change={"general.alignment": 256})
    header = read_header(graft(wide, m.path, tmp_path / "joined.gguf").path)
    assert header.data_offsets[0] % 256 == 0
    assert all(t.offset % 256 == 0 for t in header.tensors.values())
    assert contents(header.path) == contents(m.path)
    gguf.GGUFReader(header.path)  # another reader takes it too


# --- verification by running ----------------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------


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
