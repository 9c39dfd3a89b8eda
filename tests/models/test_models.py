"""The constructed models do what the other tests take for granted; needs the stock host only."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from conftest import ModelFactory, StockFactory
from llama_cpp import llama_cpp_ext as ext

import models

Rows = npt.NDArray[np.float32]


class HostHead:
    """Target and draft context over the host's C functions, without this package."""

    def __init__(self, model: models.Model) -> None:
        params = llama_cpp.llama_model_default_params()
        params.load_mtp = True
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(model.path).encode(), params)
        assert self.model
        self.contexts = []
        for kind in (0, 1):
            options = llama_cpp.llama_context_default_params()
            options.n_ctx, options.n_threads, options.n_threads_batch = 512, 1, 1
            options.ctx_type = kind
            context = llama_cpp.llama_init_from_model(self.model, options)
            assert context
            ext.llama_set_embeddings_nextn(context, True, False)
            self.contexts.append(context)

    def rows(
        self, kind: int, tokens: Sequence[int], hidden: Rows | None = None, pos: int = 0
    ) -> tuple[Rows, Rows]:
        """Decode ``tokens``; return the logits and the hidden rows of all of them."""
        n = len(tokens)
        context = self.contexts[kind]
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        flat: Any = None
        if hidden is not None:
            flat = (ctypes.c_float * hidden.size)(*hidden.ravel().tolist())
            batch.embd = ctypes.cast(flat, ctypes.POINTER(ctypes.c_float))
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, pos + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        batch.embd = None
        llama_cpp.llama_batch_free(batch)
        logits = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (models.N_VOCAB,))
            for i in range(n)
        ]
        states = [
            np.ctypeslib.as_array(ext.llama_get_embeddings_nextn_ith(context, i), (models.N_EMBD,))
            for i in range(n)
        ]
        return np.array(logits), np.array(states)

    def close(self) -> None:
        for context in reversed(self.contexts):
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(self.model)


@pytest.fixture
def open_head() -> Iterator[Any]:
    made: list[HostHead] = []

    def make(model: models.Model) -> HostHead:
        made.append(HostHead(model))
        return made[-1]

    yield make
    for head in made:
        head.close()


def greedy(llama: Any, prompt: Sequence[int], n: int) -> list[int]:
    return list(islice(llama.generate(prompt, temp=0.0), n))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_text_follows_the_function(model: ModelFactory, stock: StockFactory, arch: str) -> None:
    m = model(arch)
    prompt = m.text(20)
    text = greedy(stock(m), prompt, 300)
    assert text == [m.follow[t] for t in [prompt[-1], *text[:-1]]]
    assert set(text) == set(range(models.FIRST_WORD, models.N_VOCAB))  # one cycle, all words


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("state_scale", [0.25, 1.2])
def test_history_changes_the_logits(
    model: ModelFactory, stock: StockFactory, arch: str, state_scale: float
) -> None:
    m = model(arch, state_scale=state_scale)
    llama = stock(m, logits_all=True)
    rows = []
    for seed in (0, 1):
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval([*m.text(19, seed), models.FIRST_WORD])
        rows.append(llama.scores[19].copy())
    words = slice(models.FIRST_WORD, None)
    assert np.abs(rows[0][words] - rows[1][words]).max() > 0.5
    assert all(row.argmax() >= models.FIRST_WORD for row in rows)
    if state_scale > 1:
        llama.reset()
        llama._ctx.kv_cache_clear()
        text = greedy(llama, m.text(20), 200)
        followed = sum(m.follow[a] == b for a, b in pairwise(text))
        assert 40 < followed < 190, "the text should depend on its history, and sometimes follow"


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_embedding_head_predicts_its_map(model: ModelFactory, open_head: Any, arch: str) -> None:
    m = model(arch)
    head = open_head(m)
    tokens = m.text(60)
    hidden = np.random.default_rng(3).normal(size=(60, models.N_EMBD)).astype(np.float32)
    logits, states = head.rows(1, tokens, hidden)
    assert logits.argmax(axis=1).tolist() == [m.heads[0][t] for t in tokens]
    assert np.isfinite(states).all()
    wrong = sum(m.heads[0][t] != m.follow[t] for t in tokens)
    assert 5 < wrong < 30


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_hidden_head_needs_the_right_row(model: ModelFactory, open_head: Any, arch: str) -> None:
    m = model(arch, head="hidden")
    head = open_head(m)
    tokens = [m.text(1)[0]]
    while len(tokens) < 40:
        tokens.append(int(m.follow[tokens[-1]]))
    after = [int(m.follow[t]) for t in tokens]
    _, hidden = head.rows(0, tokens)

    logits, states = head.rows(1, tokens[1:], hidden[:-1], pos=1)
    assert logits.argmax(axis=1).tolist() == after[1:]
    # The head's own rows lead on: draft steps two and three.
    for _ in range(2):
        tokens, after = after, [int(m.follow[t]) for t in after]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(head.contexts[1]), True)
        logits, states = head.rows(1, tokens[1:], states, pos=1)
        assert logits.argmax(axis=1).tolist() == after[1:]
    # A row too late or too early gives nothing.
    for shift in (1, -1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(head.contexts[1]), True)
        logits, _ = head.rows(1, tokens[1:], np.roll(hidden[:-1], shift, axis=0), pos=1)
        assert (logits.argmax(axis=1) == after[1:]).sum() == 0


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("options", [{"head": None}, {"drop_head_tensors": True}], ids=str)
def test_headless_files_load_as_stock(
    model: ModelFactory, stock: StockFactory, arch: str, options: dict[str, Any]
) -> None:
    m = model(arch, **options)
    if arch == "qwen35" and "drop_head_tensors" in options:
        with pytest.raises(ValueError):  # the host itself insists on the declared tensors here
            stock(m)
        return
    prompt = m.text(5)
    text = greedy(stock(m), prompt, 20)
    assert text == [m.follow[t] for t in [prompt[-1], *text[:-1]]]


def test_expected_acceptance_follows_the_head(model: ModelFactory) -> None:
    m = model("hy_v3")
    text = [models.FIRST_WORD]
    while len(text) < 253:
        text.append(int(m.follow[text[-1]]))
    expected = models.expected_acceptance(m, [models.FIRST_WORD], text, 3)
    assert sum(sampled for _, sampled, _ in expected.rounds) == 252
    assert expected.accept_counts == {0, 1, 2, 3}
    assert expected.accepted_per_pos(3)[0] >= expected.accepted_per_pos(3)[1]
    assert expected.accepted == sum(expected.accepted_per_pos(3))
