"""What stands beside MTP in the host: adapters, embeddings, cache types, rope, images."""

from __future__ import annotations

import ctypes
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import llama_cpp
import models
import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from sampling import GREEDY, SAMPLED

from llama_mtp import Llama, SpecTypeError
from llama_mtp.host import DRAFT_UBATCH
from llama_mtp.measure.identity import check_identity, clear, fresh_text, text

F16, Q8_0, BF16 = 1, 8, 30  # enum ggml_type
YARN = 2  # enum llama_rope_scaling_type


# ---- what makes no text


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_embeddings_are_the_stock_object_and_refuse_to_draft(
    model: ModelFactory, stock: StockFactory, arch: str
) -> None:
    m = model(arch)
    with pytest.raises(SpecTypeError, match="embedding"):
        Llama(str(m.path), spec_type="draft-mtp", embedding=True, **COMMON)
    plain = stock(m, embedding=True)
    with Llama(str(m.path), embedding=True, **COMMON) as auto:
        assert auto.spec_type == "none"
        for texts in ("hello", ["hello", "you there"]):
            assert auto.create_embedding(texts) == plain.create_embedding(texts)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_vocabulary_alone_is_the_stock_object_and_refuses_to_draft(
    model: ModelFactory, stock: StockFactory, arch: str
) -> None:
    m = model(arch)
    with pytest.raises(SpecTypeError, match="vocab_only"):
        Llama(str(m.path), spec_type="draft-mtp", vocab_only=True, **COMMON)
    plain = stock(m, vocab_only=True)
    with Llama(str(m.path), vocab_only=True, **COMMON) as auto:
        assert auto.spec_type == "none"
        assert auto.tokenize(b"hello you") == plain.tokenize(b"hello you")


# ---- adapters


def write_lora(path: Path, m: models.Model, scale: float = 0.5, rank: int = 4) -> Path:
    """Write an adapter to the feed-forward networks of the trunk: enough to change the text."""
    rng = np.random.default_rng(3)
    w = gguf.GGUFWriter(path, m.arch)
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", float(rank))
    for il in range(4 if m.arch == "qwen35" else 2):
        down = rng.normal(0, scale, (models.N_EMBD, rank))
        down[:2] = 0  # the constant dimension stays constant
        for side, matrix in ("a", rng.normal(0, 0.2, (rank, models.N_FF))), ("b", down):
            w.add_tensor(f"blk.{il}.ffn_down.weight.lora_{side}", matrix.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_lora_changes_the_text_as_in_stock(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, tmp_path: Path, arch: str
) -> None:
    m = model(arch)
    prompt = m.text(20)
    without = fresh_text(stock(m), prompt, 60, **GREEDY)
    for lora_scale in (1.0, 0.5):
        lora = {"lora_path": str(write_lora(tmp_path / "lora.gguf", m)), "lora_scale": lora_scale}
        plain, fast = stock(m, **lora), ours(m, **lora)
        expected = fresh_text(plain, prompt, 60, **GREEDY)
        assert expected != without
        assert text(fast, prompt, 60, **GREEDY) == expected
        assert text(fast, prompt, 60, **SAMPLED) == fresh_text(plain, prompt, 60, **SAMPLED)
        assert fast.spec_stats.num_accepted_tokens > 0
        fast.close()  # the adapter goes before its model


# ---- parameters of the context, and what of them the draft context takes on

ROPE = {
    "rope_freq_base": 5000.0,
    "rope_freq_scale": 0.5,
}
YARN_ALL = {
    **ROPE,
    "rope_scaling_type": YARN,
    "yarn_ext_factor": 0.9,
    "yarn_attn_factor": 1.1,
    "yarn_beta_fast": 30.0,
    "yarn_beta_slow": 2.0,
    "yarn_orig_ctx": 128,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "cache f16": {"type_k": F16, "type_v": F16},
    "cache bf16": {"type_k": BF16, "type_v": BF16},
    "cache q8_0 keys": {"type_k": Q8_0, "type_v": F16},
    "cache q8_0": {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True},
    "flash attention": {"flash_attn": True},
    "no offload": {"offload_kqv": False, "op_offload": False},
    "offload": {"offload_kqv": True, "op_offload": True},
    "small window cache": {"swa_full": False},
    "full window cache": {"swa_full": True},
    "rope": ROPE,
    "yarn": YARN_ALL,
    "split by layer": {"n_gpu_layers": -1, "split_mode": 1, "tensor_split": [1.0]},
    "one device": {"n_gpu_layers": 1, "split_mode": 0, "main_gpu": 0},
}
FOLLOWED = (
    "n_batch",
    "type_k",
    "type_v",
    "n_threads",
    "n_threads_batch",
    "offload_kqv",
    "op_offload",
    "flash_attn_type",
    "swa_full",
    "rope_scaling_type",
    *YARN_ALL,
)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_reach_both_contexts(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    contexts: list[SimpleNamespace],
    arch: str,
    name: str,
) -> None:
    m = model(arch, state_scale=0.6)
    parameters = PARAMETERS[name]
    plain, fast = stock(m, **parameters), ours(m, **parameters)
    draft = contexts[-1].params
    for field in FOLLOWED:
        assert getattr(draft, field) == getattr(plain.context_params, field), field
    assert draft.n_ubatch == min(plain.context_params.n_ubatch, DRAFT_UBATCH)
    prompt = m.text(30)
    for sampling in (GREEDY, SAMPLED):
        # 90 tokens go beyond the sliding window.
        report = check_identity(plain, fast, prompt, 90, quiet=True, **sampling)
        assert not report.illegal, report.illegal
    assert fast.spec_stats.num_accepted_tokens > 0


@pytest.mark.parametrize("types", [(F16, F16), (Q8_0, Q8_0), (BF16, F16)])
def test_the_draft_cache_has_types_of_its_own(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    contexts: list[SimpleNamespace],
    types: tuple[int, int],
) -> None:
    m = model("hy_v3", state_scale=1.0)
    own = {"spec_draft_type_k": types[0], "spec_draft_type_v": types[1]}
    plain, fast = stock(m, flash_attn=True), ours(m, flash_attn=True, **own)
    draft = contexts[-1].params
    assert (draft.type_k, draft.type_v) == types
    prompt = m.text(30)
    assert text(fast, prompt, 60, **SAMPLED) == fresh_text(plain, prompt, 60, **SAMPLED)


@pytest.mark.parametrize("arch", ["qwen35", "hy_v3"])
def test_rope_changes_the_text_as_in_stock(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """That the parameters above are not simply ignored by both."""
    m = model(arch, state_scale=1.0)
    prompt = m.text(40)
    unchanged = fresh_text(stock(m), prompt, 60, **GREEDY)
    for parameters in (ROPE, YARN_ALL):
        changed = fresh_text(stock(m, **parameters), prompt, 60, **GREEDY)
        assert changed != unchanged
        assert text(ours(m, **parameters), prompt, 60, **GREEDY) == changed


# ---- images


def show_image(llama: Any, rows: int, columns: int, seed: int = 7) -> None:
    """Evaluate an image as the host's chat handlers do: embeddings, without telling the object.

    ``MTMDChatHandler`` lets libmtmd decode into the context and then sets ``n_tokens``. Where the
    positions are M-RoPE, an image takes fewer of them than it has rows.
    """
    n, at = rows * columns, llama.n_tokens
    width = llama_cpp.llama_model_n_embd(llama.model)
    rows_in = np.random.default_rng(seed).normal(0, 1, (n, width)).astype(np.float32)
    i = np.arange(n, dtype=np.int32)
    if llama.metadata["general.architecture"] == "qwen35":
        positions = np.stack([0 * i, i // columns, i % columns, 0 * i]) + at
        positions[3] = 0
        end = at + max(rows, columns)
    else:
        positions, end = i + at, at + n
    positions = np.ascontiguousarray(positions, dtype=np.int32)
    int_p, sequence = ctypes.POINTER(ctypes.c_int32), (ctypes.c_int32 * 1)(0)
    batch = llama_cpp.llama_batch(
        n_tokens=n,
        embd=rows_in.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=positions.ctypes.data_as(int_p),
        n_seq_id=ctypes.cast((ctypes.c_int32 * n)(*[1] * n), int_p),
        seq_id=ctypes.cast((int_p * n)(*[sequence] * n), ctypes.POINTER(int_p)),
        logits=ctypes.cast((ctypes.c_int8 * n)(), ctypes.POINTER(ctypes.c_int8)),
    )
    assert llama_cpp.llama_decode(llama._ctx.ctx, batch) == 0
    llama.n_tokens = end


def show(llama: Any, *parts: list[int] | tuple[int, int]) -> list[int]:
    """Clear the object, show it texts and images, and return the prompt that a handler passes."""
    clear(llama)
    for part in parts:
        if isinstance(part, tuple):
            show_image(llama, *part)
        else:
            llama.eval(part)
    prompt: list[int] = llama.input_ids[: llama.n_tokens].tolist()
    return prompt


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("options", [{"state_scale": 1.0}, {"head": "hidden"}], ids=str)
def test_text_after_an_image_drafts_again(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    options: dict[str, Any],
) -> None:
    m = model(arch, **options)
    plain, fast = stock(m), ours(m)
    before, after = m.text(12), m.text(9, 2)
    for parts in (
        (before, (4, 6), after),
        (before, (4, 6), after, (3, 2), m.text(5, 3)),
        ((4, 6), after),  # a gap in front of everything
        (before, (2, 2), after[:1]),
    ):
        for sampling in (GREEDY, SAMPLED):
            texts = []
            for llama in (plain, fast):
                texts.append(text(llama, show(llama, *parts), 50, **sampling))
            assert texts[1] == texts[0]
            stats = fast.spec_stats.last
            assert stats.num_accepted_tokens > 0
            if "head" in options:  # right whenever it gets the right hidden row
                assert stats.num_accepted_tokens > 0.5 * stats.num_draft_tokens
    # A completion, as the handler makes one; then a plain text on the same object.
    expected, got = (
        llama.create_completion(
            show(llama, before, (4, 6), after), max_tokens=40, temperature=0.8, seed=3
        )
        for llama in (plain, fast)
    )
    assert got["choices"] == expected["choices"]
    assert text(fast, before, 40, **SAMPLED) == fresh_text(plain, before, 40, **SAMPLED)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("leave", [1, 2, 3, 5, 8])
def test_leaving_the_text_after_an_image_and_going_on(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, leave: int
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    parts = (m.text(12), (4, 6), m.text(9, 2))
    truth = text(plain, show(plain, *parts), 40, **GREEDY)
    prompt = show(fast, *parts)
    assert list(islice(fast.generate(prompt, **GREEDY), leave)) == truth[:leave]
    # The next turn of the same conversation. Stock gets it as it read the last one: at once.
    more = [*truth[: leave - 1], *m.text(4, 5)]
    expected = text(plain, show(plain, *parts[:2], [*parts[2], *more]), 40, **GREEDY)
    assert text(fast, [*prompt, *more], 40, **GREEDY) == expected
    assert fast.spec_stats.last.num_accepted_tokens > 0


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_positions_of_an_image_match_no_prompt(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """Stock leaves in them the tokens of the text that stood there before: a prompt that has these
    would go on from the image."""
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    earlier = m.text(60)
    truth = fresh_text(plain, earlier, 40, **GREEDY)
    assert text(fast, earlier, 40, **GREEDY) == truth
    show(fast, earlier[:12], (4, 6), earlier[36:45])
    assert text(fast, earlier, 40, **GREEDY) == truth
    prompt = show(fast, earlier[:12], (4, 6), earlier[36:45])
    assert min(prompt) < 0 <= max(prompt)
    state = fast.save_state()
    assert text(fast, earlier, 40, **GREEDY) == truth
    fast.load_state(state)
    assert text(fast, earlier, 40, **GREEDY) == truth


# ---- sizes that the host rounds up


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_text_beyond_a_context_that_was_padded(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """The host makes 256 positions of 100; the object keeps the ids of the first 100."""
    m = model(arch, state_scale=0.6)
    plain, fast = stock(m, n_ctx=100), ours(m, n_ctx=100)
    prompt = m.text(20)
    truth = fresh_text(plain, prompt, 150, **GREEDY)
    for _ in range(2):
        assert text(fast, prompt, 150, **GREEDY) == truth
    for n in (60, 79):  # more than 100 tokens of prompt are refused by stock
        longer = [*prompt, *truth[:n]]
        assert text(fast, longer, 120, **GREEDY) == fresh_text(plain, longer, 120, **GREEDY)
