"""Constructed models, built once per test session, and stock objects to compare with."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import llama_cpp
import models
import pytest
from llama_cpp import _internals

if TYPE_CHECKING:
    from models.hf import Oracle

ModelFactory = Callable[..., models.Model]
StockFactory = Callable[..., Any]
LlamaFactory = Callable[..., Any]

# One thread: the models are tiny, and tests that use two threads should have them.
# A cache in single precision: in half precision the host itself may round a row of a batch
# otherwise than the same row alone, and tests that compare whole texts want no exceptions.
COMMON: dict[str, Any] = {
    "n_ctx": 512,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": 0,
    "type_v": 0,
    "verbose": False,
}


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Let SIGINT interrupt the tests and their children, who inherit it where it is ignored.

    A shell ignores it for its background jobs, and Python then leaves it ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Return ``model(arch, **options)``; a file is written once for the same options."""
    folder = tmp_path_factory.mktemp("models")
    built: dict[str, models.Model] = {}

    def get(arch: str, **options: Any) -> models.Model:
        key = "-".join([arch, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if key not in built:
            built[key] = models.build(folder / f"{key}.gguf", arch, **options)
        return built[key]

    return get


@pytest.fixture
def stock() -> Iterator[StockFactory]:
    """Return ``stock(model, **options)``, a ``llama_cpp.Llama`` closed after the test."""
    yield from _factory(llama_cpp.Llama)


@pytest.fixture
def ours() -> Iterator[LlamaFactory]:
    """Return ``ours(model, **options)``: drafts with the head, at constant depth 3 unless told."""
    from llama_mtp import Llama

    yield from _factory(Llama, spec_type="draft-mtp", spec_adaptive=False)


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the host makes contexts of from here on: each its ``model`` and ``params``."""
    made: list[SimpleNamespace] = []
    init = _internals.LlamaContext.__init__

    def watched(context: Any, **options: Any) -> None:
        init(context, **options)
        made.append(SimpleNamespace(**options))

    monkeypatch.setattr(_internals.LlamaContext, "__init__", watched)
    return made


def _factory(cls: Any, **defaults: Any) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(model: models.Model, **options: Any) -> Any:
        llama = cls(str(model.path), **{**COMMON, **defaults, **options})
        made.append(llama)
        return llama

    yield make
    for llama in made:
        llama.close()


@pytest.fixture
def pair(model: ModelFactory, tmp_path: Path) -> tuple[models.Model, Path]:
    """Return a hybrid model with a head, and its trunk in a file of its own."""
    from llama_mtp.heads.split import strip

    m = model("qwen35")
    return m, strip(m.path, tmp_path / "trunk.gguf")


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Oracle]:
    """Return ``oracle(arch, n_heads)``: a constructed model whose head is an HF checkpoint, too."""
    from models.hf import Oracle

    built: dict[tuple[str, int], Oracle] = {}

    def get(arch: str, n_heads: int = 1) -> Oracle:
        if (arch, n_heads) not in built:
            folder = tmp_path_factory.mktemp("oracle") / arch
            built[arch, n_heads] = Oracle(arch, folder, n_heads)
        return built[arch, n_heads]

    return get
