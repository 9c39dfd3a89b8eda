"""Exactly the drafts that must be accepted are: a wrong hidden row never changes the text.

The embedding head shows that rounds are cut and counted right, the hidden head that every row of
the draft context is paired with the hidden row of the token before it.
"""

from __future__ import annotations

from itertools import islice

import models
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import BOTH, GREEDY

from llama_mtp.measure.identity import fresh_text, text


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_every_accept_count_as_built(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, depth: int
) -> None:
    m = model(arch, right=0.85 if depth > 3 else 0.7)
    plain, fast = stock(m), ours(m, spec_draft_n_max=depth)
    prompt = m.text(9)
    emitted = text(fast, prompt, 450, **GREEDY)
    assert emitted == fresh_text(plain, prompt, 450, **GREEDY)
    assert emitted == [m.follow[t] for t in [prompt[-1], *emitted[:-1]]]
    expected = models.assert_acceptance(fast.spec_stats.last, m, prompt, emitted, depth)
    assert expected.accept_counts == set(range(depth + 1))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("settings", ["greedy", "top-k-p-min-p"])
def test_acceptance_follows_from_the_text(
    model: ModelFactory, ours: LlamaFactory, arch: str, settings: str
) -> None:
    """The same where the text depends on its history and on the sampler."""
    m = model(arch, state_scale=1.0)
    fast = ours(m)
    prompt = m.text(30)
    emitted = text(fast, prompt, 400, **BOTH[settings])
    models.assert_acceptance(fast.spec_stats, m, prompt, emitted, 3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_the_hidden_rows_are_the_right_ones(
    model: ModelFactory, ours: LlamaFactory, arch: str, depth: int
) -> None:
    """This head reads only the hidden row: any other row than its own predicts another word."""
    m = model(arch, head="hidden")
    fast = ours(m, spec_draft_n_max=depth)
    prompt = m.text(50)
    emitted = text(fast, prompt, 300, **GREEDY)
    expected = models.assert_acceptance(fast.spec_stats, m, prompt, emitted, depth)
    assert {accepted for _, _, accepted in expected.rounds[:-1]} == {depth}


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_the_hidden_rows_after_rejections(
    model: ModelFactory, ours: LlamaFactory, arch: str, depth: int
) -> None:
    """A sampler that leaves the path now and then, at every row of a round."""
    m = model(arch, head="hidden", sharpness=0.85)
    fast = ours(m, spec_draft_n_max=depth)
    prompt = m.text(50)
    emitted = text(fast, prompt, 450, temp=1.0, top_k=0, top_p=1.0, min_p=0.0)
    expected = models.assert_acceptance(fast.spec_stats, m, prompt, emitted, depth)
    assert expected.accept_counts == set(range(depth + 1))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n_batch", [8, 16, 64])
def test_hidden_rows_of_a_prompt_in_chunks(
    model: ModelFactory, ours: LlamaFactory, arch: str, n_batch: int
) -> None:
    m = model(arch, head="hidden")
    fast = ours(m, n_batch=n_batch)
    for n in (n_batch - 1, n_batch, n_batch + 1, 3 * n_batch + 5):
        prompt = m.text(n, seed=n)
        emitted = text(fast, prompt, 60, **GREEDY)
        models.assert_acceptance(fast.spec_stats.last, m, prompt, emitted, 3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_hidden_rows_after_small_ubatches(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, head="hidden")
    fast = ours(m, n_batch=64, n_ubatch=8)
    prompt = m.text(150)
    emitted = text(fast, prompt, 60, **GREEDY)
    models.assert_acceptance(fast.spec_stats.last, m, prompt, emitted, 3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("head", ["embedding", "hidden"])
def test_acceptance_when_a_prompt_is_reused(
    model: ModelFactory, ours: LlamaFactory, arch: str, head: str
) -> None:
    """The same prompt, a longer one, a shorter one, another one: a row never goes stale."""
    m = model(arch, head=head)
    fast = ours(m)
    prompt = m.text(30)
    first = text(fast, prompt, 23, **GREEDY)
    for again in (
        prompt,
        [*prompt, *first],
        [*prompt, *first[:7], *m.text(4, 3)],
        prompt[:11],
        m.text(20, 4),
    ):
        emitted = text(fast, again, 40, **GREEDY)
        models.assert_acceptance(fast.spec_stats.last, m, again, emitted, 3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n", range(1, 10))
def test_acceptance_after_closing_at_every_row(
    model: ModelFactory, ours: LlamaFactory, arch: str, n: int
) -> None:
    m = model(arch, head="hidden")
    fast = ours(m)
    prompt = m.text(30)
    stream = fast.generate(prompt, **GREEDY)
    first = list(islice(stream, n))
    stream.close()
    again = [*prompt, *first]
    emitted = text(fast, again, 30, **GREEDY)
    models.assert_acceptance(fast.spec_stats.last, m, again, emitted, 3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_acceptance_after_plain_eval(model: ModelFactory, ours: LlamaFactory, arch: str) -> None:
    """Tokens that the user evaluates by hand are captured like any other."""
    m = model(arch, head="hidden")
    fast = ours(m)
    fast.reset()
    prompt = m.text(30)
    fast.eval(prompt[:10])
    for token in prompt[10:]:
        fast.eval([token])
    emitted = text(fast, prompt, 40, **GREEDY)
    models.assert_acceptance(fast.spec_stats.last, m, prompt, emitted, 3)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_acceptance_after_depth_zero(model: ModelFactory, ours: LlamaFactory, arch: str) -> None:
    """Rows decoded while drafting was off are caught up with when it is on again."""
    m = model(arch, head="hidden")
    fast = ours(m)
    fast.spec_depth = 0
    stream = fast.generate(m.text(30), **GREEDY)
    assert len(list(islice(stream, 20))) == 20
    stats = fast.spec_stats
    assert stats.num_draft_tokens == 0
    fast.spec_depth = 3
    rest = list(islice(stream, 40))
    assert len(rest) == 40
    stream.close()
    assert stats.num_accepted_per_pos == [10, 10, 10]


@pytest.mark.parametrize("arch", ["mimo2", "hy_v3"])
@pytest.mark.parametrize("n_heads", [2, 3])
@pytest.mark.parametrize("head", ["embedding", "hidden"])
def test_every_head_of_a_chain_drafts_its_own_position(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    n_heads: int,
    head: str,
) -> None:
    m = model(arch, head=head, n_heads=n_heads)
    fast = ours(m, spec_draft_n_max=5)
    assert fast.spec_depth == n_heads  # nobody trained a head for the positions after
    prompt = m.text(30)
    emitted = text(fast, prompt, 200, **GREEDY)
    assert emitted == fresh_text(stock(m), prompt, 200, **GREEDY)
    last = fast.spec_stats.last
    models.assert_acceptance(last, m, prompt, emitted, n_heads)
    assert last.num_draft_decodes == n_heads * last.num_rounds


@pytest.mark.parametrize("arch", ["mimo2", "hy_v3"])
def test_heads_that_were_not_asked_for_a_while_still_know_the_text(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    """A shallower depth, depth 0, and a prompt of several batches leave no hole in any head's KV.

    A hole would show in other drafts than those of an object that never paused.
    """
    m = model(arch, head="hidden", n_heads=3)
    fast = ours(m, n_batch=16, n_ubatch=16)
    prompt = m.text(70)
    for depths in ([3], [1, 3], [0, 3], [2, 0, 1, 3]):
        fast.reset()
        emitted: list[int] = []
        for token in fast.generate(prompt, **GREEDY):
            fast.spec_depth = depths[min(len(emitted) // 25, len(depths) - 1)]
            emitted.append(token)
            if len(emitted) == 130:
                break
        stats = fast.spec_stats
        before = stats.num_accepted_tokens
        fast.spec_depth = 3
        text(fast, [*prompt, *emitted], 40, **GREEDY)
        assert stats.num_accepted_tokens - before == 30, depths  # all: rounds of 3 + 1


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8, 21])
def test_nothing_is_drafted_past_the_last_token_that_is_wanted(
    model: ModelFactory, ours: LlamaFactory, max_tokens: int
) -> None:
    """A head that is always right: rounds of four, the last one as long as what is missing."""
    m = model("qwen35", right=1.0)
    fast = ours(m)
    fast(m.text(9), max_tokens=max_tokens, temperature=0.0)
    left = max_tokens - 1  # the first token comes from the prompt
    rounds = [4] * (left // 4) + ([left % 4] if left % 4 else [])
    stats = fast.spec_stats.last
    assert stats.num_rounds == len(rounds)
    assert stats.num_draft_tokens == stats.num_accepted_tokens == sum(n - 1 for n in rounds)
    text(fast, m.text(9), 9, **GREEDY)  # generate() alone knows no end
    assert fast.spec_stats.last.num_draft_tokens == 6
