"""Saved states: text and draft come back, and what does not fit changes nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import models
import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY, SAMPLED

from llama_mtp import StateError
from llama_mtp.engine.generation import Generation
from llama_mtp.engine.native import ffi, lib
from llama_mtp.host import address_of_sampler
from llama_mtp.measure.identity import fresh_text, text

ROWS = range(1, 10)  # tokens after the prompt: at depth 3, every row of more than one round
PROMPT = 20


def begin(fast: Any, m: models.Model, n: int, **sampling: Any) -> list[int]:
    """Generate ``n`` tokens, the last rows of a round unasked, and return the text so far."""
    prompt = m.text(PROMPT)
    return [*prompt, *text(fast, prompt, n, **(sampling or GREEDY))]


def snapshot(stats: Any) -> list[Any]:
    return [
        stats.num_rounds,
        stats.num_draft_tokens,
        stats.num_accepted_tokens,
        stats.num_accepted_per_pos,
        stats.num_tested_per_pos,
    ]


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("state_scale", [0.25, 1.2])
def test_a_state_of_every_row_goes_on_with_the_same_text(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, state_scale: float
) -> None:
    m = model(arch, state_scale=state_scale)
    plain, fast, other = stock(m), ours(m), ours(m)
    for n in ROWS:
        context = begin(fast, m, n)
        truth = fresh_text(plain, context, 25, **SAMPLED)
        state = fast.save_state()
        for target in (fast, other):
            for loaded in (state, pickle.loads(pickle.dumps(state))):
                text(target, m.text(15, seed=n), n, **GREEDY)  # something else in between
                target.load_state(loaded)
                assert text(target, context, 25, **SAMPLED) == truth
        plain.load_state(pickle.loads(pickle.dumps(state)))
        assert text(plain, context, 25, **SAMPLED) == truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_stream_that_was_saved_goes_on(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.2)
    plain, fast, other = stock(m), ours(m), ours(m)
    prompt = m.text(PROMPT)
    truth = fresh_text(plain, prompt, 30, **SAMPLED)
    for n in ROWS:
        fast.reset()
        fast.set_seed(1)
        stream = fast.generate(prompt, **SAMPLED)
        begun = list(islice(stream, n))
        other.load_state(fast.save_state())
        assert other.n_tokens == PROMPT + n - 1
        assert [*begun, *islice(stream, 30 - n)] == truth
        stream.close()


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("head", ["embedding", "hidden"])
def test_acceptance_goes_on_as_if_nothing_had_happened(
    model: ModelFactory, ours: LlamaFactory, arch: str, head: str
) -> None:
    """Exact from the first round on; for a head that reads the hidden row alone it stays 1."""
    m = model(arch, head=head)
    fast, other = ours(m), ours(m)
    for n in ROWS:
        context = begin(fast, m, n)
        undisturbed = text(fast, context, 60, **GREEDY)
        truth = snapshot(fast.spec_stats.last)

        assert begin(fast, m, n) == context
        state = pickle.loads(pickle.dumps(fast.save_state()))
        for target in (fast, other):
            text(target, m.text(15, seed=n), n, **GREEDY)
            restarts = target._session.counters()["n_draft_restarts"]
            target.load_state(state)
            emitted = text(target, context, 60, **GREEDY)
            assert emitted == undisturbed
            stats = target.spec_stats.last
            assert snapshot(stats) == truth
            expected = models.assert_acceptance(stats, m, context, emitted, 3)
            if head == "hidden":
                assert {accepted for _, _, accepted in expected.rounds[:-1]} == {3}
            assert target._session.counters()["n_draft_restarts"] == restarts


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_pending_hidden_row_comes_back(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    """The first round after loading drafts from it, with no evaluation in between."""
    m = model(arch, head="hidden")
    fast, other = ours(m), ours(m)
    for n in ROWS:
        context = begin(fast, m, n)
        other.load_state(fast.save_state())
        chain = other._init_sampler(temp=0.0)
        address = ffi.cast("void *", address_of_sampler(chain))
        session = other._session
        generation = Generation(chain, address, None, context[:-1], end=other.n_ctx())
        session.begin(generation, other._input_ids)
        for _ in range(4):
            context.append(other._next(session, generation, context[-1], None))
            assert context[-1] == m.follow[context[-2]]
        assert (session._step.n_sampled, session._step.n_accepted) == (4, 3)  # all of one round


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_draft_comes_back_with_its_memory(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    """Not one token of the saved text is read by the draft context again."""
    m = model(arch)
    fast, other = ours(m), ours(m)
    context = begin(fast, m, 7)
    state = fast.save_state()
    other.load_state(state)
    assert vars(other.save_state())["spec_state"] == state.spec_state
    assert other.save_state().llama_state == state.llama_state
    assert lib.mtp_n_past_draft(other._session._handle) == len(context) - 1
    draft = other._session.draft_context
    ends = [
        int(llama_cpp.llama_memory_seq_pos_max(llama._session.draft_context.memory, 0))
        for llama in (fast, other)
    ]
    assert ends[0] == ends[1] > PROMPT - 1
    assert int(llama_cpp.llama_memory_seq_pos_min(draft.memory, 0)) == 0


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("head", ["embedding", "hidden"])
def test_a_stock_state_loads_and_drafts(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, head: str
) -> None:
    m = model(arch, head=head)
    plain, fast = stock(m), ours(m)
    for n in (1, 2, 6):
        context = [*m.text(PROMPT), *fresh_text(plain, m.text(PROMPT), n, **GREEDY)]
        state = plain.save_state()
        truth = fresh_text(plain, context, 60, **GREEDY)
        begin(fast, m, 5)
        fast.load_state(state)
        emitted = text(fast, context, 60, **GREEDY)
        assert emitted == truth
        models.assert_acceptance(fast.spec_stats.last, m, context, emitted, 3)


def test_a_state_needs_nothing_of_this_package(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, tmp_path: Path
) -> None:
    m = model("qwen35", state_scale=1.2)
    fast, plain = ours(m), stock(m)
    context = begin(fast, m, 6)
    truth = fresh_text(plain, context, 20, **SAMPLED)
    state = fast.save_state()
    assert type(state) is llama_cpp.LlamaState
    extra = state.__dict__.keys() - plain.save_state().__dict__.keys()
    assert extra == {"spec_state"} and type(state.spec_state) is bytes
    data = pickle.dumps(state)
    assert b"llama_mtp" not in data
    file = tmp_path / "state"
    file.write_bytes(data)
    script = (
        "import pickle, sys\n"
        "sys.modules['llama_mtp'] = None\n"
        "from itertools import islice\n"
        "import llama_cpp\n"
        f"state = pickle.load(open({str(file)!r}, 'rb'))\n"
        f"llama = llama_cpp.Llama({str(m.path)!r}, **{COMMON!r})\n"
        "llama.load_state(state)\n"
        "llama.set_seed(1)\n"
        f"print(list(islice(llama.generate({context!r}, **{SAMPLED!r}), 20)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == str(truth)


def test_without_logits_all_no_scores_are_copied(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("hy_v3")
    fast = ours(m)
    begin(fast, m, 5)
    assert fast.save_state().scores.nbytes == 4


def test_with_logits_all_the_scores_come_back(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3")
    fast, other = ours(m, logits_all=True), ours(m, logits_all=True)
    context = begin(fast, m, 5)
    state = fast.save_state()
    assert state.scores.shape == (len(context) - 1, models.N_VOCAB)
    begin(other, m, 30)
    other.load_state(state)
    assert np.array_equal(other._scores, fast._scores)
    assert not (other.scores[other.n_tokens :] > 0).any()
    plain = stock(m, logits_all=True)
    plain.load_state(state)
    assert np.array_equal(plain._scores, fast._scores)
    state.scores = state.scores[:3]
    with pytest.raises(StateError, match="logits"):
        other.load_state(state)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_a_state_without_text(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m)
    state = fast.save_state()
    begin(fast, m, 5)
    fast.load_state(state)
    assert fast.n_tokens == 0
    prompt = m.text(9)
    assert text(fast, prompt, 30, **SAMPLED) == fresh_text(plain, prompt, 30, **SAMPLED)
    plain.load_state(state)
    assert text(plain, prompt, 30, **SAMPLED) == text(fast, prompt, 30, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_other_draft_settings_start_the_draft_empty(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """The target's state fits; a draft cache of another type, or too few rows a batch, do not."""
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m, n_batch=128)
    fast.spec_depth = 0  # the prompt waits for a draft context that is not asked
    context = begin(fast, m, 5)
    state = fast.save_state()
    truth = fresh_text(plain, context, 30, **SAMPLED)
    for options in ({"spec_draft_type_k": "f16", "spec_draft_type_v": "f16"}, {"n_batch": 16}):
        other = ours(m, **options)
        other.load_state(state)
        assert text(other, context, 30, **SAMPLED) == truth
        assert other.spec_stats.last.num_draft_tokens > 0


# ---- refusals


def damaged(state: Any, attribute: str, data: bytes) -> Any:
    bad = copy.copy(state)
    setattr(bad, attribute, data)
    return bad


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    model: ModelFactory, ours: LlamaFactory, stock: StockFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.2)
    fast, plain = ours(m), stock(m)
    different = {
        "another model file": ours(model(arch, state_scale=1.2, seed=2)),
        "another model:": ours(model("hy_v3" if arch == "qwen35" else "qwen35")),
        "n_ctx": ours(m, n_ctx=256),
        "type_k": ours(m, type_k=1),
        "rope_freq_base": ours(m, rope_freq_base=5000.0),
    }
    states = {}
    for reason, other in different.items():
        begin(other, m, 4)
        states[reason] = [other.save_state()]
    begin(fast, m, 4)
    good = fast.save_state()
    wrong_ids = copy.copy(good)
    wrong_ids.input_ids = good.input_ids.copy()
    wrong_ids.input_ids[3] += 1
    states["checksum"] = [
        wrong_ids,
        *(damaged(good, "llama_state", flipped(good.llama_state, k)) for k in (50, 4000, -1)),
        *(damaged(good, "spec_state", flipped(good.spec_state, k)) for k in (40, 900, -1)),
    ]
    states["damaged"] = [
        damaged(good, "llama_state", good.llama_state[:-1]),
        *(damaged(good, "spec_state", good.spec_state[:k]) for k in (0, 7, 35, 36, 200, -1)),
        damaged(good, "spec_state", "text"),
    ]
    states["not a LlamaState"] = [object()]
    states["format"] = [damaged(good, "spec_state", flipped(good.spec_state, 8))]

    context = begin(fast, m, 6)
    truth = fresh_text(plain, context, 30, **SAMPLED)
    untouched = text(fast, context, 30, **SAMPLED)
    accepted = snapshot(fast.spec_stats.last)
    begin(fast, m, 6)
    session = fast._session
    before = (fast.n_tokens, session.n_past, session.live_row, fast.input_ids.tolist())
    for reason, some in states.items():
        for state in some:
            with pytest.raises(StateError, match=reason):
                fast.load_state(state)
    assert before == (fast.n_tokens, session.n_past, session.live_row, fast.input_ids.tolist())
    assert text(fast, context, 30, **SAMPLED) == untouched == truth
    assert snapshot(fast.spec_stats.last) == accepted


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_a_stock_state_that_the_host_refuses_changes_nothing(
    model: ModelFactory, ours: LlamaFactory, stock: StockFactory, arch: str
) -> None:
    """Nothing seals it, so that the host is the first to notice, after it cleared its memory."""
    m = model(arch, state_scale=1.2)
    fast, plain = ours(m), stock(m)
    fresh_text(plain, m.text(PROMPT), 4, **GREEDY)
    good = plain.save_state()
    context = begin(fast, m, 6)
    truth = fresh_text(plain, context, 30, **SAMPLED)
    size = len(good.llama_state)
    for cut in (12, 15, 40, 200, size // 2, size - 4, size - 1):
        begin(fast, m, 6)
        bad = damaged(good, "llama_state", good.llama_state[:cut])
        bad.llama_state_size = cut
        with pytest.raises(StateError):
            fast.load_state(bad)
        assert fast._session.n_past == fast.n_tokens == len(context) - 1
        assert text(fast, context, 30, **SAMPLED) == truth
    foreign = stock(m, type_k=1, type_v=1)
    fresh_text(foreign, m.text(PROMPT), 4, **GREEDY)
    begin(fast, m, 6)
    with pytest.raises(StateError, match="layout"):
        fast.load_state(foreign.save_state())
    assert text(fast, context, 30, **SAMPLED) == truth
    longer = copy.copy(good)
    longer.n_tokens += 9
    begin(fast, m, 6)
    with pytest.raises(StateError):
        fast.load_state(longer)
    assert text(fast, context, 30, **SAMPLED) == truth


# ---- caches


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_caches_carry_the_draft(
    model: ModelFactory,
    ours: LlamaFactory,
    stock: StockFactory,
    arch: str,
    kind: str,
    tmp_path: Path,
) -> None:
    m = model(arch, head="hidden")
    plain, fast = stock(m), ours(m)
    cache: Any = (
        llama_cpp.LlamaRAMCache()
        if kind == "ram"
        else llama_cpp.LlamaDiskCache(cache_dir=str(tmp_path / "cache"))
    )
    fast.set_cache(cache)
    assert fast.cache is cache
    prompts = [m.text(PROMPT, seed) for seed in (1, 2)]
    options: dict[str, Any] = {"max_tokens": 21, "temperature": 0.0}
    for _ in range(2):  # each prompt again, with the other in between
        for prompt in prompts:
            plain.reset()
            plain._ctx.kv_cache_clear()
            truth = plain.create_completion(prompt, **options)["choices"]
            assert fast.create_completion(prompt, **options)["choices"] == truth

    # A longer turn: the state of the turn before, its draft included, and full acceptance at once.
    turn = [*prompts[0], *fresh_text(plain, prompts[0], 21, **GREEDY)]
    assert tuple(turn) in cache or turn in cache
    text(fast, m.text(9, 3), 3, **GREEDY)
    answer = fast.create_completion([*turn, turn[-1]], **options)["choices"]
    plain.reset()
    plain._ctx.kv_cache_clear()
    assert answer == plain.create_completion([*turn, turn[-1]], **options)["choices"]
    stats = fast.spec_stats.last
    assert stats.num_accepted_per_pos[0] == stats.num_tested_per_pos[0] > 0


def test_the_ram_cache_counts_and_bounds_the_draft(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("hy_v3")
    fast = ours(m)
    cache = llama_cpp.LlamaRAMCache()
    fast.set_cache(cache)
    assert isinstance(cache, llama_cpp.LlamaRAMCache)
    keys = []
    for seed in range(4):
        prompt = m.text(PROMPT, seed)
        text(fast, prompt, 5, **GREEDY)
        keys.append(prompt)
        cache[prompt] = fast.save_state()
    states = list(cache.cache_state.values())
    assert len(states[0].spec_state) > len(states[0].llama_state) // 4
    assert cache.cache_size == sum(s.llama_state_size + len(s.spec_state) for s in states)
    again = pickle.loads(pickle.dumps(cache))
    assert type(again) is llama_cpp.LlamaRAMCache and len(again.cache_state) == 4
    cache.capacity_bytes = cache.cache_size - 1
    cache[keys[-1]] = states[-1]
    assert len(cache.cache_state) == 3 and keys[0] not in cache
    # The class itself, and every other object of it, stay as they are.
    assert type(llama_cpp.LlamaRAMCache()) is llama_cpp.LlamaRAMCache


def test_the_disk_cache_counts_the_draft(
    model: ModelFactory, ours: LlamaFactory, tmp_path: Path
) -> None:
    m = model("hy_v3")
    fast = ours(m)
    cache = llama_cpp.LlamaDiskCache(cache_dir=str(tmp_path))
    fast.set_cache(cache)
    begin(fast, m, 5)
    state = fast.save_state()
    before = cache.cache_size
    cache[m.text(5)] = state
    assert cache.cache_size - before >= state.llama_state_size + len(state.spec_state)
    cache.capacity_bytes = before + state.llama_state_size  # not with the draft
    cache[m.text(6, 2)] = state
    assert len(cache.cache) == 0


def test_a_cache_shared_by_two_models_misses(model: ModelFactory, ours: LlamaFactory) -> None:
    """A state of the other model is found under the same tokens, and passed over."""
    cache = llama_cpp.LlamaRAMCache()
    prompt = model("qwen35").text(20)
    first, second = ours(model("qwen35")), ours(model("hy_v3"))
    alone = ours(model("hy_v3")).create_completion(prompt, max_tokens=12, temperature=0.0)
    for llm in (first, second):
        llm.set_cache(cache)
        answer = llm.create_completion(prompt, max_tokens=12, temperature=0.0)
    assert answer["choices"] == alone["choices"]
