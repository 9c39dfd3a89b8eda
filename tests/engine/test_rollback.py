"""Resending prompts: what is kept of the memory is what a fresh object would have.

A recurrent state keeps a few snapshots only, and the host's own word on whether one is there is not
to be trusted: it takes back tokens whose state is gone, and the logits are silently wrong.
"""

from __future__ import annotations

from itertools import islice

import models
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY, SAMPLED

from llama_mtp import host
from llama_mtp.measure.identity import fresh_text, text


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5])
def test_prompt_again_after_plain_tokens(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, k: int
) -> None:
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m)
    prompt = m.text(30)
    truth = fresh_text(plain, prompt, 40, **SAMPLED)
    fast.reset()
    fast.eval(prompt)
    for token in m.text(k, seed=9):
        fast.eval([token])
    assert text(fast, prompt, 40, **SAMPLED) == truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_prompt_again_after_tokens_at_depth_zero(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, k: int
) -> None:
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m)
    prompt = m.text(30)
    truth = fresh_text(plain, prompt, 40, **SAMPLED)
    fast.spec_depth = 0
    text(fast, prompt, k, **GREEDY)
    fast.spec_depth = 3
    assert text(fast, prompt, 40, **SAMPLED) == truth


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("state_scale", [0.25, 1.2])
@pytest.mark.parametrize("n", range(1, 12))
def test_prompt_again_after_rounds(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    state_scale: float,
    n: int,
) -> None:
    m = model(arch, state_scale=state_scale)
    plain, fast = stock(m), ours(m)
    prompt = m.text(30)
    begun = fresh_text(plain, prompt, n, **GREEDY)
    assert text(fast, prompt, n, **GREEDY) == begun
    # The same, one token shorter, all of it, all but the last token, and a branch.
    for again in (
        prompt,
        prompt[:-1],
        [*prompt, *begun],
        [*prompt, *begun[:-1]],
        [*prompt, *begun[: n // 2], *m.text(2, 3)],
    ):
        assert text(fast, again, 12, **SAMPLED) == fresh_text(plain, again, 12, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_prefix_of_every_length(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m)
    prompt = m.text(24)
    other = m.text(8, seed=6)
    for keep in range(25):
        text(fast, prompt, 6, **GREEDY)
        again = [*prompt[:keep], *other]
        assert text(fast, again, 10, **SAMPLED) == fresh_text(plain, again, 10, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_stock_methods_in_between(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """What chat handlers do to the object: cut, clear, evaluate, save and load."""
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m)
    prompt = m.text(30)
    truth = fresh_text(plain, prompt, 20, **SAMPLED)

    text(fast, prompt, 6, **GREEDY)
    fast.n_tokens = 30  # cut by hand; eval takes the rest out of the memory
    fast.eval(m.text(3, 8))
    again = [*prompt, *m.text(3, 8)]
    assert text(fast, again, 20, **SAMPLED) == fresh_text(plain, again, 20, **SAMPLED)

    text(fast, prompt, 7, **GREEDY)
    fast._ctx.kv_cache_clear()
    fast.reset()
    assert text(fast, prompt, 20, **SAMPLED) == truth

    text(fast, prompt, 5, **GREEDY)
    state = fast.save_state()
    rest = [*prompt, *fast.input_ids[30 : fast.n_tokens].tolist()]
    text(fast, m.text(12, 4), 9, **GREEDY)
    fast.load_state(state)
    longer = [*rest, *m.text(2, 5)]
    assert text(fast, longer, 20, **SAMPLED) == fresh_text(plain, longer, 20, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_reset_false_continues(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """``generate(reset=False)`` evaluates after what is there."""
    m = model(arch, state_scale=1.2)
    plain, fast = stock(m), ours(m)
    prompt, more = m.text(20), m.text(5, 2)
    whole = fresh_text(plain, [*prompt, *more], 30, **SAMPLED)
    fast.reset()
    fast.eval(prompt)
    fast.set_seed(1)
    assert list(islice(fast.generate(more, reset=False, **SAMPLED), 30)) == whole


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_eval_and_sample_by_hand(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.2)
    prompt = m.text(20)
    texts = []
    for llama in (stock(m), ours(m)):
        text(llama, prompt, 6, **GREEDY)  # leaves ours in the middle of a round
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(prompt)
        emitted = []
        for _ in range(12):
            token = llama.sample(temp=0.0)
            emitted.append(token)
            llama.eval([token])
        texts.append(emitted)
    assert texts[0] == texts[1]


def test_a_hole_in_the_middle_empties_the_draft(model: ModelFactory, ours: LlamaFactory) -> None:
    """Positions that the target lost are not to be drafted from."""
    m = model("hy_v3")
    fast = ours(m)
    text(fast, m.text(30), 12, **GREEDY)
    draft = fast._session.draft_context
    assert host.memory_end(draft) > 30
    assert fast._ctx.kv_cache_seq_rm(0, 5, 9)
    assert host.memory_end(draft) == 0
