"""Children answer in one marked line, whatever else is printed around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ModelFactory

from llama_mtp.measure import child, trial
from llama_mtp.measure.doctor import examine

ANSWERING = """
import atexit, os
from llama_mtp.measure import child
print("a library says hello, and no more", end="")
atexit.register(print, '{"tokens": 0}\\nand good-bye')
child.serve(lambda **question: {"asked": question})
os.write(1, b"not ours either\\n")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``module(code)``: the name of a module that a child can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> str:
        (tmp_path / "answering.py").write_text(code)
        return "answering"

    return write


def test_what_is_printed_around_an_answer_is_passed_over(module: Any) -> None:
    reply = child.ask(module(ANSWERING), {"n": 1, "name": "ä"})
    assert reply.answer == {"asked": {"n": 1, "name": "ä"}}
    assert reply.fate == ""


def test_a_child_that_says_nothing_is_no_answer(module: Any) -> None:
    reply = child.ask(module("print('{}')"), {})
    assert reply.answer is None
    assert reply.fate == "ended without an answer"


TALKING = """
import atexit
from llama_mtp.measure import child, trial
atexit.register(print, "a backend says good-bye")
child.serve(trial.answer)
"""


def test_doctor_hears_a_child_that_goes_on_talking(
    model: ModelFactory, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, talking = child.ask, module(TALKING)

    def talks(asked: str, *args: Any, **options: Any) -> child.Reply:
        return ask(talking if asked == trial.__name__ else asked, *args, **options)

    monkeypatch.setattr(child, "ask", talks)
    options: dict[str, Any] = {"n_ctx": 512, "spec_draft_n_max": 2, "n_threads": 1}
    found = examine(str(model("qwen35").path), max_tokens=8, n_threads_batch=1, **options)
    assert found.trial is not None and found.trial.tokens == 24
