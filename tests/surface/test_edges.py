"""Small sizes, the end of the context, bad files, bad arguments: the right result or exception."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import models
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY, SAMPLED

from llama_mtp import ClosedError, Llama, ModelFileError, SpecTypeError
from llama_mtp.measure.identity import fresh_text, text

# ---- sizes


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n_batch", [1, 2, 3, 4, 5, 8, 16])
def test_tiny_batches(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, n_batch: int
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m, n_batch=n_batch), ours(m, n_batch=n_batch)
    for n_prompt in (1, n_batch, n_batch + 1, 4 * n_batch + 1):
        prompt = m.text(n_prompt, n_prompt)
        assert text(fast, prompt, 40, **SAMPLED) == fresh_text(plain, prompt, 40, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n_batch, n_ubatch", [(32, 1), (32, 2), (32, 4), (32, 5), (32, 6)])
def test_tiny_ubatches(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    n_batch: int,
    n_ubatch: int,
) -> None:
    m = model(arch, state_scale=1.0)
    sizes = {"n_batch": n_batch, "n_ubatch": n_ubatch}
    plain, fast = stock(m, **sizes), ours(m, **sizes)
    prompt = m.text(50)
    assert text(fast, prompt, 40, **SAMPLED) == fresh_text(plain, prompt, 40, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("n_ctx", [16, 17, 32, 256])
def test_to_the_end_of_the_context(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, n_ctx: int
) -> None:
    m = model(arch, state_scale=0.6)
    for depth in (1, 3, 5):
        plain, fast = stock(m, n_ctx=n_ctx), ours(m, n_ctx=n_ctx, spec_draft_n_max=depth)
        prompt = m.text(5)
        for _ in range(2):
            expected = to_the_end(plain, prompt)
            assert to_the_end(fast, prompt) == expected
        # Usable afterwards.
        assert text(fast, prompt, 5, **SAMPLED) == fresh_text(plain, prompt, 5, **SAMPLED)


def to_the_end(llama: Any, prompt: Sequence[int]) -> tuple[list[int], type[BaseException] | None]:
    llama.reset()
    llama._ctx.kv_cache_clear()
    llama.set_seed(1)
    emitted: list[int] = []
    try:
        for token in llama.generate(prompt, **SAMPLED):
            emitted.append(token)
            assert len(emitted) < 5000
    except Exception as e:
        return emitted, type(e)
    return emitted, None


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_completion_to_the_end_of_the_context(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch)
    plain, fast = stock(m, n_ctx=64), ours(m, n_ctx=64)
    prompt = m.text(20)
    expected = plain.create_completion(prompt, max_tokens=None, seed=2)
    got = fast.create_completion(prompt, max_tokens=None, seed=2)
    assert got["choices"] == expected["choices"]
    assert got["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_prompt_too_long(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch)
    plain, fast = stock(m, n_ctx=256), ours(m, n_ctx=256)
    for call in ("create_completion", "generate"):
        kinds = []
        for llama in (plain, fast):
            with pytest.raises(Exception) as caught:
                outcome = getattr(llama, call)(m.text(300))
                next(outcome)
            kinds.append(caught.type)
        assert kinds[0] is kinds[1]
    prompt = m.text(10)
    assert text(fast, prompt, 20, **SAMPLED) == fresh_text(plain, prompt, 20, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("depth", [0, 1, 64])
def test_depth_none_one_and_most(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, depth: int
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m, spec_draft_n_max=depth)
    prompt = m.text(20)
    assert text(fast, prompt, 60, **SAMPLED) == fresh_text(plain, prompt, 60, **SAMPLED)
    if depth == 0:
        assert fast.spec_stats.num_draft_tokens == 0


def test_no_depth_is_beyond_what_a_batch_carries(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("hy_v3")
    fast = ours(m, spec_draft_n_max=4, n_batch=3)
    assert fast.spec_depth == 2  # what a batch of three rows carries
    with pytest.raises(ValueError):
        fast.spec_depth = -1
    fast = ours(m, spec_draft_n_max=2)
    with pytest.raises(ValueError):
        fast.spec_depth = 3


# ---- files


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("options", [{"head": None}, {"drop_head_tensors": True}], ids=str)
def test_no_executable_head(
    model: ModelFactory, stock: StockFactory, arch: str, options: dict[str, Any]
) -> None:
    m = model(arch, **options)
    for spec_type in ("draft-mtp", "mtp"):
        with pytest.raises((SpecTypeError, ModelFileError), match=r"(?i)nextn|head"):
            Llama(str(m.path), spec_type=spec_type, **COMMON)
    try:
        plain = stock(m)
    except ValueError as e:
        with pytest.raises(type(e)):
            Llama(str(m.path), **COMMON)
        return
    with Llama(str(m.path), **COMMON) as auto:
        assert auto.spec_type == "none"
        prompt = m.text(20)
        assert text(auto, prompt, 40, **SAMPLED) == fresh_text(plain, prompt, 40, **SAMPLED)


@pytest.mark.parametrize("spec_type", ["auto", "draft-mtp"])
def test_not_a_gguf(tmp_path: Path, spec_type: str) -> None:
    for name, content in {
        "empty.gguf": b"",
        "text.gguf": b"this is no model\n" * 100,
        "magic.gguf": b"GGUF",
        "lies.gguf": b"GGUF\x03\0\0\0" + b"\xff" * 64,
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=name):
            Llama(str(path), spec_type=spec_type, **COMMON)


@pytest.mark.parametrize("spec_type", ["auto", "draft-mtp"])
def test_truncated_gguf(model: ModelFactory, tmp_path: Path, spec_type: str) -> None:
    whole = model("qwen35").path.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (10, 100, 1000, 6000, 12000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            Llama(str(path), spec_type=spec_type, **COMMON)


def test_missing_file(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError) as stock_says:
        llama_cpp.Llama(path, **COMMON)
    for spec_type in ("auto", "draft-mtp", "none"):
        with pytest.raises(ValueError) as we_say:
            Llama(path, spec_type=spec_type, **COMMON)
        assert str(we_say.value) == str(stock_says.value)


# ---- arguments


def test_unknown_spec_type(model: ModelFactory) -> None:
    path = str(model("hy_v3").path)
    with pytest.raises(SpecTypeError, match="draft-mtp"):
        Llama(path, spec_type="draft-mpt", **COMMON)
    with pytest.raises(SpecTypeError):
        Llama(path, spec_type="something else", **COMMON)


def test_draft_model_with_spec_type(model: ModelFactory) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    path = str(model("hy_v3").path)
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=2)
    with pytest.raises(SpecTypeError, match="draft_model"):
        Llama(path, spec_type="draft-mtp", draft_model=lookup, **COMMON)
    with Llama(path, draft_model=lookup, **COMMON) as auto:  # the stock feature, unchanged
        assert auto.spec_type == "none"
        assert len(text(auto, model("hy_v3").text(10), 10, **GREEDY)) == 10


# ---- lifetime


def test_close_twice_and_with(model: ModelFactory) -> None:
    m = model("qwen35")
    with Llama(str(m.path), spec_type="mtp", **COMMON) as llama:
        stream = llama.generate(m.text(10), **GREEDY)
        list(islice(stream, 6))
    llama.close()
    llama.close()
    with pytest.raises(ClosedError):
        next(stream)
    with pytest.raises(ClosedError):
        text(llama, m.text(10), 1)


def test_dropped_without_close(model: ModelFactory) -> None:
    m = model("qwen35")
    for _ in range(3):
        llama = Llama(str(m.path), spec_type="mtp", **COMMON)
        stream = llama.generate(m.text(10), **GREEDY)
        list(islice(stream, 6))
        del llama, stream
        gc.collect()
    one, two = (Llama(str(m.path), spec_type="mtp", **COMMON) for _ in range(2))
    one.close()
    assert len(text(two, m.text(10), 20, **GREEDY)) == 20  # the other object is untouched
    two.close()


def test_logits_all_and_logprobs(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3", state_scale=1.0)
    plain, fast = stock(m, logits_all=True), ours(m, logits_all=True)
    expected = plain.create_completion("hello", max_tokens=30, logprobs=3, temperature=0.0)
    got = fast.create_completion("hello", max_tokens=30, logprobs=3, temperature=0.0)
    assert got["choices"][0]["text"] == expected["choices"][0]["text"]
    ours_p = got["choices"][0]["logprobs"]["token_logprobs"]
    assert ours_p == pytest.approx(expected["choices"][0]["logprobs"]["token_logprobs"], abs=1e-3)


def test_more_rows_than_made_for(model: ModelFactory, ours: LlamaFactory) -> None:
    """The host would abort the process."""
    m = model("hy_v3")
    fast = ours(m)
    fast._logits_all = True
    fast.reset()
    with pytest.raises(ValueError, match="logits_all"):
        fast.eval(m.text(20))
    fast._logits_all = False
    assert len(text(fast, m.text(20), 10, **GREEDY)) == 10
