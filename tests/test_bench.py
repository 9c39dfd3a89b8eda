"""``llama-mtp bench``: what it measures, prints, writes and draws."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMON, LlamaFactory, ModelFactory
from typer.testing import CliRunner

import llama_mtp
from llama_mtp import cli
from llama_mtp.bench import PROMPTS, Pair, Run
from llama_mtp.errors import LlamaMtpError, SpecTypeError
from llama_mtp.stats import SpecStats
from llama_mtp.sweep import (
    DEPTHS,
    Prompt,
    Series,
    Sweep,
    Variant,
    parse_chances,
    parse_depths,
    phases,
)
from llama_mtp.sweep_run import MEANINGLESS

CLASSES = ("--classes", "qa_factual,translation")


def bench(path: Path, *args: object) -> str:
    """Output of the command on one thread, 24 tokens a run."""
    options = ("--threads", 1, "--max-tokens", 24, *args)
    done = CliRunner().invoke(cli.app, ["bench", str(path), *map(str, options)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def run(seconds: float, *tokens: int) -> Run:
    return Run(tokens, 0.1, seconds)


# --- the figures ----------------------------------------------------------------------------------


def test_the_nine_classes() -> None:
    assert list(PROMPTS) == [
        "code_python",
        "code_cpp",
        "explain_concept",
        "summarize",
        "qa_factual",
        "translation",
        "creative_short",
        "stepwise_math",
        "long_code_review",
    ]


def test_a_pair_is_judged_by_its_medians_and_all_its_tokens() -> None:
    plain = tuple(run(2.0, 1, 2, 3) for _ in range(3))
    pair = Pair("x", plain, (run(1.0, 1, 2, 3), run(9.0, 1, 2, 3), run(1.0, 1, 2, 3)), 6, 3)
    assert (pair.plain_rate, pair.mtp_rate, pair.ratio) == (1.0, 2.0, 2.0)
    assert pair.same_tokens
    assert not Pair("x", plain, (run(1.0, 1, 2, 4),) * 3, 6, 3).same_tokens


def sweep(**changes: Any) -> Sweep:
    """Two classes, plain against depth 1: twice as fast on one, half as fast on the other."""

    def series(name: str, variant: Variant, *seconds: float) -> Series:
        stats = SpecStats()
        if variant != "plain":
            stats.observe_round(1, 2, 1, target_ns=3000, draft_ns=2000, sample_ns=1000)
            stats.observe_round(1, 1, 0, target_ns=5000, native_overhead_ns=400, python_ns=600)
        return Series(name, 0.0, variant, tuple(run(s, 1, 2, 3) for s in seconds), stats)

    return Sweep(
        **{
            "series": [
                series("a", "plain", 2.0, 2.0, 8.0),
                series("a", 1, 1.0, 9.0, 4.0),
                series("b", "plain", 1.0, 1.0, 1.0),
                series("b", 1, 2.0, 2.0, 2.0),
            ],
            "prompt": Prompt(10, (1.0, 2.0, 2.0), (1.5, 2.0, 3.0)),
            "memory": {"draft KV on CPU": 7},
            "added_memory": 5,
            **changes,
        }
    )


def test_ratios_are_of_the_same_turn() -> None:
    found = sweep()
    assert found.get("a", 0.0, 1).ratios(found.get("a", 0.0, "plain")) == [2.0, 2 / 9, 2.0]
    assert found.ratio("a", 0.0, 1) == 2.0
    assert found.ratio("b", 0.0, 1) == 0.5
    assert found.mean_ratio(0.0, 1) == pytest.approx(1.0)
    assert (found.prompt.plain_rate, found.prompt.mtp_rate, found.prompt.ratio) == (5, 5, 1.5)


def test_phases_are_microseconds_of_a_round() -> None:
    assert phases(sweep().stats(1)) == {
        "target decode": 4.0,
        "draft decodes": 1.0,
        "sampling": 0.5,
        "native rest": 0.2,
        "Python rest": 0.3,
    }
    assert phases(SpecStats()) == {}


def test_what_a_coin_decided_is_marked_in_the_file() -> None:
    assert sweep().to_dict()["meaningless"] is False
    told = sweep(synthetic=(0.5,)).to_dict()
    assert (told["meaningless"], told["synthetic"]) == (True, [0.5])


def test_counters_of_several_generations_add_up() -> None:
    rounds = [(3, 4, 3), (1, 1, 0), (2, 2, 1)]
    whole, total = SpecStats(), SpecStats()
    for counts in rounds:
        one = SpecStats()
        for stats in (whole, one):
            stats.observe_round(*counts, target_ns=7, draft_decodes=2)
        total.add(one)
    assert total.as_dict() == whole.as_dict()


def test_lists_on_the_command_line() -> None:
    assert parse_depths("1,2, 3,4,adaptive") == DEPTHS
    assert parse_depths("2,2") == (2,)
    assert parse_chances("1,0.5") == (1.0, 0.5)
    for text in ("", "x", "-1", "1.5", "65"):
        with pytest.raises(LlamaMtpError, match="--depths"):
            parse_depths(text)
    for text in ("", "x", "-0.1", "1.1", "nan"):
        with pytest.raises(LlamaMtpError, match="--synthetic"):
            parse_chances(text)


# --- the command ----------------------------------------------------------------------------------


def test_it_measures_any_file(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    text = bench(model("hy_v3").path, "--repeats", 2, *CLASSES, "--json", file)
    for line in ("temperature 0 ", "temperature 0.8 ", "qa_factual", "translation", "  adaptive"):
        assert line in text
    flat = " ".join(text.split())
    assert re.search(r"memory: [+-][0-9.]+ MiB of buffers .* draft KV on CPU [0-9.]+", flat)
    assert re.search(r"prompt of 512 tokens, .* with MTP; takes [0-9.]+ times", flat)
    assert "MEANINGLESS" not in text
    told = json.loads(file.read_text())
    assert told["meaningless"] is False
    keys = [(row["class"], row["temperature"], row["depth"]) for row in told["series"]]
    variants = ("plain", *DEPTHS)
    names = ("qa_factual", "translation")
    assert keys == [(c, t, v) for c in names for t in (0.0, 0.8) for v in variants]
    for row in told["series"]:
        assert row["tokens"] == 2 * 24
        assert row["same_tokens"]
        assert len(row["ratios"]) == 2
        if row["depth"] == "plain":
            assert row["num_rounds"] == 0
        else:  # every token but the first of a run comes out of a round
            assert row["num_emitted_tokens"] == 2 * 23
            assert row["target_ns"] > 0
        if isinstance(row["depth"], int):
            assert len(row["num_drafted_per_pos"]) == row["depth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json"]


def test_depths_that_a_file_cannot_draft_are_named(model: ModelFactory) -> None:
    two_heads = model("mimo2", n_heads=2)  # a chain: nobody trained a third
    text = bench(two_heads.path, "--repeats", 1, *CLASSES, "--temp", 0, "--depths", "2,3,4")
    assert "deeper than this file drafts: 3, 4" in text
    assert re.search(r"^ +2 +24 ", text, re.MULTILINE)


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> str:
        done = CliRunner().invoke(cli.app, ["bench", str(model("hy_v3").path), *map(str, args)])
        assert isinstance(done.exception, (LlamaMtpError, SystemExit))
        return done.output + str(done.exception)

    monkeypatch.setattr("llama_mtp.sweep_run.open_pair", None)
    assert "no folder" in refused("--json", tmp_path / "no" / "x.json")
    assert "code_cpp" in refused("--classes", "poetry")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'llama-mtp[bench]'" in refused("--plot", tmp_path / "x.png")


@pytest.mark.clients  # whose extra brings matplotlib
def test_it_draws_a_picture(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    bench(model("hy_v3").path, "--repeats", 1, *CLASSES, "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    svg = tmp_path / "x.svg"
    options = ("--temp", 0, "--depths", "2", "--synthetic", "0.5", "--plot", svg)
    bench(model("hy_v3").path, "--repeats", 1, *CLASSES, *options)
    assert svg.read_text().count("<!-- MEANINGLESS") == 1


# --- a coin in place of the model -----------------------------------------------------------------


def test_a_synthetic_run_says_so_above_every_figure(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "coin.json"
    options = ("--temp", 0, "--synthetic", "1,0", "--depths", "1,3", "--json", file)
    text = bench(model("qwen35").path, "--repeats", 1, *CLASSES, *options)
    flat = " ".join(text.split())
    assert flat.count("MEANINGLESS, drafts accepted by a coin") == 5
    assert MEANINGLESS in flat
    told = json.loads(file.read_text())
    assert told["meaningless"] is True
    for row in told["series"]:
        if row["depth"] == 1:
            assert row["acceptance_per_pos"] == [1.0]
        elif row["depth"] == 3:
            assert row["acceptance_per_pos"] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("arch", ["qwen35", "hy_v3", "mimo2"])
def test_the_coin_keeps_its_chances_and_its_seed(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    def toss(seed: int) -> tuple[list[int], list[float]]:
        fast = ours(model(arch))
        fast._session.accept_by_coin([0.9, 0.5], seed)
        tokens = list(islice(fast.generate(model(arch).text(9), temp=0.0), 480))
        return tokens, fast.spec_stats.acceptance_per_pos

    tokens, rates = toss(1)
    assert rates == pytest.approx([0.9, 0.5, 0.5], abs=0.15)
    assert toss(1) == (tokens, rates)
    assert toss(2)[0] != tokens


def test_without_chances_the_model_decides_again(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("qwen35")

    def text(fast: Any) -> list[int]:
        return list(islice(fast.generate(m.text(9), temp=0.0), 60))

    true = text(ours(m))
    fast = ours(m)
    fast._session.accept_by_coin([0.5])
    assert text(fast) != true
    fast._session.accept_by_coin([])
    fast.reset()
    assert text(fast) == true


# --- one object for all depths --------------------------------------------------------------------


def test_a_constant_depth_leaves_the_policy_as_it_was(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35")
    fast = ours(m, spec_draft_adaptive=True)
    list(islice(fast.generate(m.text(9), temp=0.0), 200))
    policy = fast._session.policy
    before = policy.explain()
    for depth in (2, 0, 3):
        with fast.spec_constant_depth(depth):
            list(islice(fast.generate(m.text(9), temp=0.0), 30))
            assert fast.spec_depth == depth
        last = fast.spec_stats.last
        assert len(last.num_drafted_per_pos) == depth
        assert all(n == last.num_rounds for n in last.num_drafted_per_pos[:1])
    assert fast._session.policy is policy
    assert policy.explain() == before
    with pytest.raises(ValueError, match="between 0 and 3"), fast.spec_constant_depth(4):
        pass
    assert fast._session.policy is policy


def test_spec_depth_names_what_spec_draft_adaptive_switches(model: ModelFactory) -> None:
    path = str(model("hy_v3").path)
    cases: tuple[tuple[dict[str, Any], bool], ...] = (
        ({}, True),
        ({"spec_depth": "adaptive"}, True),
        ({"spec_depth": "fixed"}, False),
        ({"spec_draft_adaptive": False}, False),
        ({"spec_depth": "fixed", "spec_draft_adaptive": False}, False),
    )
    for own, adaptive in cases:
        with llama_mtp.Llama(path, spec_type="draft-mtp", **COMMON, **own) as fast:
            assert fast._session is not None
            assert fast._session.policy.adaptive == adaptive
    contradiction: dict[str, Any] = {"spec_depth": "fixed", "spec_draft_adaptive": True}
    for wrong in ({"spec_depth": "deep"}, contradiction):
        with pytest.raises(SpecTypeError, match="spec_depth"):
            llama_mtp.Llama(path, **COMMON, **wrong)
    with (
        llama_mtp.Llama(path, spec_type="none", **COMMON) as plain,
        pytest.raises(SpecTypeError, match="No spec type"),
        plain.spec_constant_depth(1),
    ):
        pass


def test_a_position_that_was_never_tested_has_no_acceptance(
    model: ModelFactory, tmp_path: Path
) -> None:
    options = ("--temp", 0, "--synthetic", "0", "--depths", "3")
    text = bench(model("qwen35").path, "--repeats", 1, *CLASSES, *options)
    assert len(re.findall(r"^ +3 .* \.00 - - +1\.00 ", text, re.MULTILINE)) == 3
