"""``tests/bench/instrument.py``: what it measures, prints, writes and draws."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import instrument
import pytest
import tables
from conftest import COMMON, ModelFactory
from instrument import Fresh, Prompt, Sweep, parse_chances, run_fresh, run_sweep, time_prompt
from rich.console import Console

import llama_mtp
from llama_mtp.engine.stats import SpecStats
from llama_mtp.errors import LlamaMtpError
from llama_mtp.measure.bench import DEPTHS, Figures
from llama_mtp.measure.pairs import PROMPTS, chat_tokens, open_pair

CLASSES = ("--classes", "qa_factual,translation")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return ``run(path, *arguments)``: the program's output on one thread, 24 tokens a run."""

    def run(path: Path, *args: object) -> str:
        instrument.main([str(path), "-t", "1", "--max-tokens", "24", *map(str, args)])
        return capsys.readouterr().out

    return run


# --- the figures ----------------------------------------------------------------------------------


def test_prompts_are_compared_turn_by_turn() -> None:
    prompt = Prompt(10, (1.0, 2.0, 2.0), (1.5, 2.0, 3.0), (0.1, 0.1, 0.4))
    assert (prompt.plain_rate, prompt.mtp_rate, prompt.ratios) == (5, 5, [1.5, 1.0, 1.5])
    assert prompt.catch_up_shares == [0.1, 0.05, 0.2]


def test_phases_are_microseconds_of_a_round() -> None:
    stats = SpecStats()
    stats.observe_round(1, 2, 1, target_ns=3000, draft_ns=2000, sample_ns=1000)
    rest = {"rollback_ns": 200, "native_overhead_ns": 200, "python_ns": 600}
    stats.observe_round(1, 1, 0, target_ns=5000, **rest)
    assert tables.phases(stats) == {
        "target decode": 4.0,
        "draft decodes": 1.0,
        "sampling": 0.5,
        "rollback": 0.1,
        "native rest": 0.1,
        "Python rest": 0.3,
    }
    assert tables.phases(SpecStats()) == {}


def test_what_a_coin_decided_is_marked_in_the_file() -> None:
    prompt = Prompt(10, (1.0,), (1.0,), (0.1,))
    for coin in ((), (0.5,)):
        sweep = Sweep(Figures([]), prompt, {}, 0, 3, coin)
        for told in (sweep.to_dict(), Fresh((), coin).to_dict()):
            assert (told["meaningless"], told["synthetic"]) == (bool(coin), list(coin))


def test_chances_on_the_command_line() -> None:
    assert parse_chances("1,0.5") == (1.0, 0.5)
    for text in ("", "x", "-0.1", "1.1", "nan"):
        with pytest.raises(LlamaMtpError, match="--synthetic"):
            parse_chances(text)


# --- the program ----------------------------------------------------------------------------------


def test_it_measures_any_file(model: ModelFactory, tmp_path: Path, run: Any) -> None:
    file = tmp_path / "all.json"
    text = run(model("hy_v3").path, "--repeats", 2, *CLASSES, "--json", file)
    for line in ("temperature 0 ", "temperature 0.8 ", "qa_factual", "translation", "  adaptive"):
        assert line in text
    flat = " ".join(text.split())
    assert re.search(r"memory: [+-][0-9.]+ MiB of buffers .* draft KV on CPU [0-9.]+", flat)
    assert re.search(r"prompt of 512 tokens, .* with MTP; takes [0-9.]+ times", flat)
    assert re.search(r"drafts for the first time: -?[0-9.]+ ms, -?[0-9.]+% of the prompt", flat)
    assert "interval: 50% of the median of 2 turns" in flat
    assert len(re.findall(r"geometric mean +[0-9.]+ +[0-9.]+ +[0-9.]+ [0-9.]+-", text)) == 2
    assert max(map(len, text.splitlines())) <= 110
    assert "MEANINGLESS" not in text
    told = json.loads(file.read_text())
    assert told["meaningless"] is False
    keys = [(row["class"], row["temperature"], row["depth"]) for row in told["series"]]
    names = ("qa_factual", "translation")
    assert keys == [(c, t, v) for c in names for t in (0.0, 0.8) for v in ("plain", *DEPTHS)]
    for row in (*told["series"], *told["means"]):
        low, high, _ = row["ratio_interval"]
        assert low <= row["ratio"] <= high
    assert [row["class"] for row in told["bounds"]] == [*names, *names]
    for row in told["bounds"]:
        assert row["bound_free_of_overhead"] >= row["bound"] >= 1.0
        assert row["adaptive_of_bound"] == row["adaptive"] / row["bound"]
    assert sorted(told["round_costs_in_plain_tokens"]) == ["1", "2", "3", "4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json"]


def test_new_objects_at_every_turn(
    model: ModelFactory,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened = []

    def counted(path: Path, **options: Any) -> Any:
        opened.append(options["spec_draft_n_max"])
        return open_pair(path, **options)

    monkeypatch.setattr("instrument.open_pair", counted)
    file = tmp_path / "fresh.json"
    options = ("--repeats", 3, *CLASSES, "--fresh", "--spec-draft-n-max", 2, "--json", file)
    text = run(model("qwen35").path, *options)
    assert opened == [2] * (2 * 2 * 3)  # classes, temperatures, turns
    assert len(re.findall(r"^ +(?:qa_factual|translation) ", text, re.MULTILINE)) == 4
    assert max(map(len, text.splitlines())) <= 110
    told = json.loads(file.read_text())
    assert len(told["generations"]) == 2
    for generation in told["generations"]:
        assert [row["depth"] for row in generation["series"]] == ["plain", "adaptive"] * 4
        assert len(generation["means"]) == 2
        for row in generation["series"]:
            assert row["same_tokens"]
            assert row["tokens"] == 3 * 24
            assert len(row["ratios"]) == 3
            assert row["num_emitted_tokens"] == (3 * 23 if row["depth"] == "adaptive" else 0)
    with pytest.raises(SystemExit):
        run(model("qwen35").path, "--fresh", "--plot", "x.png")
    assert "leave one out" in capsys.readouterr().err


@pytest.mark.clients  # whose extra brings matplotlib
def test_a_picture_of_a_coin_says_so(model: ModelFactory, tmp_path: Path, run: Any) -> None:
    svg = tmp_path / "x.svg"
    options = ("--temp", 0, "--depths", "2", "--synthetic", "0.5", "--plot", svg)
    run(model("hy_v3").path, "--repeats", 1, *CLASSES, *options)
    assert svg.read_text().count("<!-- MEANINGLESS") == 1


# --- a prompt -------------------------------------------------------------------------------------


class Rounds:
    """Stands for the statistics of an object: ``last`` is that of the rounds booked so far."""

    def __init__(self) -> None:
        self.last: SpecStats | None = None

    def run(self, draft_ns: list[int]) -> Iterator[int]:
        self.last = SpecStats()
        for ns in draft_ns:
            yield 0
            self.last.observe_round(1, 1, 0, draft_ns=ns)
        yield from iter([0, 0])


def test_the_catch_up_is_what_the_first_draft_takes_beyond_later_ones() -> None:
    stats = Rounds()
    stream = stats.run([9000, 100, 200, 300, 400, 10**9])
    assert instrument._catch_up(stream, stats) == pytest.approx((9000 - 250) / 1e9)


def test_a_prompt_is_timed_once_a_turn_on_either_side(model: ModelFactory) -> None:
    with open_pair(model("hy_v3").path, **COMMON, spec_draft_n_max=1) as (plain, mtp, _):
        found = time_prompt(plain, mtp, 3)
    assert found.n_tokens == COMMON["n_ctx"] - 32
    assert len(found.plain) == len(found.mtp) == len(found.catch_up) == 3


# --- a coin in place of the model -----------------------------------------------------------------


def test_a_synthetic_run_says_so_above_every_figure(
    model: ModelFactory, tmp_path: Path, run: Any
) -> None:
    file = tmp_path / "coin.json"
    options = ("--temp", 0, "--synthetic", "1,0", "--depths", "1,3", "--json", file)
    flat = " ".join(run(model("qwen35").path, "--repeats", 1, *CLASSES, *options).split())
    assert flat.count("MEANINGLESS, drafts accepted by a coin") == 7
    assert tables.MEANINGLESS in flat
    told = json.loads(file.read_text())
    assert told["meaningless"] is True
    for row in told["series"]:
        if row["depth"] == 1:
            assert row["acceptance_per_pos"] == [1.0]
        elif row["depth"] == 3:
            assert row["acceptance_per_pos"] == [1.0, 0.0, 0.0]


def test_a_head_that_is_always_wrong_leaves_plain_decoding_alone(model: ModelFactory) -> None:
    m = model("qwen35")
    common: dict[str, Any] = {
        **COMMON, "names": ["qa_factual"], "temps": [0.0], "repeats": 2, "bound": 3,
        "max_tokens": 40, "synthetic": (0.0,),
    }  # fmt: skip
    del common["verbose"]
    quiet = Console(quiet=True)
    swept = run_sweep(quiet, m.path, depths=(2, "adaptive"), **common)
    fresh = run_fresh(quiet, m.path, **common)
    with llama_mtp.Llama(str(m.path), spec_type="none", **COMMON) as plain:
        prompt = chat_tokens(plain, PROMPTS["qa_factual"])
        text = tuple(islice(plain.generate(prompt, temp=0.0), 40))
    for figures in (swept.figures, *fresh.generations):
        assert {run.tokens for run in figures.get("qa_factual", 0.0, "plain").runs} == {text}
        assert figures.stats("adaptive").num_accepted_tokens == 0
        assert figures.stats("adaptive").num_emitted_tokens == 2 * 39
    constant = swept.figures.stats(2)
    assert constant.num_drafts == constant.num_rounds == 2 * 39
    assert swept.limits(0.0)[0].bound == (1.0, 0)
    # Each turn's object is new: it knows nothing yet of the head, and drafts.
    for last in fresh.generations[0].get("qa_factual", 0.0, "adaptive").counters:
        assert last.num_picks > 0
