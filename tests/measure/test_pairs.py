"""A pair: stock and MTP on weights that are loaded once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from rich.console import Console
from sampling import SAMPLED

from llama_mtp import host
from llama_mtp.errors import LlamaMtpError
from llama_mtp.heads.split import split
from llama_mtp.measure import trial
from llama_mtp.measure.bench_report import run_bench
from llama_mtp.measure.identity import text
from llama_mtp.measure.pairs import PROMPTS, generate, open_pair


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files whose weights the host was asked to load, one for each time."""
    files: list[str] = []
    load = host.C.llama_model_load_from_file

    def counted(path: bytes, params: Any) -> Any:
        files.append(Path(path.decode()).name)
        return load(path, params)

    monkeypatch.setattr(host.C, "llama_model_load_from_file", counted)
    yield files


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


# --- weights are loaded once ----------------------------------------------------------------------


def test_doctor_loads_the_weights_once(model: ModelFactory, loads: list[str]) -> None:
    m = model("qwen35")
    options = {key: value for key, value in COMMON.items() if key != "verbose"}
    found = trial.measure(str(m.path), max_tokens=4, spec_draft_n_max=2, **options)
    assert found.tokens == 3 * 4
    assert loads == [m.path.name]


def test_bench_loads_the_weights_once(model: ModelFactory, loads: list[str]) -> None:
    m = model("hy_v3")
    options: dict[str, Any] = {k: v for k, v in COMMON.items() if k != "verbose"}
    some = {"qa_factual": PROMPTS["qa_factual"]}
    length: dict[str, Any] = {"max_tokens": 4, "repeats": 1, "bound": 2}
    quiet = Console(quiet=True)
    run_bench(quiet, m.path, prompts=some, temps=(0.0,), depths=(1,), **length, **options)
    assert loads == [m.path.name]


def test_a_head_in_a_file_of_its_own_is_loaded_beside_them(
    model: ModelFactory, tmp_path: Path, loads: list[str]
) -> None:
    trunk, head = split(model("qwen35").path, tmp_path)
    options = {**COMMON, "spec_draft_model": str(head), "spec_adaptive": False}
    with open_pair(trunk, **options) as (plain, mtp, _):
        assert generate(plain, [5, 6, 7], 9).tokens == generate(mtp, [5, 6, 7], 9).tokens
        assert mtp.spec_stats.num_accepted_tokens > 0
    assert loads == [trunk.name, head.name]


# --- and the twin is stock ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_a_twin_says_what_a_stock_object_of_its_own_says(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """Though its model has the head's tensors too: every logit is the same."""
    m = model(arch, state_scale=1.0)
    with host.BufferSizes() as alone:
        fresh = stock(m, logits_all=True)
    fast = ours(m)
    with host.BufferSizes() as beside:
        twin = host.twin(fast, **COMMON, logits_all=True)
    assert type(twin) is host.StockLlama
    assert beside.by_device == alone.by_device
    prompt = m.text(20)
    text(fast, prompt, 60, **SAMPLED)  # which changes nothing for its twin
    assert text(twin, prompt, 60, **SAMPLED) == text(fresh, prompt, 60, **SAMPLED)
    assert np.array_equal(twin.scores[:79], fresh.scores[:79])
    twin.close()


def test_added_memory_is_what_two_objects_of_their_own_differ_by(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35")
    with host.BufferSizes() as alone:
        stock(m)
    apart = sum(ours(m).spec_memory().values()) - sum(alone.bytes.values())
    with open_pair(m.path, **COMMON, spec_adaptive=False) as (_, _, added):
        assert added == apart


@pytest.mark.parametrize("first", ["twin", "owner"])
def test_either_may_be_closed_first(model: ModelFactory, ours: LlamaFactory, first: str) -> None:
    m = model("qwen35")
    fast = ours(m)
    twin = host.twin(fast, **COMMON)
    if first == "twin":
        twin.close()
        assert fast._model.model is not None
        assert len(text(fast, m.text(9), 9)) == 9
    else:
        fast.close()
        assert twin._ctx.ctx is None, "a context must not outlive its model"
    twin.close()
    del twin
    gc.collect()


def test_a_twin_that_the_host_refuses_leaves_the_owner_as_it_was(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35")
    fast, loading = ours(m), host.internals.LlamaModel
    with pytest.raises(ValueError, match="context"):
        host.twin(fast, **{**COMMON, "type_v": 2})  # a quantised V cache without flash attention
    gc.collect()
    assert host.internals.LlamaModel is loading
    assert len(text(fast, m.text(9), 9)) == 9


def test_a_file_that_does_not_load_is_named(model: ModelFactory, tmp_path: Path) -> None:
    pair = open_pair(model("qwen35").path, **{**COMMON, "type_v": 2})
    with pytest.raises(LlamaMtpError, match=r"does not load .*\.gguf: .*llama-mtp inspect"), pair:
        pass
