"""Several generations and several threads on one object: each keeps its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY

from llama_mtp import BusyError, ClosedError
from llama_mtp.engine.lock import Entry
from llama_mtp.measure.identity import fresh_text

PROMPT_LENGTH = 20


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


class Slow:
    """A logits processor that waits in its first call until it is let go."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.inside.set()
        assert self.go.wait(20)
        return scores


# ---- a generation carries what is its own


def test_a_generation_that_is_taken_up_again_goes_on_drafting(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35", right=1.0)
    fast = ours(m)
    prompt = m.text(PROMPT_LENGTH)
    expected = fresh_text(stock(m), prompt, 60, **GREEDY)
    stream = fast.generate(prompt, **GREEDY)
    got = list(islice(stream, 10))
    fast.create_completion(m.text(9, 3), max_tokens=4)
    before = fast.spec_stats.num_accepted_tokens
    got += islice(stream, 50)
    assert got == expected
    assert fast.spec_stats.num_accepted_tokens - before > 30  # three of four, but for the edges


def test_last_is_the_generation_that_made_the_last_round(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3")
    fast = ours(m)
    streams = [fast.generate(m.text(PROMPT_LENGTH, k), **GREEDY) for k in range(2)]
    for _ in range(6):
        for n, stream in zip((8, 4), streams, strict=True):
            list(islice(stream, n))
    counted = []
    for stream in streams:
        next(stream)
        stream.close()
        counted.append(fast.spec_stats.last)
    assert counted[0] is not counted[1]
    emitted = [stats.num_emitted_tokens for stats in counted]
    assert emitted == [48, 24]  # the first token of each comes from the prompt's own row
    assert fast.spec_stats.num_emitted_tokens == sum(emitted)


# ---- one lock


def test_close_waits_for_a_logits_processor_of_another_thread(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3")
    fast, slow = ours(m), Slow()
    raised: list[BaseException] = []

    def generate() -> None:
        try:
            list(islice(fast.generate(m.text(9), logits_processor=[slow], **GREEDY), 3))
        except BaseException as e:
            raised.append(e)

    worker = in_thread(generate)
    assert slow.inside.wait(20)
    closer = in_thread(fast.close)
    closer.join(0.2)
    assert closer.is_alive()
    slow.go.set()
    closer.join(20)
    worker.join(20)
    assert not closer.is_alive() and not worker.is_alive()
    assert [type(e) for e in raised] == [ClosedError]


def test_close_from_inside_a_logits_processor_is_refused(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3")
    fast = ours(m)

    def close(ids: Any, scores: Any) -> Any:
        fast.close()

    with pytest.raises(BusyError, match="callback"):
        next(fast.generate(m.text(9), logits_processor=[close], **GREEDY))
    assert next(fast.generate(m.text(9), **GREEDY)) >= 0


def test_who_passed_the_look_at_closing_does_not_come_in_after_the_close() -> None:
    entry = Entry()
    lock, passed, closed = entry._lock, threading.Event(), threading.Event()

    class Late:
        """The lock, for a thread that is held up between the look and the lock."""

        def acquire(self, blocking: bool = True) -> bool:
            passed.set()
            assert closed.wait(20)
            return lock.acquire(blocking)

        release = staticmethod(lock.release)

    raised: list[BaseException] = []

    def enter() -> None:
        try:
            with entry:
                pass
        except BaseException as e:
            raised.append(e)

    entry._lock = Late()  # type: ignore[assignment]
    late = in_thread(enter)
    assert passed.wait(20)
    entry._lock = lock
    with entry.last():
        pass
    closed.set()
    late.join(20)
    assert [type(e) for e in raised] == [ClosedError]
    assert lock.acquire(blocking=False)  # and it left the lock alone


def test_the_thread_that_is_inside_may_finish_its_step_while_another_closes() -> None:
    entry = Entry()
    with entry:
        closer = in_thread(lambda: entry.last().__enter__())
        while not entry._closing:
            pass
        with entry:
            pass
    closer.join(20)
    assert not closer.is_alive()
    with pytest.raises(ClosedError), entry:
        pass


def test_the_host_is_freed_inside_the_lock(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = ours(model("hy_v3"))
    entry, free = fast._session.entry, fast._ctx.close
    tried: list[bool] = []

    def watched() -> None:
        other = in_thread(lambda: tried.append(entry._lock.acquire(blocking=False)))
        other.join(20)
        free()

    monkeypatch.setattr(fast._ctx, "close", watched)
    fast.close()
    assert tried and not any(tried)


def test_a_completion_reads_the_vocabulary_inside_the_lock(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = ours(model("hy_v3"))
    entry, real = fast._session.entry, fast.detokenize
    read: list[bool] = []

    def watched(tokens: Any, *args: Any, **kwargs: Any) -> bytes:
        read.append(entry.mine)
        return real(tokens, *args, **kwargs)

    monkeypatch.setattr(fast, "detokenize", watched)
    for _ in fast.create_completion(model("hy_v3").text(9), max_tokens=12, stream=True):
        pass
    assert len(read) > 2 and all(read)


def test_a_collected_generator_books_nothing_beside_a_step_of_another_thread(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("hy_v3")
    fast = ours(m)
    session, beside = fast._session, []
    inside, go = threading.Event(), threading.Event()
    book = session.book

    def watched() -> None:
        beside.append(not session.entry.mine)
        book()

    def step() -> None:
        with session.entry:
            inside.set()
            assert go.wait(20)

    monkeypatch.setattr(session, "book", watched)
    stream = fast.generate(m.text(9), **GREEDY)
    list(islice(stream, 5))
    worker = in_thread(step)
    assert inside.wait(20)
    del stream
    gc.collect()
    go.set()
    worker.join(20)
    assert beside and not any(beside)
    assert next(fast.generate(m.text(9), **GREEDY)) >= 0


@pytest.mark.parametrize("name", ["depth", "constant", "memory"])
def test_settings_and_memory_wait_for_the_step_of_another_thread(
    model: ModelFactory, ours: LlamaFactory, name: str
) -> None:
    m = model("hy_v3")
    fast, slow = ours(m), Slow()

    def constant() -> None:
        with fast.spec_constant_depth(1):
            pass

    work = {
        "depth": lambda: setattr(fast, "spec_depth", 1),
        "constant": constant,
        "memory": fast.spec_memory,
    }[name]
    stream = fast.generate(m.text(9), logits_processor=[slow], **GREEDY)
    worker = in_thread(lambda: list(islice(stream, 2)))
    assert slow.inside.wait(20)
    other = in_thread(work)
    other.join(0.2)
    assert other.is_alive()
    slow.go.set()
    other.join(20)
    worker.join(20)
    assert not other.is_alive() and not worker.is_alive()


def test_statistics_are_whole_while_another_thread_counts() -> None:
    from llama_mtp import SpecStats

    stats, stop = SpecStats(), threading.Event()

    def count() -> None:
        depth = 0
        while not stop.is_set():
            depth = depth % 40 + 1
            stats.observe_round(depth, depth + 1, depth, target_ns=1)
            if depth == 40:
                stats.reset()

    worker = in_thread(count)
    try:
        for _ in range(3000):
            told = stats.as_dict()
            drafted = told["num_drafted_per_pos"]
            assert isinstance(drafted, list)
            assert sum(drafted) == told["spec_decode_num_draft_tokens_total"]
            assert len(stats.acceptance_per_pos) <= 40
    finally:
        stop.set()
        worker.join(20)
