"""``llama-mtp bench``: what it measures, prints, writes and draws."""

from __future__ import annotations

import json
import random
import re
from itertools import islice, product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory
from rich.console import Console
from typer.testing import CliRunner

import llama_mtp
from llama_mtp.commands import cli
from llama_mtp.engine.stats import SpecStats
from llama_mtp.errors import LlamaMtpError, SpecTypeError
from llama_mtp.measure.bench import (
    DEPTHS,
    Course,
    Prompt,
    Series,
    Sweep,
    Variant,
    parse_chances,
    parse_depths,
    phases,
)
from llama_mtp.measure.bench_report import MEANINGLESS, open_pair, run_bench, run_fresh
from llama_mtp.measure.bound import Sample, bound, mean_interval, median_interval
from llama_mtp.measure.pairs import PROMPTS, Pair, Run, chat_tokens

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
            rest = {"rollback_ns": 200, "native_overhead_ns": 200, "python_ns": 600}
            stats.observe_round(1, 1, 0, target_ns=5000, **rest)
        runs = tuple(run(s, 1, 2, 3) for s in seconds)
        return Series(name, 0.0, variant, runs, (stats,) * len(runs))

    return Sweep(
        **{
            "series": [
                series("a", "plain", 2.0, 2.0, 8.0),
                series("a", 1, 1.0, 9.0, 4.0),
                series("b", "plain", 1.0, 1.0, 1.0),
                series("b", 1, 2.0, 2.0, 2.0),
            ],
            "prompt": Prompt(10, (1.0, 2.0, 2.0), (1.5, 2.0, 3.0), (0.1, 0.1, 0.4)),
            "memory": {"draft KV on CPU": 7},
            "added_memory": 5,
            "deepest": 3,
            **changes,
        }
    )


def test_ratios_are_of_the_same_turn() -> None:
    found = sweep()
    assert found.get("a", 0.0, 1).ratios(found.get("a", 0.0, "plain")) == [2.0, 2 / 9, 2.0]
    assert found.ratio("a", 0.0, 1) == 2.0
    assert found.ratio("b", 0.0, 1) == 0.5
    assert found.mean_ratio(0.0, 1) == pytest.approx(1.0)
    prompt = found.prompt
    assert (prompt.plain_rate, prompt.mtp_rate, prompt.ratios) == (5, 5, [1.5, 1.0, 1.5])
    assert prompt.catch_up_shares == [0.1, 0.05, 0.2]


def test_phases_are_microseconds_of_a_round() -> None:
    assert phases(sweep().stats(1)) == {
        "target decode": 4.0,
        "draft decodes": 1.0,
        "sampling": 0.5,
        "rollback": 0.1,
        "native rest": 0.1,
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


# --- how sure a figure is -------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_of_a_median_holds_as_often_as_it_says(n: int) -> None:
    # With the true median at zero, each value is above or below it like a fair coin.
    inside = wider = 0
    low, high, coverage = median_interval(range(n))
    k = int(low) + 1
    assert (low, high) == (k - 1, n - k)
    for side in product((0, 1), repeat=n):
        inside += k <= sum(side) <= n - k
        wider += k + 1 <= sum(side) <= n - k - 1
    assert coverage == pytest.approx(inside / 2**n)
    assert coverage >= 0.95 or k == 1
    assert wider / 2**n < 0.95  # the next narrower one would not do


def test_the_interval_of_a_mean_is_that_of_all_possible_draws() -> None:
    rows = [(1.0, 2.0, 4.0), (3.0, 1.0, 2.0)]
    draws = [[median(draw) for draw in product(row, repeat=3)] for row in rows]
    means = sorted(geometric_mean(pair) for pair in product(*draws))
    exact = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    assert mean_interval(rows)[:2] == pytest.approx(exact)
    assert mean_interval(rows) == mean_interval(rows)
    assert mean_interval([(2.0,) * 7, (8.0,) * 7]) == pytest.approx((4.0, 4.0, 0.95))
    assert mean_interval([(2.0,), (8.0,)]).coverage == 0.0  # a single turn


def test_the_interval_of_a_mean_holds_the_true_one() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        low, high, _coverage = mean_interval(rng.lognormal(0.3, 0.1, size=(9, 7)).tolist())
        held += low <= np.exp(0.3) <= high
    assert held >= 54  # of the 57 that 95 % promise


# --- what costs and acceptance allow --------------------------------------------------------------

TARGET = {0: 0.8, 1: 1.3, 2: 1.25, 3: 1.4, 4: 1.41}  # by depth; two drafts are cheaper than one
STEP, OWN = 0.08, 0.02
REST = {0.0: 0.05, 0.8: 0.09}
PROMPT = {"sure": 0.0, "fair": 0.05, "never": 0.05}  # what reading it adds to a draft of the class
ACCEPT = {"sure": (0.95, 0.9, 0.85, 0.8), "fair": (0.6, 0.3, 0.2, 0.1), "never": (0.1, 0, 0, 0)}


def draft_cost(name: str, depth: int) -> float:
    return STEP * depth + PROMPT[name] * bool(depth)


def cost(name: str, depth: int, temp: float) -> float:
    """A round, in plain tokens."""
    return TARGET[depth] + draft_cost(name, depth) + REST[temp]


def simulated(turns: int = 15) -> tuple[Sweep, dict[tuple[str, float, int], list[int]]]:
    """Constant depths on a machine whose load changes from turn to turn, and their rounds by turn.

    A round in a hundred of one run in seven takes ten times as long.
    """
    rng = random.Random(3)
    series, rounds = [], {}
    for name, temp in product(ACCEPT, REST):
        loads = [rng.uniform(1.0, 3.0) * 1e7 for _ in range(turns)]  # ns of a plain token
        text = tuple(range(192))
        runs = tuple(Run(text, 0.1, 191 * load / 1e9) for load in loads)
        series.append(Series(name, temp, "plain", runs, (SpecStats(),) * turns))
        for depth in TARGET:
            found, counters = [], []
            for turn, load in enumerate(loads):
                stats, spent, left = SpecStats(), 0, 191
                while left:
                    accepted = 0
                    while accepted < depth and rng.random() < ACCEPT[name][accepted]:
                        accepted += 1
                    spike = 10 if turn % 7 == 3 and rng.random() < 0.01 else 1
                    sampled = min(accepted + 1, left)
                    times = {
                        "target_ns": round(TARGET[depth] * load * spike),
                        "draft_ns": round(draft_cost(name, depth) * load),
                        "native_overhead_ns": round(OWN * load),
                    }
                    spent += sum(times.values()) + round((REST[temp] - OWN) * load)
                    stats.observe_round(depth, sampled, min(accepted, sampled), **times)
                    left -= sampled
                found.append(Run(text, 0.1, spent / 1e9))
                counters.append(stats)
            series.append(Series(name, temp, depth, tuple(found), tuple(counters)))
            rounds[name, temp, depth] = [stats.num_rounds for stats in counters]
    return sweep(series=series), rounds


def test_costs_are_in_plain_tokens_of_the_same_turn() -> None:
    first, _, third = sweep().samples()[:3]
    assert first[:4] == third[:4] == ("a", 0.0, 1, 1.5)
    # A plain token took 1 s in the first turn and 4 s in the third; both MTP runs the same ns.
    assert first.target == pytest.approx(4000e-9)
    assert first.draft == pytest.approx(1000e-9)
    assert first.rest == pytest.approx(0.5 - 5000e-9)
    assert first.own == pytest.approx(500e-9)
    assert third.target == pytest.approx(1000e-9)
    assert third.rest == pytest.approx(0.5 - 1250e-9)


def test_the_bound_is_the_best_that_a_simulation_without_noise_reaches() -> None:
    found, rounds = simulated()
    for temp in REST:
        depths = {}
        for limit in found.limits(temp):
            brute = {0: 1.0}  # depth 0 is stock, whatever a token through the session costs
            formula = {0: 1.0}
            for depth in (1, 2, 3):  # found.deepest
                taken = rounds[limit.name, temp, depth]
                brute[depth] = median(191 / n for n in taken) / cost(limit.name, depth, temp)
                accept = ACCEPT[limit.name][:depth]
                tokens = 1 + sum(np.cumprod(accept))
                formula[depth] = tokens / cost(limit.name, depth, temp)
            best = max(brute, key=lambda depth: brute[depth])
            assert limit.bound == (pytest.approx(brute[best], rel=1e-4), best)
            assert limit.bound.ratio == pytest.approx(max(formula.values()), rel=0.03)
            whole = cost(limit.name, best, temp)
            free = brute[best] * whole / (whole - OWN) if best else 1.0
            assert limit.free == pytest.approx(free, rel=1e-4)
            assert limit.adaptive is None
            depths[limit.name] = limit.bound.depth
        assert depths == {"sure": 3, "fair": 2, "never": 0}
        mean = geometric_mean(limit.bound.ratio for limit in found.limits(temp))
        assert found.mean_limit(temp).bound == (pytest.approx(mean), None)
    assert sweep(series=found.series, deepest=1).limits(0.0)[0].bound.depth == 1
    told = found.to_dict()["round_costs_in_plain_tokens"][2]
    wanted = {"whole": 1.53, "target": 1.25, "draft": 0.21, "rest": 0.07, "own": 0.02}
    assert told == pytest.approx(wanted, abs=0.021)  # rest: of either temperature


def test_noise_that_hits_now_one_part_and_now_another_counts_as_cost() -> None:
    parts = ((1.1, 0.1, 0.1), (0.6, 0.6, 0.1), (0.6, 0.1, 0.6))
    samples = [Sample("a", 0.0, 1, 1.95, *part, 0.05) for part in parts]
    assert bound(samples, "a", 0.0, 1) == (pytest.approx(1.95 / 1.3), 1)
    assert bound(samples, "a", 0.0, 1, free=True) == (pytest.approx(1.95 / 1.25), 1)
    assert bound(samples, "b", 0.0, 1) == bound(samples, "a", 0.8, 1) == (1.0, 0)


def test_adaptive_is_compared_with_the_bound_of_its_class() -> None:
    found, _ = simulated(7)
    plain = found.get("sure", 0.0, "plain")
    speeds = (1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)
    runs = tuple(
        Run(run.tokens, 0.1, run.decode_seconds / speed)
        for run, speed in zip(plain.runs, speeds, strict=True)
    )
    one = [series for series in found.series if (series.name, series.temp) == ("sure", 0.0)]
    one.append(Series("sure", 0.0, "adaptive", runs, one[1].counters))
    (limit,) = sweep(series=one).limits(0.0)
    assert limit.adaptive == pytest.approx(1.5)
    assert limit.interval is not None
    wanted = 1.2 / limit.bound.ratio, 1.8 / limit.bound.ratio, 1 - 2 / 2**7
    assert limit.interval == pytest.approx(wanted)
    told = sweep(series=one).to_dict()
    assert told["bounds"][0]["adaptive_of_bound"] == pytest.approx(1.5 / limit.bound.ratio)
    assert told["mean_bounds"][0]["adaptive_of_bound"] == pytest.approx(1.5 / limit.bound.ratio)


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
    assert re.search(r"drafts for the first time: [0-9.]+ ms, [0-9.]+% of the prompt", flat)
    assert "interval: 50% of the median of 2 turns" in flat
    assert len(re.findall(r"geometric mean +[0-9.]+ +[0-9.]+ +[0-9.]+ [0-9.]+-", text)) == 2
    assert max(map(len, text.splitlines())) <= 110
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
    assert [row["class"] for row in told["bounds"]] == [*names, *names]
    for row in told["bounds"]:
        assert row["bound_free_of_overhead"] >= row["bound"] >= 1.0
        assert row["adaptive_of_bound"] == row["adaptive"] / row["bound"]
    assert sorted(told["round_costs_in_plain_tokens"]) == ["1", "2", "3", "4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json"]


def test_depths_that_a_file_cannot_draft_are_named(model: ModelFactory) -> None:
    two_heads = model("mimo2", n_heads=2)  # a chain: nobody trained a third
    text = bench(two_heads.path, "--repeats", 1, *CLASSES, "--temp", 0, "--depths", "2,3,4")
    assert "deeper than this file drafts: 3, 4" in text
    assert "interval: none of one turn" in text
    assert re.search(r"^ +2 +24 ", text, re.MULTILINE)


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


# --- a prompt, and new objects --------------------------------------------------------------------


def test_the_catch_up_is_what_the_first_draft_takes_for_the_prompt(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    catch_ups, prompts = {}, {}
    for window in (None, 8):
        if window is not None:
            monkeypatch.setenv("LLAMA_MTP_PREFILL_WINDOW", str(window))
        options = {**COMMON, "spec_draft_n_max": 1}
        with open_pair(model("hy_v3").path, **options) as (plain, mtp, _):
            found = Course(plain, mtp, ["qa_factual"], [0.0], (1,), 24, 5).time_prompt()
        assert found.n_tokens == 480
        assert len(found.plain) == len(found.mtp) == len(found.catch_up) == 5
        catch_ups[window], prompts[window] = median(found.catch_up), median(found.mtp)
    assert 0 < catch_ups[None] < 2 * prompts[None]
    assert catch_ups[8] < catch_ups[None] / 2


def test_new_objects_at_every_turn(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counted(path: Path, **options: Any) -> Any:
        opened.append(options["spec_draft_n_max"])
        return open_pair(path, **options)

    monkeypatch.setattr("llama_mtp.measure.bench_report.open_pair", counted)
    file = tmp_path / "fresh.json"
    options = ("--repeats", 3, *CLASSES, "--fresh", "--spec-draft-n-max", 2, "--json", file)
    text = bench(model("qwen35").path, *options)
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
    refused = CliRunner().invoke(
        cli.app, ["bench", str(model("qwen35").path), "--fresh", "--plot", "x.png"]
    )
    assert refused.exit_code == 2 and "leave one out" in refused.output


# --- a coin in place of the model -----------------------------------------------------------------


def test_a_synthetic_run_says_so_above_every_figure(model: ModelFactory, tmp_path: Path) -> None:
    file = tmp_path / "coin.json"
    options = ("--temp", 0, "--synthetic", "1,0", "--depths", "1,3", "--json", file)
    text = bench(model("qwen35").path, "--repeats", 1, *CLASSES, *options)
    flat = " ".join(text.split())
    assert flat.count("MEANINGLESS, drafts accepted by a coin") == 7
    assert MEANINGLESS in flat
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
    swept = run_bench(quiet, m.path, depths=(2, "adaptive"), **common)
    fresh = run_fresh(quiet, m.path, **common)
    with llama_mtp.Llama(str(m.path), spec_type="none", **COMMON) as plain:
        prompt = chat_tokens(plain, PROMPTS["qa_factual"])
        text = tuple(islice(plain.generate(prompt, temp=0.0), 40))
    for figures in (swept, *fresh.generations):
        assert {run.tokens for run in figures.get("qa_factual", 0.0, "plain").runs} == {text}
        assert figures.stats("adaptive").num_accepted_tokens == 0
        assert figures.stats("adaptive").num_emitted_tokens == 2 * 39
    assert swept.stats(2).num_drafts == swept.stats(2).num_rounds == 2 * 39
    assert swept.limits(0.0)[0].bound == (1.0, 0)
    # Each turn's object is new: it knows nothing yet of the head, and drafts.
    for last in fresh.generations[0].get("qa_factual", 0.0, "adaptive").counters:
        assert last.num_picks > 0


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
    fast = ours(m, spec_adaptive=True)
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


def test_without_a_spec_type_there_is_no_depth_to_keep(model: ModelFactory) -> None:
    path = str(model("hy_v3").path)
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
