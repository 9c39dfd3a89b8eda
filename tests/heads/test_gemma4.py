"""Gemma 4 with its assistant, whose draft reads the target's own cells and has none itself.

What every family has to do is in `test_families`; here is what can go wrong with two contexts on
one cache: whatever empties the draft must leave the target's cells alone.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from conftest import COMMON, StockFactory, _factory
from models.families import gemma4
from models.families.common import Files
from models.reference import Reference
from sampling import GREEDY, SAMPLED

from llama_mtp import Llama, host
from llama_mtp.engine.generation import Generation
from llama_mtp.errors import ModelFileError, SpecTypeError
from llama_mtp.measure.identity import check_identity, fresh_text, text

Factory = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return gemma4.build(tmp_path_factory.mktemp("gemma4"), 1, 1)


@pytest.fixture
def ours(files: Files) -> Iterator[Factory]:
    """Return ``ours(files, **options)``: target and assistant, at constant depth 3 unless told."""
    yield from _factory(Llama, spec_draft_model=str(files.draft), spec_adaptive=False)


def words(n: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(models.FIRST_WORD, models.N_VOCAB, n)]


def test_without_its_assistant_it_is_stock(files: Files, stock: StockFactory) -> None:
    with Llama(str(files.path), **COMMON) as alone:
        assert alone.spec_type == "none"
        assert text(alone, words(9), 30, **SAMPLED) == text(stock(files), words(9), 30, **SAMPLED)
    with pytest.raises(SpecTypeError):
        Llama(str(files.path), spec_type="draft-mtp", **COMMON)


def test_an_assistant_alone_is_refused(files: Files) -> None:
    """The host would dereference the target that is not there."""
    with pytest.raises(SpecTypeError, match="spec_draft_model"):
        Llama(str(files.draft), spec_type="draft-mtp", **COMMON)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("HEAD_DIM", 64, "layer 1 of the head reads 1 keys of 64 numbers"),
        ("HEAD_DIM", 8, "layer 1 of the head reads 1 keys of 8 numbers"),
        ("HEAD_DIM_SLIDING", 24, "layer 0 of the head reads 1 keys of 24 numbers"),
        ("N_HEAD_KV", 2, "layer 0 of the head reads 2 keys of 16 numbers"),
    ],
)
def test_an_assistant_of_other_cells_is_refused(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: int,
    message: str,
) -> None:
    """Larger cells abort the process, smaller ones give drafts from the wrong numbers."""
    monkeypatch.setattr(gemma4, setting, value)
    other = gemma4.build(tmp_path, 1, 1)
    with pytest.raises(SpecTypeError, match=message):
        Llama(str(files.path), spec_draft_model=str(other.draft), **COMMON)


def test_a_model_in_which_nothing_slides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma4, "SLIDES", (False, False))
    with pytest.raises(ModelFileError, match="no layer that uses it"):
        Llama(str(gemma4.build(tmp_path, 1, 1).path), **COMMON)


def test_it_has_no_memory_of_its_own(files: Files, ours: Factory) -> None:
    fast = ours(files)
    assert fast.spec_type == "draft-mtp"
    assert not any(part.startswith("draft KV") for part in fast.spec_memory())
    text(fast, words(30), 20, **GREEDY)
    assert host.memory_end(fast._session.draft_context) == host.memory_end(fast._ctx) > 30


@pytest.mark.parametrize("whole", [True, False], ids=["whole-cache", "window-cache"])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "plain"])
def test_windows_that_have_moved_on(
    files: Files, stock: StockFactory, ours: Factory, whole: bool, flash: bool
) -> None:
    """Long after the first tokens left the window."""
    options = {"swa_full": whole, "flash_attn": flash, "n_batch": 32, "n_ubatch": 16}
    plain, fast = stock(files, **options), ours(files, **options)
    report = check_identity(plain, fast, words(70), 400, **GREEDY)
    assert report.illegal == []
    assert len(report.divergences) <= 2
    assert_acceptance(files, fast, words(70), 100)


def test_a_target_whose_last_layers_reuse_keys(
    tmp_path: Path, stock: StockFactory, ours: Factory
) -> None:
    files = gemma4.build(tmp_path, 1, 1, n_reusing=2)
    plain = stock(files)
    fast = ours(files, spec_draft_model=str(files.draft))
    assert text(fast, words(70), 200, **SAMPLED) == fresh_text(plain, words(70), 200, **SAMPLED)
    assert_acceptance(files, fast, words(70), 100)


def assert_acceptance(files: Files, fast: Any, prompt: list[int], n: int) -> None:
    """Follow from the text, and from what a naive drafter drafts, which drafts were accepted."""
    emitted = text(fast, prompt, n, **GREEDY)
    reference = Reference(files, 512)
    accepted, at = [0, 0, 0], 1
    while at + 1 < len(emitted):
        drafts = reference.drafts([*prompt, *emitted[:at]], 3)
        rest = emitted[at : at + 4]
        k = 0
        while k < min(3, len(rest)) and drafts[k] == rest[k]:
            accepted[k] += 1
            k += 1
        at += k + 1
    reference.close()
    assert fast.spec_stats.last.num_accepted_per_pos == accepted
    assert accepted[2] > 0


def test_what_empties_the_draft_leaves_the_target_alone(
    files: Files, stock: StockFactory, ours: Factory
) -> None:
    """A cleared draft context would wipe the cells of the target (llama-kv-cache.cpp clear)."""
    plain, fast = stock(files), ours(files)
    truth = fresh_text(plain, words(60), 80, **SAMPLED)

    def load_no_draft() -> None:
        fast._session.load_draft(None)

    def forget() -> None:
        fast._session.forget(fast._session.n_past)

    def begin_another_text() -> None:
        generation = Generation(None, None, sampling=None)
        fast._session.begin(generation, np.array(words(40, 3), dtype=np.intc))

    for empty in (load_no_draft, forget, begin_another_text):
        fast.set_seed(1)
        stream = fast.generate(words(60), **SAMPLED)
        emitted = list(islice(stream, 30))
        fast._session.settle()
        end = host.memory_end(fast._ctx)
        empty()
        assert host.memory_end(fast._ctx) == end == 60 + 29
        assert [*emitted, *islice(stream, 50)] == truth
        assert fast.spec_stats.last.num_drafts > 0


def test_up_to_the_last_cell(files: Files, stock: StockFactory, ours: Factory) -> None:
    """The draft's position needs a free cell of the target's cache."""
    options = {"n_ctx": 256, "swa_full": False}
    plain, fast = stock(files, **options), ours(files, **options)
    expected = fresh_text(plain, words(200), 57, **GREEDY)
    assert text(fast, words(200), 57, **GREEDY) == expected
    assert fast.n_tokens == 256
    assert fast._session.draft_context is not None
    assert text(fast, words(100, 2), 57, **SAMPLED) == fresh_text(
        plain, words(100, 2), 57, **SAMPLED
    )


def test_two_objects_do_not_meet(files: Files, stock: StockFactory, ours: Factory) -> None:
    plain, one, other = stock(files), ours(files), ours(files)
    truths = [fresh_text(plain, words(30, seed), 60, 7, **SAMPLED) for seed in (1, 2)]
    streams = []
    for llama, seed in ((one, 1), (other, 2)):
        llama.set_seed(7)
        streams.append(llama.generate(words(30, seed), **SAMPLED))
    pairs = list(islice(zip(*streams, strict=True), 60))
    assert [list(tokens) for tokens in zip(*pairs, strict=True)] == truths


def test_a_stock_state_is_taken_up(files: Files, stock: StockFactory, ours: Factory) -> None:
    """The target's memory is replaced under the draft, which reads the new one."""
    plain, fast = stock(files), ours(files)
    truth = fresh_text(plain, words(50), 60, **SAMPLED)
    plain.reset()
    plain.eval(words(50))
    state = plain.save_state()
    text(fast, words(90, 4), 20, **GREEDY)
    fast.load_state(state)
    assert text(fast, words(50), 60, **SAMPLED) == truth
    assert fast.spec_stats.last.num_accepted_tokens > 0


def test_completions_are_the_same(files: Files, stock: StockFactory, ours: Factory) -> None:
    plain, fast = stock(files), ours(files)
    for call in ({"seed": 3}, {"temperature": 0.0}, {"seed": 5, "stop": ["e"]}):
        plain.reset()
        plain._ctx.kv_cache_clear()
        expected = plain.create_completion("hello worldly", max_tokens=50, **call)
        got = fast.create_completion("hello worldly", max_tokens=50, **call)
        assert got["choices"] == expected["choices"]


@pytest.mark.parametrize("order", ["whole", "draft first", "session first", "garbage", "cycle"])
def test_any_order_of_closing_is_safe(files: Files, order: str) -> None:
    llm = Llama(str(files.path), spec_draft_model=str(files.draft), **COMMON)
    text(llm, words(20), 15, **GREEDY)
    session: Any = llm._session
    draft = session.draft_context
    if order == "draft first":
        draft.close()
        llm.close()
    elif order == "session first":
        session.close()
        llm.close()
    elif order == "garbage":
        del llm, session
        gc.collect()
        draft.close()
    elif order == "cycle":
        llm.itself = llm  # type: ignore[attr-defined]
        del llm, session, draft
        gc.collect()
    else:
        llm.close()
        llm.close()


def test_a_pickled_object_brings_its_assistant(files: Files, ours: Factory) -> None:
    fast = ours(files)
    with pickle.loads(pickle.dumps(fast)) as again:
        assert again.spec_type == "draft-mtp"
        assert text(again, words(20), 40, **SAMPLED) == text(fast, words(20), 40, **SAMPLED)
