"""Attaching to the host: what is compared first, and what the draft context follows."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import llama_cpp
import pytest
from conftest import LlamaFactory, ModelFactory

import llama_mtp.engine.native as engine
from llama_mtp import HostVersionError, Llama, NativeError, _version, host

FOLLOWED = ("n_batch", "n_ubatch", "n_threads", "n_threads_batch", "flash_attn_type")
FOLLOWED += ("offload_kqv", "op_offload", "swa_full", "rope_freq_base", "rope_freq_scale")


def test_a_stale_native_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_version, "__version__", "0.0.1")
    try:
        with pytest.raises(NativeError, match=r"reinstall llama-mtp"):
            importlib.reload(engine)
    finally:
        monkeypatch.undo()
        importlib.reload(engine)


def test_another_struct_layout_is_refused(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = host.batch_layout()
    monkeypatch.setattr(host, "batch_layout", lambda: {**layout, "pos": layout["pos"] + 8})
    with pytest.raises(HostVersionError, match="llama_batch"):
        Llama(str(model("qwen35").path), spec_type="draft-mtp", verbose=False)


def test_a_host_without_a_function_is_refused_or_left_as_stock(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(names: list[str]) -> dict[str, int]:
        raise HostVersionError("The host library has no llama_decode; install another.")

    monkeypatch.setattr(host, "address_table", missing)
    path = str(model("qwen35").path)
    with pytest.raises(HostVersionError):
        Llama(path, spec_type="draft-mtp", verbose=False)
    with Llama(path, verbose=False) as llm:
        assert llm.spec_type == "none"
        assert next(llm.generate([300, 301], temp=0.0)) > 0


@pytest.mark.parametrize("flash_attn", [False, True])
def test_the_draft_context_follows_the_host(
    model: ModelFactory, ours: LlamaFactory, contexts: list[SimpleNamespace], flash_attn: bool
) -> None:
    llm = ours(
        model("qwen35"),
        n_ctx=768,
        n_batch=96,
        n_ubatch=48,
        n_threads=1,
        n_threads_batch=2,
        flash_attn=flash_attn,
        offload_kqv=False,
        rope_freq_base=20000.0,
    )
    draft = contexts[-1]
    mine, target = draft.params, llm.context_params
    for name in FOLLOWED:
        assert getattr(mine, name) == getattr(target, name), name
    assert mine.n_ctx == llm.n_ctx()
    assert mine.n_rs_seq == 0 and mine.n_outputs_max == 1
    assert target.n_rs_seq == 3 and target.n_outputs_max == 4
    assert draft.model is llm._model


def test_both_thread_counts_default_to_the_same(model: ModelFactory) -> None:
    with Llama(str(model("hy_v3").path), spec_type="draft-mtp", verbose=False) as llm:
        assert llm.n_threads == llm.n_threads_batch
    with Llama(str(model("hy_v3").path), spec_type="none", verbose=False) as llm:
        plain = llama_cpp.Llama(str(model("hy_v3").path), verbose=False)
        assert (llm.n_threads, llm.n_threads_batch) == (plain.n_threads, plain.n_threads_batch)
        plain.close()
