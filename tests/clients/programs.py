"""Programs that know nothing of llama-mtp, run with and without it, and what they drafted.

A plugin that is on the path of these programs, and installed nowhere, writes down every round: the
package's own way to look into a process that somebody else wrote. It also keeps the depth: with
models this small the built-in policy would soon stop to draft.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sysconfig.get_path("scripts"), "llama-mtp"))
TIMEOUT = 120  # seconds for a program, a request, and the start of a server

_OBSERVER = """
import os
from llama_mtp.hooks import hookimpl

@hookimpl
def mtp_choose_depth(request):
    return request.n_max

@hookimpl
def mtp_round_finished(verdict):
    with open(os.environ["ROUNDS"], "a") as file:
        print(verdict.n_drafted, verdict.n_accepted, file=file)
"""


@dataclass(frozen=True)
class Rounds:
    """What a program booked: sums over its rounds."""

    number: int
    drafted: int
    accepted: int


class Programs:
    """Runs programs in ``folder``, with the drop-in or without it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "rounds.txt"
        plugins = folder / "plugins"
        self._distribution(plugins, "rounds", _OBSERVER)
        lookup = Path(__file__).parents[1] / "third_party" / "llama_mtp_prompt_lookup.py"
        self._distribution(plugins, "prompt_lookup", lookup.read_text(encoding="utf-8"))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")},
            "PYTHONPATH": str(plugins),
            "ROUNDS": str(self._log),
            "HOST": "127.0.0.1",
        }

    @staticmethod
    def _distribution(folder: Path, name: str, code: str) -> None:
        """Write a module and its entry point, as an installed distribution has them."""
        info = folder / f"{name}_plugin-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}_plugin.py").write_text(code)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[llama_mtp]\n{name} = {name}_plugin\n")

    def rounds(self) -> Rounds:
        """Return what was booked since the last call."""
        lines = self._log.read_text().split("\n") if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        rows = [[int(n) for n in line.split()] for line in lines if line]
        return Rounds(len(rows), sum(row[0] for row in rows), sum(row[1] for row in rows))

    def run(self, *args: str, mtp: Sequence[str] | None, **environment: str) -> str:
        """Return what ``python ARGS`` prints: stock, or under ``llama-mtp run`` with options."""
        before = [sys.executable] if mtp is None else [COMMAND, "run", *mtp]
        done = subprocess.run(
            [*before, *args],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def server(self, *args: str, mtp: Sequence[str] | None) -> Iterator[str]:
        """Run ``python -m llama_cpp.server`` on a free local port; yields its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        before = [sys.executable] if mtp is None else [COMMAND, "run", *mtp]
        log = self.folder / f"server-{port}.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*before, "-m", "llama_cpp.server", "--port", str(port), *args],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(f"http://127.0.0.1:{port}/v1/models", process, log)
            yield f"http://127.0.0.1:{port}/v1"
            assert process.poll() is None, log.read_text()
        finally:
            process.send_signal(signal.SIGINT)  # as Ctrl-C does: uvicorn closes what it has
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"the server did not answer:\n{log.read_text()}")
