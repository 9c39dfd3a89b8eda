"""The consumer leaves, sends or raises at any row: nobody can tell that there was a round."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice
from typing import Any

import models
import numpy as np
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import SAMPLED

from llama_mtp.measure.identity import clear, fresh_text, text

ROWS = range(1, 10)  # two rounds and more at depth 3


class Oops(Exception):
    pass


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("state_scale", [0.25, 1.0])
@pytest.mark.parametrize("leave", ["close", "raise", "drop"])
def test_leaving_at_every_row(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    state_scale: float,
    leave: str,
) -> None:
    m = model(arch, state_scale=state_scale)
    plain, fast = stock(m), ours(m)
    prompt, other = m.text(20), m.text(15, 2)
    truth = fresh_text(plain, prompt, 20, **SAMPLED)
    other_truth = fresh_text(plain, other, 20, **SAMPLED)
    for n in ROWS:
        fast.set_seed(1)
        stream = fast.generate(prompt, **SAMPLED)
        assert list(islice(stream, n)) == truth[:n]
        if leave == "close":
            stream.close()
        elif leave == "raise":
            with pytest.raises(Oops):
                stream.throw(Oops())
        del stream
        assert text(fast, prompt, 20, **SAMPLED) == truth
        fast.set_seed(1)
        list(islice(fast.generate(prompt, **SAMPLED), n))
        assert text(fast, other, 20, **SAMPLED) == other_truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("state_scale", [0.25, 1.0])
@pytest.mark.parametrize("right", [True, False])
def test_sending_at_every_row(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    state_scale: float,
    right: bool,
) -> None:
    """What is sent are drafts: stock evaluates them, samples every row and drops them from the
    first that differs. (Without ``logits_all`` it asks for a row that is not there and aborts.)"""
    m = model(arch, state_scale=state_scale)
    plain, fast = stock(m), ours(m)
    prompt = m.text(20)
    truth = fresh_text(plain, prompt, 24, **SAMPLED)
    for n in ROWS:
        sent = truth[n : n + 3] if right else m.text(3, n)
        assert with_send(fast, prompt, n, sent) == truth
        assert text(fast, prompt, 24, **SAMPLED) == truth


def test_sending_is_as_stock_has_it(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3", state_scale=1.0)
    plain, fast = stock(m, logits_all=True), ours(m, logits_all=True)
    prompt, sent = m.text(20), m.text(3, 3)
    for n in ROWS:
        clear(plain)
        assert with_send(fast, prompt, n, sent) == with_send(plain, prompt, n, sent)


def with_send(llama: Any, prompt: Sequence[int], n: int, sent: Sequence[int]) -> list[int]:
    llama.set_seed(1)
    stream = llama.generate(prompt, **SAMPLED)
    emitted = list(islice(stream, n))
    emitted.append(stream.send(sent))
    emitted += islice(stream, 24 - len(emitted))
    stream.close()
    return emitted


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n", ROWS)
def test_processor_that_raises(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, n: int
) -> None:
    from llama_cpp import LogitsProcessorList

    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    prompt = m.text(20)
    calls = 0

    def fails(ids: Any, scores: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            raise Oops("from the processor")
        return scores

    truth = fresh_text(plain, prompt, 20, **SAMPLED)
    fast.set_seed(1)
    stream = fast.generate(prompt, logits_processor=LogitsProcessorList([fails]), **SAMPLED)
    emitted = []
    with pytest.raises(Oops, match="from the processor"):
        for token in stream:
            emitted.append(token)
    assert emitted == truth[: n - 1]
    assert text(fast, prompt, 20, **SAMPLED) == truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_processors_see_the_tokens_before_the_row(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    from llama_cpp import LogitsProcessorList

    m = model(arch)
    prompt = m.text(20)
    seen: list[list[tuple[list[int], float]]] = []
    texts = []
    for llama in (stock(m), ours(m)):
        calls: list[tuple[list[int], float]] = []

        def look(ids: Any, scores: Any, calls: Any = calls) -> Any:
            calls.append((ids.tolist(), float(scores[ids[-1]])))
            changed = np.array(scores)
            changed[[int(t) for t in ids[-3:]]] -= 2.0  # depends on the text
            return changed

        llama.set_seed(1)
        stream = llama.generate(prompt, logits_processor=LogitsProcessorList([look]), **SAMPLED)
        texts.append(list(islice(stream, 40)))
        seen.append(calls)
    assert texts[0] == texts[1]
    assert [ids for ids, _ in seen[0]] == [ids for ids, _ in seen[1]]
    assert [ids for ids, _ in seen[1]] == [prompt + texts[1][:i] for i in range(40)]
    assert np.allclose([s for _, s in seen[0]], [s for _, s in seen[1]], atol=1e-3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n", ROWS)
def test_stopping_criteria(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, n: int
) -> None:
    from llama_cpp import StoppingCriteriaList

    m = model(arch, state_scale=1.0)
    prompt = m.text(20)
    plain, fast = stock(m), ours(m)
    outcomes = []
    for llama in (plain, fast):
        calls: list[int] = []

        def stop(ids: Any, logits: Any, calls: Any = calls) -> bool:
            calls.append(len(ids))
            return len(calls) == n

        llama.set_seed(1)
        criteria = StoppingCriteriaList([stop])
        emitted = list(llama.generate(prompt, stopping_criteria=criteria, **SAMPLED))
        outcomes.append((emitted, calls))
    assert outcomes[0] == outcomes[1]
    truth = fresh_text(plain, prompt, 20, **SAMPLED)
    assert text(fast, prompt, 20, **SAMPLED) == truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_two_objects_in_turn(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.0)
    plain, one, two = stock(m), ours(m), ours(m, spec_draft_n_max=2)
    prompts = m.text(20), m.text(25, 2)
    truths = [fresh_text(plain, p, 60, **SAMPLED) for p in prompts]
    one.set_seed(1)
    two.set_seed(1)
    streams = one.generate(prompts[0], **SAMPLED), two.generate(prompts[1], **SAMPLED)
    emitted: tuple[list[int], list[int]] = ([], [])
    for i in range(60):
        for k in (0, 1) if i % 3 else (1, 0):
            emitted[k].append(next(streams[k]))
    assert list(emitted) == truths


def test_two_threads_each_with_its_own(model: ModelFactory, ours: LlamaFactory) -> None:
    """The same texts as one alone. From stock's, one may part by a rounding of some machines."""
    m = model("qwen35", state_scale=1.0)
    alone, *llamas = ours(m), ours(m), ours(m)
    prompts = [m.text(20, seed) for seed in range(4)]
    truths = [text(alone, p, 100, **SAMPLED) for p in prompts]
    results: list[list[list[int]]] = [[], []]

    def work(k: int) -> None:
        results[k] = [text(llamas[k], p, 100, **SAMPLED) for p in prompts]

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [truths, truths]
