"""Heads that are declared and that no graph of the host executes, and heads that nobody has run.

What may not be drafted with is refused before anything native runs, with the reason and the remedy,
and runs as stock under ``auto``. That the host really cannot is shown by making it try.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from hostile import raw
from models import expected_acceptance
from models.families import not_executable
from models.families.common import Files

import llama_mtp
from llama_mtp.errors import SpecTypeError
from llama_mtp.heads.architectures import ARCHITECTURES, NOT_EXECUTABLE
from llama_mtp.heads.check import check_head

PROMPT = [300, 301, 302]
N_TOKENS = 40


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    folder = tmp_path_factory.mktemp("not-executable")
    return {arch: not_executable.build(arch, folder) for arch in NOT_EXECUTABLE}


def header_only(folder: Path, arch: str) -> Path:
    """A file that llama.cpp cannot load: whatever is said about it was said by the header."""
    return raw.write(folder / "m.gguf", raw.model(arch).pieces())


# ---- declared, and no graph ---------------------------------------------------------------------


def test_every_architecture_without_a_graph_has_a_constructed_model() -> None:
    assert set(not_executable.FAMILIES) == set(NOT_EXECUTABLE)


@pytest.mark.parametrize("arch", NOT_EXECUTABLE)
def test_insisting_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    path = header_only(tmp_path, arch)
    for allow_untested in "01":
        monkeypatch.setenv("LLAMA_MTP_ALLOW_UNTESTED", allow_untested)
        with pytest.raises(SpecTypeError) as caught:
            llama_mtp.Llama(str(path), spec_type="draft-mtp", **COMMON)
        assert NOT_EXECUTABLE[arch] in str(caught.value)
        assert 'Use spec_type="none"' in str(caught.value)


@pytest.mark.parametrize("arch", NOT_EXECUTABLE)
def test_a_model_that_loads_is_refused_too_and_is_stock_under_auto(
    built: dict[str, Files],
    stock: StockFactory,
    ours: LlamaFactory,
    caplog: pytest.LogCaptureFixture,
    arch: str,
) -> None:
    with pytest.raises(SpecTypeError, match="is not possible"):
        ours(built[arch], spec_type="draft-mtp")
    with caplog.at_level(logging.INFO, logger="llama_mtp"):
        llama = ours(built[arch], spec_type="auto")
    assert [r.message for r in caplog.records if NOT_EXECUTABLE[arch] in r.message]
    assert llama.spec_type == "none"
    assert tokens(llama) == tokens(stock(built[arch]))


def tokens(llama: Any) -> list[int]:
    made = llama.generate(PROMPT, temp=0.8, top_k=40)
    llama.set_seed(7)
    return [token for token, _ in zip(made, range(N_TOKENS), strict=False)]


# What the host does when it is made to try: no context, no process, or the trunk's graph, which
# does not read the hidden rows it is given.
NO_CONTEXT, DIES, TRUNK = "no context", "dies", "the trunk's graph"
HOST = dict.fromkeys(NOT_EXECUTABLE, NO_CONTEXT) | {"dots3note": DIES, "nemotron_h": TRUNK}


@pytest.mark.parametrize("arch", NOT_EXECUTABLE)
def test_the_host_has_no_graph_for_them(built: dict[str, Files], arch: str) -> None:
    child = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "hostile" / "make_draft.py"),
            built[arch].path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    outcome = child.stdout.splitlines()[-1] if child.returncode == 0 else DIES
    assert outcome == HOST[arch], child.stdout + child.stderr[-2000:]


# ---- never run ----------------------------------------------------------------------------------


def test_an_architecture_that_was_never_run_is_refused_and_told_how_to_try(tmp_path: Path) -> None:
    path = header_only(tmp_path, "novel")
    report = check_head(path)
    assert report.untested and not report.executable
    assert "no release of llama-mtp has run the architecture novel" in report.reason
    assert "LLAMA_MTP_ALLOW_UNTESTED=1" in report.remedy
    with pytest.raises(SpecTypeError, match="LLAMA_MTP_ALLOW_UNTESTED=1"):
        llama_mtp.Llama(str(path), spec_type="draft-mtp", **COMMON)


def test_an_architecture_that_was_never_run_passes_where_it_is_allowed(tmp_path: Path) -> None:
    report = check_head(header_only(tmp_path, "novel"), allow_untested=True)
    assert report.untested and report.executable


@pytest.mark.parametrize("dropped", raw.HEAD)
def test_to_allow_an_architecture_does_not_replace_its_head(tmp_path: Path, dropped: str) -> None:
    file = raw.model("novel")
    file.tensors = [t for t in file.tensors if t.name != f"blk.2.{dropped}".encode()]
    path = raw.write(tmp_path / "m.gguf", file.pieces())
    report = check_head(path, allow_untested=True)
    assert not report.executable
    assert report.missing == (f"blk.2.{dropped}",)


@pytest.mark.parametrize("arch", ["hy_v3", "mimo2"])
def test_an_architecture_that_is_allowed_drafts_rightly_with_both_kinds_of_graph(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
) -> None:
    """As if the architecture were in no table: one of them gathers its rows, one does not."""
    built = model(arch, head="hidden", state_scale=0.0)
    expected = tokens(stock(built))
    monkeypatch.delitem(ARCHITECTURES, arch)
    with pytest.raises(SpecTypeError, match="LLAMA_MTP_ALLOW_UNTESTED=1"):
        ours(built)
    monkeypatch.setenv("LLAMA_MTP_ALLOW_UNTESTED", "1")
    llama = ours(built)
    assert tokens(llama) == expected
    # A head that reads only the hidden row is right only as long as it is given the right one.
    rounds = expected_acceptance(built, PROMPT, expected, 3)
    assert rounds.accepted > 0
    assert llama.spec_stats.num_accepted_tokens == rounds.accepted
