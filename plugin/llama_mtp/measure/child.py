"""Ask a question whose answer may kill: libllama aborts the process where it should refuse.

The question goes to a module of ours that runs in a child: JSON in, one marked line of JSON out,
and the host's log on standard error. What else is printed there, before the answer or after it, is
passed over. Of a child that died, the last complaint in the log is the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LlamaMtpError

_MARK = "llama-mtp answers: "

# The first kind that occurs tells most: what failed is said before, and again after, that it did.
_COMPLAINTS = [
    re.compile(kind) for kind in (r"GGML_ASSERT|GGML_ABORT", r"\berror\b", r"\bfailed\b")
]


@dataclass(frozen=True)
class Reply:
    """What a child said.

    Attributes:
        answer: its JSON; None if it ended without one.
        log: what it and the host wrote to standard error.
        seconds: how long it lived.
        fate: how it ended, in words; empty if as it should.
    """

    answer: dict[str, Any] | None
    log: str
    seconds: float
    fate: str = ""

    @property
    def complaint(self) -> str:
        """The line of the log that says what went wrong; empty if none does."""
        lines = [line.strip() for line in self.log.splitlines()]
        for kind in _COMPLAINTS:
            if found := [line for line in lines if kind.search(line)]:
                # of a source's path, its name is enough
                return re.sub(r"^\S*/(?=[^/ ]+:\d+: )", "", found[-1])
        return ""

    @property
    def last_words(self) -> str:
        """The complaint, or the last line of the log."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        return self.complaint or (lines or ["nothing"])[-1]


def ask(module: str, question: Mapping[str, Any], *, timeout: float | None = None) -> Reply:
    """Run ``python -m module``, write `question` to it, and return what it says.

    Raises:
        LlamaMtpError: no child can be started.
    """
    # What is set for the user's own next run is not part of a question; a backtrace is no reason.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_SPEC_")}
    environment["GGML_NO_BACKTRACE"] = "1"
    here = ["-P"] if sys.version_info >= (3, 11) else []  # no modules from the current folder
    start = time.perf_counter()
    try:
        child = subprocess.run(
            [sys.executable, *here, "-m", module],
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        log = (late.stderr or b"").decode("utf-8", "replace")
        return Reply(None, log, time.perf_counter() - start, f"gave no answer in {timeout:g} s")
    except OSError as error:
        raise LlamaMtpError(
            f"No child process starts with {sys.executable!r}: {error}; run this where the Python "
            "interpreter is a program of its own."
        ) from error
    seconds = time.perf_counter() - start
    log = child.stderr.decode("utf-8", "replace")
    if child.returncode != 0:
        return Reply(None, log, seconds, f"died of {_cause_of_death(child.returncode)}")
    answers = re.findall(f"{_MARK}(.*)", child.stdout.decode("utf-8", "replace"))
    if not answers:
        return Reply(None, log, seconds, "ended without an answer")
    return Reply(json.loads(answers[-1]), log, seconds)


def serve(answer: Callable[..., Mapping[str, Any]]) -> None:
    """Be the child: read the question's fields as keyword arguments, print the answer."""
    print(_MARK + json.dumps(answer(**json.load(sys.stdin))))


def _cause_of_death(returncode: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-returncode).name
    return f"status {returncode}"
