"""Threads, interruptions and the end of objects: refused or right, never corrupted."""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import llama_cpp
import models
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from sampling import SAMPLED

from llama_mtp import BusyError, ClosedError, Llama
from llama_mtp import llama as llama_module
from llama_mtp.engine import session as session_module
from llama_mtp.measure.identity import fresh_text, text


def processor(function: Callable[[Any, Any], Any]) -> Any:
    return llama_cpp.LogitsProcessorList([function])


# ---- threads


def test_two_objects_on_two_threads(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    pairs = [(model(arch, state_scale=1.0), arch) for arch in ("qwen35", "mimo2")]
    objects = [ours(m) for m, _ in pairs]
    truths = [
        [fresh_text(stock(m), m.text(10, i), 60, i, **SAMPLED) for i in range(6)] for m, _ in pairs
    ]
    results: list[list[list[int]]] = [[], []]

    def work(which: int) -> None:
        for i in range(6):
            results[which].append(
                text(objects[which], pairs[which][0].text(10, i), 60, i, **SAMPLED)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == truths


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_second_thread_is_refused(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """Whatever it calls while the first is inside a step; the first gets its tokens."""
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    prompt = m.text(12)
    truth = fresh_text(plain, prompt, 40, **SAMPLED)
    state = fast.save_state()
    calls: list[Callable[[], object]] = [
        lambda: next(fast.generate(m.text(5))),
        lambda: fast.create_completion("hello", max_tokens=4),
        lambda: list(fast.create_completion("hello", max_tokens=4, stream=True)),
        lambda: fast.eval(m.text(3)),
        lambda: fast.sample(temp=0.0),
        fast.reset,
        fast.save_state,
        lambda: fast.load_state(state),
    ]
    caught: list[type[BaseException] | None] = []
    waiting = iter(calls)

    def other(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as e:
            caught.append(type(e))
        else:
            caught.append(None)

    def meanwhile(ids: Any, row: Any) -> Any:
        call = next(waiting, None)
        if call is not None:
            thread = threading.Thread(target=other, args=(call,))
            thread.start()
            thread.join()
        return row

    assert text(fast, prompt, 40, logits_processor=processor(meanwhile), **SAMPLED) == truth
    assert caught == [BusyError] * len(calls)
    assert text(fast, m.text(5, 3), 30, **SAMPLED) == fresh_text(plain, m.text(5, 3), 30, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_two_threads_on_one_object(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """At full speed: each step is refused or right."""
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    truths = [fresh_text(plain, m.text(10, i), 40, 1, **SAMPLED) for i in range(2)]
    fast.set_seed(1)
    wrong: list[Any] = []
    finished = [0, 0]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(which: int) -> None:
        for _ in range(12):
            got: list[int] = []
            try:
                got.extend(islice(fast.generate(m.text(10, which), **SAMPLED), 40))
                finished[which] += 1
            except BusyError:
                pass
            except BaseException as e:
                wrong.append(e)
            if got != truths[which][: len(got)]:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    for which in range(2):
        assert text(fast, m.text(10, which), 40, 1, **SAMPLED) == truths[which]


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_interleaved_generators(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """Each goes on with its own text. (Stock's go on with each other's.)"""
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    prompts = [m.text(10, 0), m.text(30, 1), [*m.text(10, 0), *m.text(4, 2)]]
    truths = [fresh_text(plain, p, 60, i + 1, **SAMPLED) for i, p in enumerate(prompts)]
    streams = []
    for i, prompt in enumerate(prompts):
        fast.set_seed(i + 1)
        streams.append(fast.generate(prompt, **SAMPLED))
        next(streams[i])
    got = [[t[0]] for t in truths]
    pick = random.Random(1)
    while any(len(g) < 60 for g in got):
        i = pick.randrange(3)
        got[i] += islice(streams[i], min(pick.randint(1, 7), 60 - len(got[i])))
    assert got == truths


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("drop", ["close", "del"])
def test_dropping_a_stream_does_not_disturb_another(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, drop: str
) -> None:
    m = model(arch, right=0.9)
    plain, fast = stock(m), ours(m)
    prompt = m.text(10, 1)
    truth = fresh_text(plain, prompt, 80, **SAMPLED)
    fast.set_seed(1)
    assert text(fast, prompt, 80, **SAMPLED) == truth
    undisturbed = (fast.spec_stats.last.num_rounds, fast.spec_stats.last.num_accepted_tokens)
    for at in range(1, 8):
        old = fast.generate(m.text(10, 0), **SAMPLED)
        list(islice(old, 3))
        fast.set_seed(1)
        stream = fast.generate(prompt, **SAMPLED)
        got = list(islice(stream, at))
        if drop == "close":
            old.close()
        else:
            del old
        got += islice(stream, 80 - at)
        assert got == truth
        stream.close()
        last = fast.spec_stats.last
        assert (last.num_rounds, last.num_accepted_tokens) == undisturbed


# ---- the end


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_close_while_streaming(model: ModelFactory, arch: str) -> None:
    m = model(arch)
    for taken in range(1, 6):
        fast = Llama(str(m.path), spec_type="mtp", spec_adaptive=False, **COMMON)
        stream = fast.generate(m.text(10), **SAMPLED)
        completion = fast.create_completion("hello", max_tokens=50, stream=True)
        list(islice(stream, taken))
        if taken % 2:
            next(completion)
        fast.close()
        with pytest.raises(ClosedError):
            next(stream)
        with pytest.raises(ClosedError):
            list(completion)
        for call in (fast.reset, fast.save_state, lambda: fast.eval([1]), fast.sample):  # noqa: B023
            with pytest.raises(ClosedError):
                call()
        fast.close()


def test_close_from_a_callback_is_refused(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35", state_scale=1.0)
    fast = ours(m)

    def closing(ids: Any, row: Any) -> Any:
        if len(ids) == 15:
            fast.close()
        return row

    stream = fast.generate(m.text(12), logits_processor=processor(closing), **SAMPLED)
    with pytest.raises(BusyError, match="callback"):
        list(islice(stream, 20))
    truth = fresh_text(stock(m), m.text(12), 20, **SAMPLED)
    assert text(fast, m.text(12), 20, **SAMPLED) == truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_close_from_another_thread(model: ModelFactory, arch: str) -> None:
    """It waits for the step that is being made; the stream then ends with ClosedError."""
    m = model(arch)
    for delay in range(5):
        fast = Llama(str(m.path), spec_type="mtp", spec_adaptive=False, **COMMON)
        started = threading.Event()
        ended: list[type[BaseException]] = []

        def stream(fast: Any = fast, started: Any = started, ended: Any = ended) -> None:
            try:
                for i, _ in enumerate(fast.generate(m.text(10), **SAMPLED)):
                    if i == 3:
                        started.set()
            except BaseException as e:
                ended.append(type(e))

        thread = threading.Thread(target=stream)
        thread.start()
        assert started.wait(30)
        for _ in range(delay * 1000):
            pass
        fast.close()
        thread.join()
        assert ended == [ClosedError]


# ---- interruption


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_interrupt_in_the_middle_of_a_round(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """A real SIGINT while native code samples: it comes out, and the object goes on."""
    m = model(arch, state_scale=1.0, right=0.9)
    plain, fast = stock(m), ours(m)
    prompt = m.text(12)
    truth = fresh_text(plain, prompt, 40, **SAMPLED)

    for at in range(13, 25):

        def interrupt(ids: Any, row: Any, at: int = at) -> Any:
            if len(ids) == at:
                signal.raise_signal(signal.SIGINT)
            return row

        fast.set_seed(1)
        stream = fast.generate(prompt, logits_processor=processor(interrupt), **SAMPLED)
        got = []
        with pytest.raises(KeyboardInterrupt):
            got.extend(islice(stream, at - 12))
            next(stream)
        assert text(fast, prompt, 40, **SAMPLED) == truth
        completion = fast.create_completion(prompt, max_tokens=10, seed=1)
        assert completion["usage"]["completion_tokens"] <= 10


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("then", ["same prompt", "go on", "by hand", "load"])
def test_interrupt_at_every_line(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, then: str
) -> None:
    """KeyboardInterrupt at each line of ours that a generation goes through."""
    m = model(arch, state_scale=0.4, right=0.9)
    plain, fast = stock(m), ours(m, n_ctx=256)
    files = {llama_module.__file__, session_module.__file__}
    prompt = m.text(9)
    truth = fresh_text(plain, prompt, 12, **SAMPLED)
    other = m.text(6, 5)
    expected = fresh_text(plain, other, 8, **SAMPLED)
    fast.set_seed(1)
    state = fast.save_state()
    line = step = 0
    gc.collect()
    while True:
        step += 1 + step // 40  # every line of the first rounds, then fewer
        line = 0

        def trace(frame: Any, event: str, arg: Any, step: int = step) -> Any:
            nonlocal line
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                line += 1
                if line == step:
                    raise KeyboardInterrupt
            return trace

        fast.reset()
        fast.set_seed(1)
        got: list[int] = []
        before = sys.gettrace()
        stream = fast.generate(prompt, **SAMPLED)
        sys.settrace(trace)
        try:
            for token in islice(stream, 12):
                got.append(token)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        stream.close()
        assert got == truth[: len(got)]
        if not interrupted and line < step:  # else a finalizer that happened to run swallowed it
            break
        if then == "go on":
            at = max(1, len(got))
            rest = text(fast, prompt + truth[:at], 8, **SAMPLED)
            assert rest == fresh_text(plain, prompt + truth[:at], 8, **SAMPLED)
        elif then == "by hand":
            fast.eval(other)
            evaluated = fast._input_ids.tolist()
            assert (
                evaluated[-6:] == other and evaluated[:-6] == (prompt + truth)[: len(evaluated) - 6]
            )
            plain.reset()
            plain._ctx.kv_cache_clear()
            plain.eval(evaluated)
            plain._sampler = fast._sampler = None
            assert fast.sample(temp=0.0) == plain.sample(temp=0.0)
        elif then == "load":
            fast.load_state(state)
            assert text(fast, other, 8, **SAMPLED) == expected
        else:
            assert text(fast, prompt, 12, **SAMPLED) == truth
    assert step > 100
