"""Attaching to the host: what is compared first, and what the draft context follows."""

from __future__ import annotations

import importlib
import os
from typing import Any

import llama_cpp
import pytest
from conftest import LlamaFactory, ModelFactory

import llama_mtp.engine.native as engine
from llama_mtp import HostVersionError, Llama, NativeError, _version, host

FOLLOWED = ("n_batch", "n_ubatch", "n_threads", "n_threads_batch", "flash_attn_type", "type_k")
FOLLOWED += ("offload_kqv", "op_offload", "swa_full", "rope_freq_base", "rope_freq_scale", "type_v")


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The model and the parameters of each context that the host is asked for, in order."""
    made: list[tuple[Any, Any]] = []
    init = host.C.llama_init_from_model

    def asked(model: Any, params: Any) -> Any:
        made.append((model, type(params).from_buffer_copy(params)))
        return init(model, params)

    monkeypatch.setattr(host.C, "llama_init_from_model", asked)
    return made


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
        plain = llama_cpp.Llama(path, verbose=False)
        tokens = [next(x.generate([300, 301], temp=0.0)) for x in (llm, plain)]
        assert tokens[0] == tokens[1]
        plain.close()


@pytest.mark.parametrize("flash_attn", [False, True])
def test_the_draft_context_follows_the_host(
    model: ModelFactory, ours: LlamaFactory, contexts: list[tuple[Any, Any]], flash_attn: bool
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
    (model_of_target, target), (model_of_draft, draft) = contexts
    assert model_of_draft == model_of_target  # no tensor is loaded twice
    for name in FOLLOWED:
        assert getattr(draft, name) == getattr(target, name), name
    assert draft.n_ctx == llm.n_ctx()
    assert draft.n_rs_seq == 0 and draft.n_outputs_max == 1
    assert target.n_rs_seq == 3 and target.n_outputs_max == 4


def test_both_thread_counts_default_to_all_cores_and_to_the_hosts_without_drafts(
    model: ModelFactory,
) -> None:
    with Llama(str(model("hy_v3").path), spec_type="draft-mtp", verbose=False) as llm:
        assert llm.n_threads == llm.n_threads_batch == os.cpu_count()
    with Llama(str(model("hy_v3").path), spec_type="none", verbose=False) as llm:
        plain = llama_cpp.Llama(str(model("hy_v3").path), verbose=False)
        assert (llm.n_threads, llm.n_threads_batch) == (plain.n_threads, plain.n_threads_batch)
        plain.close()


@pytest.mark.parametrize(
    ("version", "new_enough"),
    [
        *(("0.3.36", True), ("0.3.36rc1", True), ("0.3.36+cu124", True), ("0.3.36.post1", True)),
        *(("0.4.0.dev2", True), ("1.0", True), ("0.3.35", False), ("0.3.35.post9", False)),
        ("0.3.9", False),
    ],
)
def test_versions_of_the_host(
    monkeypatch: pytest.MonkeyPatch, version: str, new_enough: bool
) -> None:
    monkeypatch.setattr(host._package, "__version__", version)
    if new_enough:
        host.check_version()
        return
    with pytest.raises(HostVersionError, match=f"llama-cpp-python {version} cannot"):
        host.check_version()
