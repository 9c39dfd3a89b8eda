"""The host's log belongs to the program."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import pytest
from conftest import LlamaFactory, ModelFactory

from llama_mtp import host


@pytest.fixture
def lines() -> Any:
    """A callback of the program's own, and the lines that it got."""
    got: list[bytes] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: Any) -> None:
        got.append(text)

    before = host._log_callback()
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    yield got
    llama_cpp.llama_log_set(*before)


def test_a_callback_of_the_program_is_called_while_an_object_is_made_and_after(
    model: ModelFactory, ours: LlamaFactory, lines: list[bytes]
) -> None:
    fast = ours(model("qwen35"))
    assert any(b"compute buffer size" in line for line in lines)
    assert any(part.startswith("draft") for part in fast.spec_memory())
    lines.clear()
    ours(model("hy_v3"), spec_type="none")
    assert lines


def test_a_callback_that_is_set_meanwhile_stays(lines: list[bytes]) -> None:
    got: list[bytes] = []

    @llama_cpp.llama_log_callback
    def other(level: int, text: bytes, data: Any) -> None:
        got.append(text)

    with host.BufferSizes():
        llama_cpp.llama_log_set(other, ctypes.c_void_p(0))
    assert host._address(host._log_callback()[0]) == host._address(other)
