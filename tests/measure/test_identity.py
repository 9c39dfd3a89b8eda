"""Same seed, same tokens, on every kind of memory and with every kind of sampler."""

from __future__ import annotations

from itertools import islice
from typing import Any

import models
import numpy as np
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY, SAMPLED

from llama_mtp.measure.identity import check_identity, clear, fresh_text, text

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "temperature": {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "top-k-p-min-p": SAMPLED,
    "typical": {"temp": 1.1, "typical_p": 0.8},
    "penalties": {"temp": 0.8, "repeat_penalty": 1.3, "frequency_penalty": 0.2},
    "greedy-penalties": {"temp": 0.0, "repeat_penalty": 1.5, "presence_penalty": 0.3},
    "mirostat": {"mirostat_mode": 1, "temp": 0.9},
    "mirostat-v2": {"mirostat_mode": 2, "temp": 0.9},
}


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("settings", ["greedy", "top-k-p-min-p"])
def test_two_thousand_tokens(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, settings: str
) -> None:
    m = model(arch, state_scale=1.0)
    # The host's default cache, in half precision: what users have.
    options = {"n_ctx": 2304, "type_k": None, "type_v": None}
    report = check_identity(
        stock(m, **options), ours(m, **options), m.text(40), 2100, max_batch=4, **SETTINGS[settings]
    )
    assert report.n_tokens == 2100
    assert report.illegal == []
    assert len(report.divergences) < 10


def test_the_check_finds_what_is_not_the_same(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    """Weights a hair off: more than the host's own noise, and the sampler knows."""
    plain = stock(model("hy_v3", state_scale=1.0))
    fast = ours(model("hy_v3", state_scale=1.0001))
    report = check_identity(plain, fast, [models.BOS] * 3, 400, **SETTINGS["temperature"])
    assert report.n_tokens == 400
    assert report.illegal
    assert all(d.difference > d.tolerance for d in report.illegal)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("state_scale", [0.25, 1.0])
def test_samplers(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    settings: str,
    state_scale: float,
) -> None:
    m = model(arch, state_scale=state_scale)
    report = check_identity(stock(m), ours(m), m.text(12), 250, seed=2, **SETTINGS[settings])
    assert report.illegal == []
    assert len(report.divergences) < 2  # in single precision few processors round rows apart


def test_none_is_stock_bit_for_bit(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    for arch in models.ARCHITECTURES:
        m = model(arch, state_scale=1.0)
        plain, none = stock(m, logits_all=True), ours(m, logits_all=True, spec_type="none")
        assert none.spec_type == "none"
        prompt = m.text(20)
        assert text(none, prompt, 60, **SAMPLED) == text(plain, prompt, 60, **SAMPLED)
        assert np.array_equal(none.scores[:79], plain.scores[:79])
        assert none.spec_stats.num_rounds == 0


def test_auto_turns_on_where_there_is_a_head(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    for arch in models.ARCHITECTURES:
        with_head = ours(model(arch), spec_type="auto")
        assert with_head.spec_type == "draft-mtp"
        m = model(arch, head=None)
        without = ours(m, spec_type="auto")
        assert without.spec_type == "none"
        prompt = m.text(10)
        assert text(without, prompt, 40, **SAMPLED) == text(stock(m), prompt, 40, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_adaptive_depth_keeps_the_text(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m, spec_adaptive=True, spec_draft_n_max=4)
    for seed in range(3):
        report = check_identity(plain, fast, m.text(10, seed), 300, seed + 1, **SAMPLED)
        assert report.divergences == []


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_depth_changed_while_generating(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m, spec_draft_n_max=4)
    prompt = m.text(10)
    truth = fresh_text(plain, prompt, 200, 5, **SAMPLED)
    fast.set_seed(5)
    emitted: list[int] = []
    stream = fast.generate(prompt, **SAMPLED)
    for depth in (4, 0, 1, 3, 0, 0, 2, 4):
        fast.spec_depth = depth
        emitted += islice(stream, 25)
    assert emitted == truth


@pytest.mark.parametrize("p_min", [0.3, 0.9])
def test_p_min_keeps_the_text(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, p_min: float
) -> None:
    m = model("qwen35", state_scale=1.0)
    report = check_identity(stock(m), ours(m, spec_draft_p_min=p_min), m.text(10), 200, **SAMPLED)
    assert report.divergences == []


def test_completions_are_the_same(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    """Through the completion surface: text, stream, stop words, chat, grammar, logit bias."""
    m = model("qwen35", state_scale=1.0)
    plain, fast = stock(m), ours(m)
    grammar = llama_grammar('root ::= ([a-m] | " ")+')
    bias = {models.FIRST_WORD + 5: 3.0, models.FIRST_WORD + 9: -50.0}
    calls: list[dict[str, Any]] = [
        {"max_tokens": 60, "seed": 3},
        {"max_tokens": 60, "temperature": 0.0},
        {"max_tokens": 60, "seed": 3, "stop": ["e", "zz"]},
        {"max_tokens": 40, "seed": 4, "logit_bias": bias},
        {"max_tokens": 40, "seed": 4, "grammar": grammar},
        {"max_tokens": 60, "seed": 5, "echo": True, "suffix": None},
    ]
    for call in calls:
        clear(plain)
        expected = plain.create_completion("hello worldly", **call)
        got = fast.create_completion("hello worldly", **call)
        assert got["choices"] == expected["choices"], call
        assert got["usage"] == expected["usage"]
        clear(plain)
        pieces = [c["choices"] for c in plain.create_completion("hello", stream=True, **call)]
        assert [
            c["choices"] for c in fast.create_completion("hello", stream=True, **call)
        ] == pieces
    clear(plain)
    chat = [{"role": "user", "content": "are you in"}]
    expected = plain.create_chat_completion(chat, max_tokens=50, seed=7)
    got = fast.create_chat_completion(chat, max_tokens=50, seed=7)
    assert got["choices"] == expected["choices"]


def llama_grammar(text: str) -> Any:
    from llama_cpp import LlamaGrammar

    return LlamaGrammar.from_string(text, verbose=False)
