"""What the host computes lies on cache lines: half a line off costs a prompt 4 to 14 %."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import COMMON
from models.families import FAMILIES

from llama_mtp import Llama
from llama_mtp.host import C, internals

LINE = 64  # bytes
PROMPT = [5] * 64
# Some lie behind the rows that have logits, which are fewer here.
TOLERANCE = 0.03

Open = Callable[[], llama_cpp.Llama]


@pytest.fixture
def on_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[[Open], float]:
    """Measure the share of a prompt's tensors that start with a cache line, in the target."""
    address = C._lib.ggml_get_data
    address.argtypes, address.restype = [ctypes.c_void_p], ctypes.c_void_p
    seen: list[int] = []

    @C.ggml_backend_sched_eval_callback
    def look(tensor: Any, ask: bool, _: Any) -> bool:
        seen.append(address(tensor))
        return False  # nothing is to be copied out

    class Watched(internals.LlamaContext):
        def __init__(self, *, params: Any, **more: Any) -> None:
            if params.ctx_type != C.LLAMA_CONTEXT_TYPE_MTP:
                params.cb_eval = look
            super().__init__(params=params, **more)

    monkeypatch.setattr(internals, "LlamaContext", Watched)

    def measure(make: Open) -> float:
        with closing(make()) as llama:
            seen.clear()
            llama.eval(PROMPT)
            assert len(seen) > 20
            return sum(a % LINE == 0 for a in seen) / len(seen)

    return measure


@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("arch", FAMILIES)
def test_few_rows_with_logits_leave_the_tensors_of_a_prompt_where_stock_has_them_or_better(
    tmp_path: Path, on_lines: Callable[[Open], float], arch: str, depth: int
) -> None:
    files = FAMILIES[arch].build(tmp_path, 1, 1)
    more: dict[str, Any] = {"spec_draft_n_max": depth}
    if files.draft:
        more["spec_draft_model"] = str(files.draft)
    stock = on_lines(lambda: llama_cpp.Llama(str(files.path), **COMMON))
    ours = on_lines(lambda: Llama(str(files.path), spec_type="draft-mtp", **COMMON, **more))
    assert ours >= stock - TOLERANCE
    assert ours > 0.6
