"""Trunks whose recurrent state has no snapshots: a copy from before the drafts, and a replay.

Qwen3-Next drafts with its own head; there, and on a trunk that is recurrent through and through, a
drafter with known mistakes makes rounds of every accept count. The text depends on all that came
before it, so that a state of another history shows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, StockFactory
from models import FIRST_WORD, N_VOCAB
from models.families import mamba, qwen3next
from models.families.common import Files
from sampling import BOTH, GREEDY, SAMPLED

from llama_mtp import host, registry
from llama_mtp.depth.policy import DepthPolicy
from llama_mtp.errors import NativeError
from llama_mtp.hooks import Draft, DraftRequest, SpecType, Verdict, hookimpl
from llama_mtp.measure.identity import clear, fresh_text, text

ROWS = range(1, 14)  # four rounds and more at depth 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    folder = tmp_path_factory.mktemp("families")
    return {"qwen3next": qwen3next.build(folder, 1, 1), "mamba": mamba.build(folder, 1)}


@pytest.fixture
def plain(files: dict[str, Files], stock: StockFactory) -> Any:
    return stock(files["qwen3next"])


@pytest.fixture
def fast(files: dict[str, Files], ours: LlamaFactory) -> Any:
    return ours(files["qwen3next"])


def words(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(FIRST_WORD, N_VOCAB, n)]


def counters(llama: Any) -> SimpleNamespace:
    llama._session.settle()
    return SimpleNamespace(**llama._session.counters())


def state_bytes(llama: Any) -> int:
    return int(host.C.llama_state_seq_get_size_ext(llama._ctx.ctx, 0, 1))


def assert_real(llama: Any, plain: Any) -> None:
    """The memory is what a fresh object has after the same text, to the last bits of its sums."""
    llama._session.replay()
    assert host.memory_end(llama._ctx) == llama._session.n_past
    seen = llama._input_ids[: llama._session.n_past].tolist()
    again = [*seen, *words(6, 17)]
    assert text(llama, again, 12, **GREEDY) == fresh_text(plain, again, 12, **GREEDY)


class Planned:
    """Drafts the true next tokens, wrong from a place on that differs from draft to draft.

    ``plan[k]`` is how many drafts of the k-th round are right; it repeats.
    """

    def __init__(self, truth: Sequence[int], plan: Sequence[int]) -> None:
        self.truth, self.plan, self.verdicts = list(truth), list(plan), list[Verdict]()

    @hookimpl
    def mtp_register_spec_types(self, register: Callable[[Any], None]) -> None:
        register(SpecType("planned", lambda settings: self))

    @hookimpl
    def mtp_round_finished(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def draft(self, request: DraftRequest) -> Draft:
        at = len(request.tokens)
        drafts = self.truth[at : at + request.n_max]
        n_drafted = sum(v.n_drafted > 0 for v in self.verdicts)
        for i in range(self.plan[n_drafted % len(self.plan)], len(drafts)):
            drafts[i] = FIRST_WORD + (drafts[i] - FIRST_WORD + 1) % (N_VOCAB - FIRST_WORD)
        return Draft(drafts)


@pytest.fixture
def planned() -> Iterator[Callable[..., Planned]]:
    registry.reset()

    def register(truth: Sequence[int], plan: Sequence[int]) -> Planned:
        drafter = Planned(truth, plan)
        registry.plugin_manager().register(drafter, name="planned")
        return drafter

    yield register
    registry.reset()


@pytest.mark.parametrize("arch", ["qwen3next", "mamba"])
def test_the_recurrent_state_decides_the_text(
    files: dict[str, Files], stock: StockFactory, arch: str
) -> None:
    """Else nothing here would notice a state of another history: one wrong token is enough."""
    plain = stock(files[arch])
    n, ctx, flag = 30, plain._ctx.ctx, host.C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    prompt = words(n)
    other = [*prompt[:-2], words(1, 3)[0], prompt[-1]]
    truth = fresh_text(plain, [*prompt, 300], 30, **GREEDY)

    def evaluate(tokens: list[int]) -> None:
        clear(plain)
        plain.eval(tokens)

    evaluate(other)
    state = np.empty(host.C.llama_state_seq_get_size_ext(ctx, 0, flag), dtype=np.uint8)
    data = host.pointer_to(state)
    assert host.C.llama_state_seq_get_data_ext(ctx, data, len(state), 0, flag) == len(state)
    for swapped in (False, True):
        evaluate(prompt)
        if swapped:
            assert host.C.llama_state_seq_set_data_ext(ctx, data, len(state), 0, flag) == len(state)
        plain.set_seed(1)
        text = list(islice(plain.generate([300], reset=False, **GREEDY), 30))
        assert (text == truth) != swapped


# ---- same seed, same tokens


@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_same_tokens_with_its_own_head(
    files: dict[str, Files], plain: Any, ours: LlamaFactory, settings: str, depth: int
) -> None:
    fast = ours(files["qwen3next"], spec_draft_n_max=depth)
    prompt = words(20)
    emitted = text(fast, prompt, 450, **BOTH[settings])
    assert emitted == fresh_text(plain, prompt, 450, **BOTH[settings])
    assert len(set(emitted)) > 100  # no cycle, in which a lost state would not show
    stats = fast.spec_stats.last
    assert fast.spec_type == "draft-mtp"
    assert stats.num_target_decodes == stats.num_rounds
    assert 100 < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("arch", ["qwen3next", "mamba"])
@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_every_accept_count(
    files: dict[str, Files],
    stock: StockFactory,
    ours: LlamaFactory,
    planned: Callable[..., Planned],
    arch: str,
    settings: str,
    depth: int,
) -> None:
    """In any order, so that rejections follow each other and none."""
    prompt = words(20)
    truth = fresh_text(stock(files[arch]), prompt, 460, **BOTH[settings])
    plan = np.random.default_rng(depth).integers(0, depth + 1, 97).tolist()
    drafter = planned([*prompt, *truth], plan)
    fast = ours(files[arch], spec_type="planned", spec_draft_n_max=depth)
    assert text(fast, prompt, 450, **BOTH[settings]) == truth[:450]
    fast.close()
    rounds = drafter.verdicts[:-1]
    full = [v for v in rounds if v.n_drafted == depth]
    assert {v.n_accepted for v in full} == set(range(depth + 1))
    assert [v.n_accepted for v in full] == (plan * 5)[: len(full)]
    assert all(v.n_accepted == 0 and v.n_emitted == 1 for v in rounds if v.n_drafted < depth)
    stats = fast.spec_stats
    assert stats.num_target_decodes == stats.num_rounds  # a drafter waits as the head does


@pytest.mark.parametrize("n_batch", [8, 9, 11, 15, 16])
def test_same_tokens_where_little_fits_beside_a_round(
    files: dict[str, Files], plain: Any, ours: LlamaFactory, n_batch: int
) -> None:
    fast = ours(files["qwen3next"], n_batch=n_batch, n_ubatch=4, spec_draft_n_max=7)
    prompt = words(30)
    emitted = text(fast, prompt, 300, **SAMPLED)
    assert emitted == fresh_text(plain, prompt, 300, **SAMPLED)
    assert fast.spec_stats.num_draft_tokens > 100


def test_same_tokens_while_the_depth_changes(plain: Any, fast: Any) -> None:
    """Drafting begins and ends with rows to replay, and without."""
    prompt = words(20)
    truth = fresh_text(plain, prompt, 450, **SAMPLED)
    fast.set_seed(1)
    stream = fast.generate(prompt, **SAMPLED)
    emitted = []
    for depth in [3, 0, 1, 0, 2, 3, 0] * 20:
        fast.spec_depth = depth
        emitted += islice(stream, 1 + (len(emitted) + depth) % 5)
    stream.close()
    assert len(emitted) > 250
    assert emitted == truth[: len(emitted)]


def test_the_end_of_the_context_is_reached(files: dict[str, Files], ours: LlamaFactory) -> None:
    import llama_cpp

    options = {**COMMON, "n_ctx": 256}
    plain = llama_cpp.Llama(str(files["qwen3next"].path), **options)
    fast = ours(files["qwen3next"], n_ctx=256)
    prompt = words(20)
    texts = []
    for llama in (plain, fast):
        llama.set_seed(1)
        texts.append(list(islice(llama.generate(prompt, **GREEDY), 236)))
    plain.close()
    assert texts[0] == texts[1]


# ---- what a round costs: counted, not timed


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_round_is_one_decode_and_at_most_one_copy(
    files: dict[str, Files], ours: LlamaFactory, depth: int
) -> None:
    fast = ours(files["qwen3next"], spec_draft_n_max=depth)
    text(fast, words(20), 400, **SAMPLED)
    seen, size = counters(fast), state_bytes(fast)
    assert seen.n_target_decodes == seen.n_rounds
    assert 0 < seen.n_state_bytes <= size * seen.n_rounds
    assert seen.n_state_bytes % size == 0
    assert 0 < seen.n_replayed <= 2 * depth * seen.n_rounds


def test_right_drafts_are_never_replayed(
    files: dict[str, Files], plain: Any, ours: LlamaFactory, planned: Callable[..., Planned]
) -> None:
    prompt = words(20)
    truth = fresh_text(plain, prompt, 220, **GREEDY)
    planned([*prompt, *truth], [3])
    fast = ours(files["qwen3next"], spec_type="planned")
    assert text(fast, prompt, 201, **GREEDY) == truth[:201]
    seen = counters(fast)
    assert seen.n_replayed == 0
    assert seen.n_rounds == 50
    assert seen.n_state_bytes == 50 * state_bytes(fast)
    fast.close()


def test_plain_rounds_copy_nothing(fast: Any, plain: Any) -> None:
    fast.spec_depth = 0
    prompt = words(20)
    assert text(fast, prompt, 60, **GREEDY) == fresh_text(plain, prompt, 60, **GREEDY)
    assert counters(fast).n_state_bytes == 0


@pytest.mark.parametrize("surplus", [0, 20, 60, 200])
def test_replays_count_as_a_cost_of_drafting(surplus: int) -> None:
    """By a clock of our own: plain 100, drafting one token 130, every second one is right.

    Two rounds that draft give three tokens; with the surplus of one replay they cost as much as
    plain decoding at 40.
    """
    policy = DepthPolicy(1)
    right = replays = False
    drafted: list[int] = []
    for _ in range(2000):
        if replays:
            policy.observe_replay(100 + surplus)
            replays = False
            continue
        rule = policy.choose()
        picks = (0,) * rule.depth
        pays = bool(picks) and rule.accept[0, 0] - rule.price[1] >= -rule.price[0]
        drafted.append(int(pays))
        right = right != bool(picks)
        if drafted[-1]:
            policy.observe(1, 130, picks, 0, 1 + right, int(right))
            replays = not right
        else:
            policy.observe(0, 100, picks, 0, 1, 0, right if picks else None)
    late = sum(drafted[-800:]) / 800
    if surplus < 40:
        assert late > 0.75
    else:  # at 60 a draft loses 7 %, at 200 a half
        assert late < (0.3 if surplus < 100 else 0.125), late


def test_drafting_that_does_not_pay_ends(
    files: dict[str, Files], plain: Any, ours: LlamaFactory, planned: Callable[..., Planned]
) -> None:
    """Copies and replays are part of what drafting costs: always wrong, it is dropped."""
    prompt = words(20)
    truth = fresh_text(plain, prompt, 480, **GREEDY)
    drafter = planned([*prompt, *truth], [0])
    fast = ours(files["qwen3next"], spec_type="planned", spec_adaptive=True)
    assert text(fast, prompt, 470, **GREEDY) == truth[:470]
    assert fast._session.policy.best == 0
    assert sum(v.n_drafted > 0 for v in drafter.verdicts[-200:]) < 20
    fast.close()


# ---- the consumer leaves, sends, and comes back


@pytest.mark.parametrize("settings", BOTH)
def test_leaving_at_every_row(plain: Any, fast: Any, settings: str) -> None:
    how = BOTH[settings]
    prompt, other = words(20), words(15, 2)
    truth, other_truth = fresh_text(plain, prompt, 30, **how), fresh_text(plain, other, 20, **how)
    for n in ROWS:
        fast.set_seed(1)
        stream = fast.generate(prompt, **how)
        assert list(islice(stream, n)) == truth[:n]
        stream.close()
        assert text(fast, prompt, 30, **how) == truth
        fast.set_seed(1)
        list(islice(fast.generate(prompt, **how), n))
        assert text(fast, other, 20, **how) == other_truth


@pytest.mark.parametrize("right", [True, False])
def test_sending_at_every_row(plain: Any, fast: Any, right: bool) -> None:
    prompt = words(20)
    truth = fresh_text(plain, prompt, 30, **SAMPLED)
    for n in ROWS:
        fast.set_seed(1)
        stream = fast.generate(prompt, **SAMPLED)
        emitted = list(islice(stream, n))
        emitted.append(stream.send(truth[n : n + 3] if right else words(3, n)))
        emitted += islice(stream, 30 - len(emitted))
        stream.close()
        assert emitted == truth


def test_two_generations_by_turns(plain: Any, fast: Any) -> None:
    prompts = words(20), words(18, 2)
    truths = [fresh_text(plain, p, 24, **GREEDY) for p in prompts]
    streams = [fast.generate(p, **GREEDY) for p in prompts]
    texts: list[list[int]] = [[], []]
    for n in (1, 2, 3, 4, 5, 6, 3):
        for stream, emitted in zip(streams, texts, strict=True):
            emitted += islice(stream, n)
    assert texts == truths


# ---- resending prompts


@pytest.mark.parametrize("n", range(1, 12))
def test_prompt_again_after_rounds(plain: Any, fast: Any, n: int) -> None:
    prompt = words(30)
    begun = fresh_text(plain, prompt, n, **GREEDY)
    assert text(fast, prompt, n, **GREEDY) == begun
    for again in (
        prompt,
        prompt[:-1],
        [*prompt, *begun],
        [*prompt, *begun[:-1]],
        [*prompt, *begun[: n // 2], *words(2, 3)],
    ):
        assert text(fast, again, 12, **SAMPLED) == fresh_text(plain, again, 12, **SAMPLED)


def test_prefix_of_every_length(plain: Any, fast: Any) -> None:
    prompt, other = words(24), words(8, seed=6)
    for keep in range(25):
        text(fast, prompt, 6, **GREEDY)
        again = [*prompt[:keep], *other]
        assert text(fast, again, 10, **SAMPLED) == fresh_text(plain, again, 10, **SAMPLED)


def test_a_rejected_tail_is_not_read_again(plain: Any, fast: Any) -> None:
    """Back to a place in the last round: the copy from before it serves, the prompt stays."""
    prompt = words(100)
    emitted = text(fast, prompt, 10, **GREEDY)
    for _ in range(4):
        text(fast, [*prompt, *emitted], 10, **GREEDY)
        assert fast._session.n_past > 105
        emitted = [*emitted, *words(1, len(emitted))]
    assert_real(fast, plain)


def test_a_chat_whose_last_turn_changed_starts_at_a_checkpoint(plain: Any, fast: Any) -> None:
    prompt = words(150)
    text(fast, prompt, 40, **GREEDY)
    again = [*prompt[:148], *words(20, 8)]
    assert text(fast, again, 40, **SAMPLED) == fresh_text(plain, again, 40, **SAMPLED)
    counted = fast._session.counters()
    assert counted["n_checkpoints_restored"] == 1 and counted["n_tokens_kept"] == 146


# ---- others use the memory


@pytest.mark.parametrize("n", ROWS)
def test_the_memory_is_real_for_others(plain: Any, fast: Any, n: int) -> None:
    """Stock's calls on the context, at every row of a round."""
    prompt = words(20)
    truth = fresh_text(plain, prompt, n, **GREEDY)
    assert text(fast, prompt, n, **GREEDY) == truth
    end = fast._session.n_past
    assert fast._ctx.kv_cache_seq_rm(-1, fast.n_tokens, -1) is not None  # as stock's eval calls it
    assert host.memory_end(fast._ctx) == fast._session.n_past == end == fast.n_tokens
    assert_real(fast, plain)


@pytest.mark.parametrize("n", ROWS)
def test_eval_and_sample_by_hand(plain: Any, fast: Any, n: int) -> None:
    prompt, more = words(20), words(5, 5)
    emitted = []
    for llama in (plain, fast):
        llama.reset()
        llama._ctx.kv_cache_clear()
        begun = text(llama, prompt, n, **GREEDY)  # leaves ours in the middle of a round
        llama.n_tokens = 20 + n - 1  # stock has not evaluated the last token, ours may have
        llama.eval([begun[-1], *more])
        tokens = []
        for _ in range(12):
            tokens.append(llama.sample(temp=0.0))
            llama.eval(tokens[-1:])
        emitted.append(tokens)
    assert emitted[0] == emitted[1]
    assert_real(fast, plain)


def test_a_cut_before_the_last_copy_is_refused(plain: Any, fast: Any) -> None:
    """And changes nothing; the text is then evaluated again where it is asked for."""
    prompt = words(30)
    text(fast, prompt, 13, **GREEDY)
    end = fast.n_tokens
    assert not fast._session.can_truncate(25)
    assert not fast._ctx.kv_cache_seq_rm(-1, 25, -1)
    assert fast._session.n_past == fast.n_tokens == end
    fast.n_tokens = 25
    fast.eval(words(3, 8))
    again = [*prompt[:25], *words(3, 8)]
    assert text(fast, again, 20, **SAMPLED) == fresh_text(plain, again, 20, **SAMPLED)


@pytest.mark.parametrize("n", ROWS)
def test_save_and_load_at_every_row(
    files: dict[str, Files], plain: Any, fast: Any, ours: LlamaFactory, n: int
) -> None:
    prompt = words(30)
    truth = fresh_text(plain, prompt, n + 40, **GREEDY)
    stream = fast.generate(prompt, **GREEDY)
    assert list(islice(stream, n)) == truth[:n]
    state = fast.save_state()
    assert list(islice(stream, 40)) == truth[n:]  # saving takes nothing from the generation
    stream.close()
    again = [*prompt, *truth[:n]]
    text(fast, words(12, 4), 9, **GREEDY)
    other = ours(files["qwen3next"])
    for llama, kept in ((fast, state), (other, pickle.loads(pickle.dumps(state)))):
        llama.load_state(kept)
        assert llama.n_tokens == 30 + n - 1
        assert text(llama, again, 40, **GREEDY) == truth[n:]
        assert llama.spec_stats.last.num_accepted_tokens > 0


def test_a_trunk_without_attention(
    files: dict[str, Files],
    stock: StockFactory,
    ours: LlamaFactory,
    planned: Callable[..., Planned],
) -> None:
    """Its memory is the recurrent state alone: rows, prefixes, checkpoints and saved states."""
    plain, prompt = stock(files["mamba"]), words(150)
    truth = fresh_text(plain, prompt, 60, **GREEDY)
    planned([*prompt, *truth], [2, 0, 3, 1, 1, 0])
    fast = ours(files["mamba"], spec_type="planned")
    for n in ROWS:
        assert text(fast, prompt, n, **GREEDY) == truth[:n]
        kept = fast.save_state()
        again = [*prompt, *truth[:n]]
        assert text(fast, again, 20, **GREEDY) == truth[n : n + 20]
        other = [*prompt[:148], *words(7, n)]
        assert text(fast, other, 20, **SAMPLED) == fresh_text(plain, other, 20, **SAMPLED)
        fast.load_state(kept)
        assert text(fast, again, 20, **GREEDY) == truth[n : n + 20]
    assert fast._session.counters()["n_checkpoints_restored"] >= len(ROWS)
    fast.close()


def test_a_state_loads_into_stock(plain: Any, fast: Any, stock: StockFactory, files: Any) -> None:
    prompt = words(30)
    truth = fresh_text(plain, prompt, 30, **GREEDY)
    for n in ROWS:
        text(fast, prompt, n, **GREEDY)
        plain.load_state(fast.save_state())
        assert text(plain, [*prompt, *truth[:n]], 30 - n, **GREEDY) == truth[n:]


def test_a_memory_that_is_lost_is_evaluated_again(
    plain: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone cleared the memory without telling: an exception or the right text, never another."""
    prompt = words(30)
    truth = fresh_text(plain, prompt, 40, **GREEDY)
    stream = fast.generate(prompt, **GREEDY)
    assert list(islice(stream, 9)) == truth[:9]
    host.C.llama_memory_clear(fast._ctx.memory, True)
    try:
        assert list(islice(stream, 31)) == truth[9:]
    except NativeError:
        stream.close()
    fast.reset()
    fast._ctx.kv_cache_clear()
    assert text(fast, prompt, 40, **GREEDY) == truth
