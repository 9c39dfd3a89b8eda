"""DeepSeek V4: four streams in a hidden row, and a memory that compresses what leaves the window.

What every family has to do is in `test_families`; here is what this memory has alone: compressors
with a state of their own (blocks of 4 and of 128 tokens), snapshots of it, and the host's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import models
import numpy as np
import numpy.typing as npt
import pytest
from conftest import COMMON, StockFactory, _factory
from llama_cpp import llama_cpp_ext as X
from models.families import deepseek4, deepseek32, glm_dsa, mla
from models.families.common import Files
from sampling import GREEDY, SAMPLED

from llama_mtp import Llama, host
from llama_mtp.errors import ModelFileError, SpecTypeError
from llama_mtp.heads.check import check_head
from llama_mtp.measure.identity import check_identity, fresh_text, text

WIDTH = deepseek4.N_STREAMS * deepseek4.N_EMBD

Factory = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return deepseek4.build(tmp_path_factory.mktemp("deepseek4"), 1, 1)


@pytest.fixture
def ours() -> Iterator[Factory]:
    yield from _factory(Llama, spec_adaptive=False)


def words(n: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(models.FIRST_WORD, models.N_VOCAB, n)]


def hidden_rows(llama: Any, n: int) -> npt.NDArray[np.float32]:
    """Return the hidden rows of the target's last decode, float32 (n, 4 streams)."""
    table = X.llama_get_embeddings_nextn(llama._ctx.ctx)
    return np.ctypeslib.as_array(table, shape=(n, WIDTH)).copy()


def logits(llama: Any) -> npt.NDArray[np.float32]:
    return host.logits_row(llama._ctx, -1, llama._n_vocab)


@pytest.mark.parametrize("n_ubatch", [512, 64, 16])
@pytest.mark.parametrize("every_row", [True, False], ids=["all-outputs", "last-output"])
def test_the_hidden_rows_of_a_batch_are_those_of_single_tokens(
    files: Files, ours: Factory, n_ubatch: int, every_row: bool
) -> None:
    """The host's plan of its buffers, older than our wish for the rows, would overwrite them."""
    batch = ours(files, n_batch=512, n_ubatch=n_ubatch, logits_all=every_row)
    batch.eval(words(70))
    rows = hidden_rows(batch, 70)
    single = ours(files)
    for token, row in zip(words(70), rows, strict=True):
        single.eval([token])
        expected = hidden_rows(single, 1)[0]
        # The host's own rounding reaches 0.1 here; a row that was overwritten is off by 10.
        assert np.abs(row - expected).max() < 0.5
        assert np.ptp(expected) > 3


@pytest.mark.parametrize("n_ubatch", [10, 13, 16])
def test_a_state_older_than_the_last_micro_batch_is_not_believed(
    files: Files, ours: Factory, n_ubatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host says that it went back, and the compressor's state is another one."""
    monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", "0")
    options = {"n_batch": 64, "n_ubatch": n_ubatch, "spec_draft_n_max": 8}
    fast, fresh = ours(files, **options), ours(files, **options)
    branch = words(40, 5)
    for n in (n_ubatch + 1, 2 * n_ubatch + 1, 2 * n_ubatch + 3):
        for back in range(1, 9):
            fast.reset()
            fast.eval(words(n))
            text(fast, [*words(n - back), *branch], 1, **GREEDY)
            fresh.reset()
            fresh.eval([*words(n - back), *branch])
            # 0.3 and more where a state is stale.
            assert np.abs(logits(fast) - logits(fresh)).max() < 0.1, (n, back)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_across_blocks_of_128(
    files: Files, stock: StockFactory, ours: Factory, sampling: dict[str, Any]
) -> None:
    options = {"n_ctx": 1024, "n_batch": 100, "n_ubatch": 50}
    report = check_identity(
        stock(files, **options), ours(files, **options), words(110), 700, 3, **sampling
    )
    assert report.n_tokens == 700
    assert report.illegal == []
    assert len(report.divergences) <= 5


@pytest.mark.parametrize("end", [126, 127, 128, 129, 130, 255, 256, 257])
def test_every_number_of_accepted_drafts_at_the_edge_of_a_block(
    files: Files, stock: StockFactory, ours: Factory, end: int
) -> None:
    plain, fast = stock(files), ours(files)
    prompt = words(end - 2, 1)
    truth = fresh_text(plain, prompt, 60, **GREEDY)
    for accepted in range(4):
        stream = fast.generate(prompt, **GREEDY)
        emitted = [next(stream)]
        while len(emitted) < 40:
            proposed = truth[len(emitted) :][:3]
            if accepted < 3:
                proposed[accepted] = models.FIRST_WORD + (proposed[accepted] + 1) % models.N_WORDS
            emitted.append(stream.send(proposed))
            emitted += islice(stream, accepted)
        assert emitted == truth[: len(emitted)]
        stream.close()  # books the last round
        stats = fast.spec_stats.last
        assert stats.num_accepted_tokens == accepted * math.ceil(39 / (accepted + 1))


def test_a_changed_last_turn_starts_from_a_checkpoint(
    files: Files, stock: StockFactory, ours: Factory
) -> None:
    """The partial state that the host writes is window and compressors; the blocks stay."""
    options = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64}
    plain, fast = stock(files, **options), ours(files, **options)
    turns = words(150, 1)
    text(fast, turns, 20, **SAMPLED)
    for seed in range(2, 6):
        again = [*turns, *words(30, seed)]
        got = text(fast, again, 60, **SAMPLED)
        assert got == fresh_text(plain, again, 60, **SAMPLED)
        edited = [*turns, *words(45, seed + 10)]
        assert text(fast, edited, 60, **SAMPLED) == fresh_text(plain, edited, 60, **SAMPLED)
        turns = [*again, *got]
    assert fast._session.counters()["n_checkpoints_restored"] >= 4


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_saved_state_holds_blocks_and_compressors(
    files: Files, stock: StockFactory, ours: Factory, n: int
) -> None:
    plain, fast = stock(files), ours(files)
    prompt = words(254, 7)
    truth = fresh_text(plain, prompt, 80, **SAMPLED)
    fast.set_seed(1)
    begun = list(islice(fast.generate(prompt, **SAMPLED), n))
    assert begun == truth[:n]
    state = fast.save_state()
    text(fast, words(200, 8), 30, **SAMPLED)
    fast.load_state(state)
    rest = [*prompt, *begun, *words(3, 9)]
    assert text(fast, rest, 60, **SAMPLED) == fresh_text(plain, rest, 60, **SAMPLED)


def test_a_head_in_its_own_file_drafts_as_in_the_model(
    files: Files, ours: Factory, tmp_path: Any
) -> None:
    """llama.cpp's conversion writes the head of this family apart."""
    apart = deepseek4.build_apart(tmp_path, 1)
    whole, two = ours(files), ours(apart, spec_draft_model=str(apart.draft))
    for sampling in (GREEDY, SAMPLED):
        assert text(two, words(60), 150, **sampling) == text(whole, words(60), 150, **sampling)
    assert two.spec_stats.num_accepted_per_pos == whole.spec_stats.num_accepted_per_pos
    assert two.spec_stats.num_accepted_tokens > 0


def test_keys_as_wide_as_the_indexer_are_refused(
    stock: StockFactory, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's draft context would die of a division by zero; its target does not."""
    monkeypatch.setattr(deepseek4, "HEAD_DIM", deepseek4.INDEXER_WIDTH)
    equal = deepseek4.build(tmp_path, 1, 1)
    with pytest.raises(SpecTypeError, match="both 64 wide"):
        Llama(str(equal.path), spec_type="draft-mtp", **COMMON)
    with Llama(str(equal.path), **COMMON) as plain:
        assert plain.spec_type == "none"
        assert text(plain, words(9), 20, **GREEDY) == text(stock(equal), words(9), 20, **GREEDY)


@pytest.mark.parametrize("family", [deepseek32, glm_dsa, deepseek4], ids=lambda m: m.ARCH)
def test_an_indexer_that_the_host_cannot_rotate_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, family: Any
) -> None:
    for width, runs in ((64, True), (128, True), (32, False), (96, False)):
        monkeypatch.setattr(mla, "INDEXER_WIDTH", width)
        monkeypatch.setattr(deepseek4, "INDEXER_WIDTH", width)
        path = family.build(tmp_path, 1, 1).path
        if runs:
            assert check_head(path).executable
            with Llama(str(path), spec_type="draft-mtp", **COMMON) as llama:
                assert len(text(llama, words(9), 20, **GREEDY)) == 20
        else:
            with pytest.raises(ModelFileError, match=f"an indexer that is {width} wide"):
                Llama(str(path), **COMMON)
