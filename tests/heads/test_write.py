"""Writing a GGUF: all of it or nothing, and the bytes that were meant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import models
import pytest
from models.files import contents, rewrite

from llama_mtp.errors import FileWriteError, ModelFileError
from llama_mtp.gguf import write
from llama_mtp.gguf.header import read_header
from llama_mtp.heads.graft import graft


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
