"""``llama-mtp bench``: what it measures, prints, writes and draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelFactory
from typer.testing import CliRunner

from llama_mtp.commands import main as cli
from llama_mtp.engine.stats import SpecStats
from llama_mtp.errors import LlamaMtpError
from llama_mtp.measure.bench import DEPTHS, Figures, Series, Variant, parse_depths
from llama_mtp.measure.bench_report import acceptance
from llama_mtp.measure.pairs import Run

CLASSES = ("--classes", "qa_factual,translation")


def bench(path: Path, *args: object) -> str:
    """Output of the command on one thread, 24 tokens a run."""
    options = ("--threads", 1, "--max-tokens", 24, *args)
    done = CliRunner().invoke(cli.app, ["bench", str(path), *map(str, options)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


# --- the figures ----------------------------------------------------------------------------------


def figures() -> Figures:
    """Two prompts, plain against depth 1: twice as fast on one, half as fast on the other."""
    stats = SpecStats()
    stats.observe_round(1, 2, 1)
    stats.observe_round(1, 1, 0)

    def series(name: str, variant: Variant, *seconds: float) -> Series:
        runs = tuple(Run((1, 2, 3), 0.1, s) for s in seconds)
        return Series(name, 0.0, variant, runs, (stats,) * len(runs))

    return Figures(
        [
            series("a", "plain", 2.0, 2.0, 8.0),
            series("a", 1, 1.0, 9.0, 4.0),
            series("b", "plain", 1.0, 1.0, 1.0),
            series("b", 1, 2.0, 2.0, 2.0),
        ]
    )


def test_ratios_are_of_the_same_turn() -> None:
    found = figures()
    assert found.ratios("a", 0.0, 1) == [2.0, 2 / 9, 2.0]
    assert (found.ratio("a", 0.0, 1), found.ratio("b", 0.0, 1)) == (2.0, 0.5)
    assert found.mean_ratio(0.0, 1) == pytest.approx(1.0)
    assert found.rate(0.0, "plain") == 1.5  # of 1.0 and 2.0
    assert found.mean_rows() == [{"temperature": 0.0, "depth": 1, "ratio": pytest.approx(1.0)}]


def test_a_variant_has_the_counters_of_all_its_runs() -> None:
    assert figures().stats(1).num_rounds == 2 * 2 * 3
    assert figures().stats(1, temp=0.8).num_rounds == 0


def test_a_text_has_parted_where_one_run_differs() -> None:
    found = figures()
    assert not found.parted("a", 0.0, 1)
    plain, mtp = found.series[:2]
    other = (*mtp.runs[:2], Run((1, 2, 4), 0.1, 1.0))
    assert Figures([plain, Series("a", 0.0, 1, other, mtp.counters)]).parted("a", 0.0, 1)


def test_a_position_that_was_never_tested_has_no_acceptance() -> None:
    stats = SpecStats()
    stats.observe_round(3, 1, 0)
    assert acceptance(stats) == ("0%", ".00 - -", "1.00")
    assert acceptance(SpecStats()) == ("", "", "")


def test_depths_on_the_command_line() -> None:
    assert parse_depths("1,2, 3,4,adaptive") == DEPTHS
    assert parse_depths("2,2") == (2,)
    for text in ("", "x", "-1", "1.5", "65"):
        with pytest.raises(LlamaMtpError, match="--depths"):
            parse_depths(text)


# --- the command ----------------------------------------------------------------------------------


def test_it_measures_any_file(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    text = bench(model("hy_v3").path, "--repeats", 2, *CLASSES, "--json", file)
    for line in ("temperature 0 ", "temperature 0.8 ", "all prompts", "adaptive, in the end: "):
        assert line in text
    assert re.search(r"^memory: [+-][0-9.]+ MiB of buffers", text, re.MULTILINE)
    row = r"^  2 +[0-9.]+ +[0-9.]+[*]? +[0-9.]+-[0-9.]+ +[0-9]+% [01]?\.[0-9]+ [01]?\.[0-9]+ "
    assert len(re.findall(row, text, re.MULTILINE)) == 4  # classes, temperatures
    assert max(map(len, text.splitlines())) <= 80
    told = json.loads(file.read_text())
    keys = [(row["class"], row["temperature"], row["depth"]) for row in told["series"]]
    names = ("qa_factual", "translation")
    assert keys == [(c, t, v) for c in names for t in (0.0, 0.8) for v in ("plain", *DEPTHS)]
    for row in told["series"]:
        assert row["tokens"] == 2 * 24
        assert row["same_tokens"]
        assert len(row["ratios"]) == 2
        if row["depth"] == "plain":
            assert row["num_rounds"] == 0
        else:  # every token but the first of a run comes out of a round
            assert row["num_emitted_tokens"] == 2 * 23
        if isinstance(row["depth"], int):
            assert len(row["num_drafted_per_pos"]) == row["depth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json"]


def test_depths_that_a_file_cannot_draft_are_named(model: ModelFactory) -> None:
    two_heads = model("mimo2", n_heads=2)  # a chain: nobody trained a third
    text = bench(two_heads.path, "--repeats", 1, *CLASSES, "--temp", 0, "--depths", "2,3,4")
    assert "deeper than this file drafts: 3, 4" in text
    assert not re.search(r"^  [34] ", text, re.MULTILINE)
    assert "adaptive" not in text


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> str:
        done = CliRunner().invoke(cli.app, ["bench", str(model("hy_v3").path), *map(str, args)])
        assert isinstance(done.exception, (LlamaMtpError, SystemExit))
        return done.output + str(done.exception)

    monkeypatch.setattr("llama_mtp.measure.bench_report.open_pair", None)
    assert "no folder" in refused("--json", tmp_path / "no" / "x.json")
    assert "code_cpp" in refused("--classes", "poetry")
    assert "name it .png, .svg or .pdf" in refused("--plot", tmp_path / "x.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'llama-mtp[bench]'" in refused("--plot", tmp_path / "x.png")


@pytest.mark.clients  # whose extra brings matplotlib
def test_it_draws_a_picture(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    bench(model("hy_v3").path, "--repeats", 1, *CLASSES, "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")


# --- the demo -------------------------------------------------------------------------------------


def test_the_demo_answers_compares_and_judges(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command as it is, on constructed models in the place of SmolLM2."""
    shipped = model("mimo2", head=None).path
    monkeypatch.setattr("llama_mtp.demo.model.base_model", lambda: shipped)
    monkeypatch.setattr("llama_mtp.demo.model.demo_model", lambda *_, **__: model("mimo2").path)
    options = ["--max-tokens", "24", "--threads", "1", "--no-adaptive"]
    done = CliRunner().invoke(cli.app, ["demo", *options])
    assert done.exit_code == 0, done.output + repr(done.exception)
    flat = " ".join(done.output.split())
    assert "What is the capital of Portugal" in flat
    assert "same tokens 4 of 4 prompts" in flat
    assert len(re.findall(r"^  3 ", done.output, re.MULTILINE)) == 4
    assert f"plain speed of the file as shipped ({shipped.name}): " in flat
    assert re.search(r"(MTP makes|MTP does not pay|The machine is too busy)[^.]+.*$", flat)
    assert max(map(len, done.output.splitlines())) <= max(80, len(f"model {model('mimo2').path}"))


def test_it_takes_one_prompt_of_the_users(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_mtp.demo.model.base_model", lambda: model("mimo2").path)
    monkeypatch.setattr("llama_mtp.demo.model.demo_model", lambda *_, **__: model("mimo2").path)
    options: list[Any] = ["--prompt", "Say [this].", "--max-tokens", "8", "--threads", "1"]
    done = CliRunner().invoke(cli.app, ["demo", *options])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "Say [this]." in done.output
    assert "1 of 1 prompts" in done.output
