"""Many turns of a chat: what is reused is what a fresh object would have, and drafting goes on.

On a hybrid model the recurrent state cannot be cut, so checkpoints stand in for it. The models here
have a state that the text depends on: a wrong one shows in the next words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY, SAMPLED

from llama_mtp import host
from llama_mtp.engine.native import lib
from llama_mtp.host import logits_row
from llama_mtp.measure.identity import fresh_text, text

TAIL: int = lib.MTP_CHECKPOINT_TAIL
MIN_STEP = 32  # native/src/checkpoints.hpp: least distance of two checkpoints


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Return ``decoded(llama)``: the sizes of the batches that it evaluates from now on."""

    def watch(llama: Any) -> list[int]:
        sizes: list[int] = []
        decode = llama._ctx.decode

        def count(batch: Any) -> None:
            sizes.append(int(batch.batch.n_tokens))
            decode(batch)

        monkeypatch.setattr(llama._ctx, "decode", count)
        return sizes

    return watch


def held(llama: Any) -> int:
    """How many checkpoints there are."""
    return int(llama._session.counters()["n_checkpoints"])


def restored(llama: Any) -> int:
    """How often the memory went back to one."""
    return int(llama._session.counters()["n_checkpoints_restored"])


@pytest.fixture
def set_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Return ``set_data(f)``: objects made from now on load a state by ``f(real, bytes)``."""
    real_address, kept = host.address_of, []

    def replace(function: Callable[..., int]) -> None:
        kind = ctypes.CFUNCTYPE(
            ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32,
            ctypes.c_uint32,
        )  # fmt: skip
        real = kind(real_address("llama_state_seq_set_data_ext"))

        def load(ctx: int, data: int, n: int, seq: int, flags: int) -> int:
            def put(other: bytes) -> int:
                return int(real(ctx, ctypes.cast(other, ctypes.c_void_p), len(other), seq, flags))

            return function(put, ctypes.string_at(data, n))

        kept.append(mine := kind(load))  # the engine keeps the address only
        address = int(ctypes.cast(mine, ctypes.c_void_p).value or 0)

        def address_of(name: str) -> int:
            return address if name == "llama_state_seq_set_data_ext" else real_address(name)

        monkeypatch.setattr(host, "address_of", address_of)

    return replace


def conversation(llama: Any, m: models.Model, turns: int, n: int = 16) -> list[int]:
    """Chat by appending, and return the last turn's prompt."""
    prompt = m.text(60)
    for turn in range(turns - 1):
        prompt = [*prompt, *text(llama, prompt, n, **GREEDY), *m.text(40, 50 + turn)]
    text(llama, prompt, n, **GREEDY)
    return prompt


# ---- any memory


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("swa_full", [True, False])
def test_every_way_to_come_back(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, swa_full: bool
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m, swa_full=swa_full), ours(m, swa_full=swa_full)
    prompt = m.text(80)  # longer than the sliding window
    begun = fresh_text(plain, prompt, 12, **SAMPLED)
    for again in (
        prompt,  # nothing there yet
        prompt,  # an exact hit
        [*prompt, *begun],  # a longer prompt
        [*prompt, *begun, *m.text(40, 1)],
        prompt[:50],  # a shorter one
        [*prompt[:50], *m.text(40, 2)],  # a branch
        [*prompt[:1], *m.text(3, 3)],
        m.text(70, 4),  # nothing in common
        prompt[:1],
    ):
        expected = fresh_text(plain, again, 12, **SAMPLED)
        assert text(fast, again, 12, **SAMPLED) == expected
        assert text(fast, again, 12, **SAMPLED) == expected


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("swa_full", [True, False])
def test_a_chat_is_stocks_chat(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, swa_full: bool
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m, swa_full=swa_full), ours(m, swa_full=swa_full)
    prompt = m.text(60)
    for turn in range(6):
        expected = fresh_text(plain, prompt, 20, **SAMPLED)
        assert text(fast, prompt, 20, **SAMPLED) == expected
        other = [*prompt[:-9], *m.text(12, 90 + turn)]  # the user thinks again
        expected = fresh_text(plain, other, 20, **SAMPLED)
        assert text(fast, other, 20, **SAMPLED) == expected
        prompt = [*other, *expected, *m.text(30, 50 + turn)]


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("changed", [False, True])
def test_the_fifth_turn_accepts_as_a_fresh_object(
    model: ModelFactory, ours: LlamaFactory, arch: str, changed: bool
) -> None:
    m = model(arch, state_scale=1.0)
    chat, fresh = ours(m), ours(m)
    prompt = conversation(chat, m, 5)
    if changed:
        prompt = [*prompt[:-9], *m.text(12, 90)]
    assert text(chat, prompt, 80, **SAMPLED) == text(fresh, prompt, 80, **SAMPLED)
    assert chat.spec_stats.last.num_accepted_tokens > 10
    for counted in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(chat.spec_stats.last, counted) == getattr(fresh.spec_stats.last, counted)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("changed", [False, True])
def test_a_head_that_reads_hidden_rows_gets_the_right_ones(
    model: ModelFactory, ours: LlamaFactory, arch: str, changed: bool
) -> None:
    m = model(arch, head="hidden", state_scale=0.25)
    chat, fresh = ours(m), ours(m)
    prompt = conversation(chat, m, 5)
    if changed:
        prompt = [*prompt[:-9], *m.text(12, 90)]
    assert text(chat, prompt, 80, **GREEDY) == text(fresh, prompt, 80, **GREEDY)
    ours_, theirs = (x.spec_stats.last.mean_acceptance_length for x in (chat, fresh))
    assert theirs > 2
    assert ours_ == pytest.approx(theirs, rel=0.02)


# ---- checkpoints: what they spare


def test_a_changed_last_turn_is_read_from_the_turn_before(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    decoded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = model("qwen35", state_scale=1.0)
    plain, fast = stock(m), ours(m)
    monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", "0")
    without = ours(m)
    before = conversation(fast, m, 4)
    assert conversation(without, m, 4) == before
    turn = [*before, *fast.input_ids[len(before) : fast.n_tokens].tolist(), *m.text(40, 70)]
    for llama in (fast, without):
        text(llama, turn, 16, **GREEDY)
    changed = [*turn[:-40], *m.text(36, 71)]
    expected = fresh_text(plain, changed, 30, **SAMPLED)
    few, all_ = decoded(fast), decoded(without)
    assert text(fast, changed, 30, **SAMPLED) == text(without, changed, 30, **SAMPLED) == expected
    assert sum(few) == len(changed) - (len(before) - TAIL)
    assert sum(all_) == len(changed)
    few.clear()
    assert text(fast, changed, 30, **SAMPLED) == expected  # once more: a few tokens only
    assert few == [TAIL]


def test_a_template_that_ends_its_prompt_otherwise(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, decoded: Any
) -> None:
    """What opens the answer is not in the history that the next prompt shows."""
    m = model("qwen35", state_scale=1.0)
    plain, fast = stock(m), ours(m)
    opening = m.text(TAIL, 5)
    history = m.text(60)
    sizes = decoded(fast)
    read = 0
    for turn in range(4):
        prompt = [*history, *opening]
        sizes.clear()
        answer = text(fast, prompt, 12, **GREEDY)
        assert answer == fresh_text(plain, prompt, 12, **GREEDY)
        assert sum(sizes) == len(prompt) - read
        read = len(history)
        history = [*history, *answer, *m.text(30, 50 + turn)]


def test_logits_are_those_of_an_object_that_never_went_back(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35", state_scale=1.0)
    plain, fast = stock(m), ours(m)
    before = conversation(fast, m, 3)
    at = len(before) - TAIL
    prompt = [*before[:at], *m.text(25, 7)]
    rest = fast._reuse(prompt)
    assert rest == prompt[at:] and restored(fast) == 1
    fast.eval(rest)
    plain.eval(prompt)
    row = logits_row(fast._ctx, fast._session.live_row, m.follow.size)
    np.testing.assert_allclose(row, logits_row(plain._ctx, -1, m.follow.size), atol=1e-4)


def test_the_same_batches_give_the_same_bits(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("qwen35", state_scale=1.0)
    fast, fresh = ours(m), ours(m)
    start, rest = m.text(40), m.text(25, 7)
    text(fast, [*start, *m.text(TAIL, 8)], 20, **SAMPLED)
    assert held(fast) == 1
    assert fast._reuse([*start, *rest]) == rest
    fast.eval(rest)
    fresh.eval(start)
    fresh.eval(rest)
    rows = [logits_row(x._ctx, x._session.live_row, m.follow.size) for x in (fast, fresh)]
    np.testing.assert_array_equal(rows[0], rows[1])


def test_a_wrong_state_would_show(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, set_data: Any
) -> None:
    """The oracle of this file has teeth: another state in a checkpoint changes the text."""
    m = model("qwen35", state_scale=1.0)
    seen: list[bytes] = []

    def swap(put: Callable[[bytes], int], data: bytes) -> int:
        seen.append(data)
        return put(seen[0])  # that of the first text, in the second as well

    set_data(swap)
    plain, fast = stock(m), ours(m)
    for start in (m.text(64, 3), m.text(64)):
        text(fast, start, 20, **GREEDY)
        again = [*start[:-2], *m.text(2, 9)]
        same = text(fast, again, 30, **GREEDY) == fresh_text(plain, again, 30, **GREEDY)
        assert same == (len(seen) == 1)
    assert len(seen) == 2


# ---- checkpoints: when they may not be used


@pytest.mark.parametrize("half", [False, True])
def test_a_refused_state_means_to_read_all(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    decoded: Any,
    set_data: Any,
    half: bool,
) -> None:
    """Also where the host has overwritten half of the recurrent state when it notices."""
    m = model("qwen35", state_scale=1.0)
    set_data(lambda put, data: put(data[: len(data) // 2]) if half else 0)
    plain, fast = stock(m), ours(m)
    prompt = conversation(fast, m, 3)
    again = [*prompt[:-2], *m.text(9, 9)]
    sizes = decoded(fast)
    assert text(fast, again, 30, **SAMPLED) == fresh_text(plain, again, 30, **SAMPLED)
    assert sum(sizes) == len(again)
    assert (held(fast), restored(fast)) == (1, 0)


def _cut_by_hand(llama: Any, m: models.Model) -> None:
    llama.n_tokens = 100
    llama.eval(m.text(60, 21))


def _cut_in_the_memory(llama: Any, m: models.Model) -> None:
    if not llama._ctx.kv_cache_seq_rm(0, 100, -1):
        llama._ctx.kv_cache_clear()
        llama.n_tokens = 0
        llama.eval(m.text(160, 21))


def _clear(llama: Any, m: models.Model) -> None:
    llama._ctx.kv_cache_clear()
    llama.reset()
    llama.eval(m.text(160, 21))


def _reset(llama: Any, m: models.Model) -> None:
    llama.reset()
    llama.eval(m.text(160, 21))


def _load(llama: Any, m: models.Model) -> None:
    kept = [int(t) for t in llama.input_ids[: llama.n_tokens]]
    text(llama, m.text(160, 21), 5, **GREEDY)
    state = llama.save_state()
    text(llama, kept, 5, **GREEDY)
    llama.load_state(state)


@pytest.mark.parametrize("change", [_cut_by_hand, _cut_in_the_memory, _clear, _reset, _load])
def test_none_outlives_the_cells_before_it(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    change: Callable[[Any, models.Model], None],
) -> None:
    m = model("qwen35", state_scale=1.0)
    plain, fast = stock(m), ours(m)
    prompt = conversation(fast, m, 3)
    assert held(fast) > 1
    change(fast, m)
    again = [*prompt, *m.text(3, 22)]
    assert text(fast, again, 20, **SAMPLED) == fresh_text(plain, again, 20, **SAMPLED)


def test_a_round_that_starts_further_back_drops_them(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35", state_scale=1.0)
    fast = ours(m)
    prompt = m.text(60)
    text(fast, prompt, 1, **GREEDY)
    assert held(fast) == 1
    fast.n_tokens = 60 - TAIL - 1
    list(zip(range(9), fast.generate(m.text(5, 2), reset=False, **GREEDY), strict=False))
    assert held(fast) == 0


def test_a_hole_in_the_middle_drops_them(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("qwen35", state_scale=1.0)
    fast = ours(m)
    conversation(fast, m, 2)
    fast._ctx.kv_cache_seq_rm(0, 10, 20)
    assert held(fast) == 0


def test_left_in_the_middle_of_a_round(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35", state_scale=1.0, right=1.0)
    plain, fast = stock(m), ours(m)
    base = m.text(50)
    for n in range(1, 8):
        text(fast, [*base, *m.text(20, n)], n, **SAMPLED)
        again = [*base, *m.text(20, 30 + n)]
        assert text(fast, again, 20, **SAMPLED) == fresh_text(plain, again, 20, **SAMPLED)
    assert restored(fast) == 0  # each prompt is new from 50 on


def test_random_turns(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("qwen35", state_scale=1.0)
    monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", "3")
    plain, fast = stock(m), ours(m)
    rng = np.random.default_rng(4)
    past: list[list[int]] = [m.text(50)]
    for step in range(60):
        base = past[int(rng.integers(len(past)))]
        keep = int(rng.integers(len(base) // 2, len(base) + 1))
        prompt = [*base[:keep], *m.text(int(rng.integers(1, 50)), 100 + step)][-400:]
        n = int(rng.integers(1, 25))
        emitted = text(fast, prompt, n, **SAMPLED)
        assert emitted == fresh_text(plain, prompt, n, **SAMPLED)
        past = [*past[-3:], [*prompt, *emitted]]
        assert held(fast) <= 3
    assert restored(fast) > 5


# ---- checkpoints: bounds and options


def test_at_most_so_many(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("qwen35")
    monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", "2")
    fast = ours(m)
    text(fast, m.text(60), 1, **GREEDY)
    one = fast.spec_memory()["checkpoints"]
    conversation(fast, m, 5)
    assert held(fast) == 2
    assert fast.spec_memory()["checkpoints"] == 2 * one


def test_not_closer_than_the_least_step(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("qwen35")
    fast = ours(m)
    prompt = m.text(60)
    text(fast, prompt, 1, **GREEDY)
    text(fast, [*prompt, *m.text(MIN_STEP - 1, 2)], 1, **GREEDY)
    assert held(fast) == 1
    text(fast, [*prompt, *m.text(MIN_STEP, 3)], 1, **GREEDY)
    assert held(fast) == 2


@pytest.mark.parametrize("arch", ["hy_v3", "mimo2"])
def test_attention_needs_none(model: ModelFactory, ours: LlamaFactory, arch: str) -> None:
    m = model(arch)
    fast = ours(m)
    conversation(fast, m, 3)
    assert held(fast) == 0
    assert "checkpoints" not in fast.spec_memory()


# ---- the draft's side: a cut below what it has read, and a window on what it reads


@pytest.mark.parametrize("arch", ["hy_v3", "mimo2"])
def test_the_token_before_a_cut_is_read_again_for_the_draft(
    model: ModelFactory, ours: LlamaFactory, decoded: Any, arch: str
) -> None:
    """It gives the hidden row that the draft lacks; what the draft has not read lacks none."""
    m = model(arch)
    fast = ours(m)
    prompt = m.text(60)
    text(fast, prompt, 30, **GREEDY)
    sizes = decoded(fast)
    text(fast, [*prompt[:50], *m.text(7, 2)], 1, **GREEDY)
    assert sum(sizes) == 7 + 1
    sizes.clear()
    text(fast, [*prompt[:50], *m.text(5, 2), *m.text(4, 3)], 1, **GREEDY)  # still waiting
    assert sum(sizes) == 4


def test_a_prefill_window_spares_the_draft_the_prompt(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("hy_v3", head="hidden")
    plain = stock(m)
    monkeypatch.setenv("LLAMA_MTP_PREFILL_WINDOW", "32")
    fast = ours(m)
    monkeypatch.setenv("LLAMA_MTP_PREFILL_WINDOW", "0")
    all_ = ours(m)
    prompt = m.text(300)
    expected = fresh_text(plain, prompt, 60, **SAMPLED)
    assert text(fast, prompt, 60, **SAMPLED) == text(all_, prompt, 60, **SAMPLED) == expected
    assert fast.spec_stats.last.num_accepted_tokens > 10
    again = [*prompt[:200], *m.text(90, 2)]
    expected = fresh_text(plain, again, 60, **SAMPLED)
    assert text(fast, again, 60, **SAMPLED) == expected


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_host_keeps_no_hidden_rows_of_what_the_draft_will_not_read(
    model: ModelFactory, ours: LlamaFactory, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches wholly before the window cost what they cost in stock; the rest has its rows."""
    monkeypatch.setenv("LLAMA_MTP_PREFILL_WINDOW", "32")
    fast = ours(model(arch), n_batch=64, n_ubatch=64)
    session, kept = fast._session, []
    capture = session.capture

    def watched(batch: Any) -> None:
        kept.append((batch.pos[batch.n_tokens - 1] + 1, session._keeps_rows))
        capture(batch)

    monkeypatch.setattr(session, "capture", watched)
    text(fast, model(arch).text(300), 30, **GREEDY)
    assert [end for end, rows in kept if rows] == [end for end, _ in kept if end > 300 - 33]
    assert any(not rows for _, rows in kept)
    assert fast.spec_stats.last.num_accepted_tokens > 5
