"""A head in a file of its own: ``spec_draft_model``; and heads whose graph nobody has run."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import models
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory

from llama_mtp import Llama
from llama_mtp.errors import ModelFileError, SpecTypeError
from llama_mtp.heads import architectures
from llama_mtp.heads import check as inspect

CASES = [("qwen35", 1), ("hy_v3", 1), ("hy_v3", 3), ("mimo2", 1), ("mimo2", 3)]


@pytest.mark.parametrize("head", ["embedding", "hidden"])
@pytest.mark.parametrize(("arch", "n_heads"), CASES)
def test_a_head_in_its_own_file_drafts_as_in_the_model(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    n_heads: int,
    head: str,
) -> None:
    whole = model(arch, head=head, n_heads=n_heads)
    trunk = model(arch, head=None)
    alone = model(arch, head=head, n_heads=n_heads, head_only=True)
    prompt = whole.text(30)
    fast = ours(trunk, spec_draft_model=str(alone.path))
    emitted = list(islice(fast.generate(prompt, temp=0.0), 150))
    assert emitted == list(islice(stock(trunk).generate(prompt, temp=0.0), 150))
    expected = models.expected_acceptance(whole, prompt, emitted, fast.spec_depth)
    stats = fast.spec_stats
    assert stats.num_accepted_tokens == expected.accepted > 0
    assert stats.num_draft_tokens == expected.drafted


def test_a_draft_model_is_enough_to_insist(model: ModelFactory) -> None:
    """No spec type is needed, and what cannot be honoured raises."""
    trunk, alone = model("hy_v3", head=None), model("hy_v3", head_only=True)
    with Llama(str(trunk.path), spec_draft_model=str(alone.path), **COMMON) as llm:
        assert llm.spec_type == "draft-mtp"
    with pytest.raises(SpecTypeError, match="embedding=True"):
        Llama(str(trunk.path), spec_draft_model=str(alone.path), embedding=True, **COMMON)
    with pytest.raises(SpecTypeError, match="leave one of the two out"):
        Llama(str(trunk.path), spec_type="none", spec_draft_model=str(alone.path), **COMMON)
    with pytest.raises(ModelFileError, match="No such file"):
        Llama(str(trunk.path), spec_draft_model=str(alone.path) + "x", **COMMON)


def test_a_head_file_alone_says_what_it_belongs_to(model: ModelFactory) -> None:
    alone = model("mimo2", head_only=True)
    with pytest.raises(SpecTypeError, match="pass this file as spec_draft_model"):
        Llama(str(alone.path), spec_type="draft-mtp", **COMMON)


def test_a_head_of_another_architecture_is_refused(model: ModelFactory) -> None:
    trunk, alone = model("hy_v3", head=None), model("mimo2", head_only=True)
    with pytest.raises(SpecTypeError, match="belongs to a mimo2 model, and this one is hy_v3"):
        Llama(str(trunk.path), spec_draft_model=str(alone.path), **COMMON)


def _with_one_byte_changed(path: Path, old: bytes, new: bytes, folder: Path) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    changed = folder / "changed.gguf"
    changed.write_bytes(data.replace(old, new))
    return changed


def test_a_head_with_one_other_word_is_refused(model: ModelFactory, tmp_path: Path) -> None:
    """Equal numbers of tokens are not enough."""
    trunk, alone = model("hy_v3", head=None), model("hy_v3", head_only=True)
    word = (2).to_bytes(8, "little") + b"bo"
    other = (2).to_bytes(8, "little") + b"bw"
    changed = _with_one_byte_changed(alone.path, word, other, tmp_path)
    with pytest.raises(SpecTypeError, match=r"differ at token \d+ \('bo' and 'bw'\)"):
        Llama(str(trunk.path), spec_draft_model=str(changed), **COMMON)


def test_a_head_of_another_width_is_refused(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, alone = model("hy_v3", head=None), model("hy_v3", head_only=True)
    key = b"hy_v3.embedding_length" + (4).to_bytes(4, "little")
    width, other = (64).to_bytes(4, "little"), (96).to_bytes(4, "little")
    changed = _with_one_byte_changed(alone.path, key + width, key + other, tmp_path)
    with pytest.raises(SpecTypeError, match="hidden rows of 96 floats, and the model has 64"):
        Llama(str(trunk.path), spec_draft_model=str(changed), **COMMON)


def test_a_pickled_object_brings_its_draft_model(model: ModelFactory, ours: LlamaFactory) -> None:
    trunk, alone = model("hy_v3", head=None), model("hy_v3", head_only=True)
    fast = ours(trunk, spec_draft_model=str(alone.path))
    again = pickle.loads(pickle.dumps(fast))
    try:
        prompt = trunk.text(9)
        assert again.spec_type == "draft-mtp"
        assert list(islice(again.generate(prompt, temp=0.0), 40)) == list(
            islice(fast.generate(prompt, temp=0.0), 40)
        )
    finally:
        again.close()


@pytest.mark.parametrize("order", ["draft first", "garbage"])
def test_any_order_of_closing_is_safe(model: ModelFactory, order: str) -> None:
    trunk, alone = model("mimo2", head=None), model("mimo2", head_only=True)
    llm = Llama(str(trunk.path), spec_draft_model=str(alone.path), **COMMON)
    list(islice(llm.generate(trunk.text(9), temp=0.0), 10))
    draft = llm._session.draft_context  # type: ignore[union-attr]
    if order == "draft first":
        draft.close()
        llm.close()
    else:
        del llm
        draft.close()


@pytest.mark.parametrize("head", ["embedding", "hidden"])
@pytest.mark.parametrize("arch", ["hy_v3", "mimo2"])
def test_an_untested_architecture_drafts_right_whatever_its_graph_publishes(
    model: ModelFactory,
    stock: StockFactory,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    head: str,
) -> None:
    """One of these graphs hands out rows of outputs only, the other all: it need not be known."""
    m = model(arch, head=head)
    known = {k: v for k, v in architectures.ARCHITECTURES.items() if k != arch}
    monkeypatch.setattr(inspect, "ARCHITECTURES", known)
    with pytest.raises(SpecTypeError, match="set LLAMA_MTP_ALLOW_UNTESTED=1"):
        Llama(str(m.path), spec_type="draft-mtp", **COMMON)
    monkeypatch.setenv("LLAMA_MTP_ALLOW_UNTESTED", "1")
    options: dict[str, Any] = {**COMMON, "spec_adaptive": False}
    prompt = m.text(30)
    with Llama(str(m.path), **options) as fast:
        emitted = list(islice(fast.generate(prompt, temp=0.0), 120))
        accepted = fast.spec_stats.num_accepted_tokens
    assert emitted == list(islice(stock(m).generate(prompt, temp=0.0), 120))
    assert accepted == models.expected_acceptance(m, prompt, emitted, 3).accepted > 0
