"""The parts of an object are freed in any order, by hand or by the garbage collector."""

from __future__ import annotations

import gc
import itertools
import random
from itertools import islice
from typing import Any

import models
import pytest
from conftest import COMMON, ModelFactory
from sampling import SAMPLED

from llama_mtp import ClosedError, Llama

KINDS = ("llama", "session", "context", "model", "draft", "stream", "completion")


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_collected_in_any_order(model: ModelFactory, arch: str) -> None:
    m = model(arch)
    orders = list(itertools.permutations(KINDS))
    for order in random.Random(3).sample(orders, 12):
        fast = Llama(str(m.path), spec_type="mtp", spec_adaptive=False, **COMMON)
        held: dict[str, Any] = {
            "llama": fast,
            "session": fast._session,
            "context": fast._ctx,
            "model": fast._model,
            "draft": fast._session._draft,
            "stream": fast.generate(m.text(10), **SAMPLED),
            "completion": fast.create_completion("hello", max_tokens=20, stream=True),
        }
        list(islice(held["stream"], 3))
        next(held["completion"])
        del fast
        for kind in order:
            held.pop(kind)
            gc.collect()


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_collected_as_one_cycle(model: ModelFactory, arch: str) -> None:
    """The collector's own order, with the parts in any order in the cycle."""
    m = model(arch)
    for seed in range(6):
        fast = Llama(str(m.path), spec_type="mtp", spec_adaptive=False, **COMMON)
        stream = fast.generate(m.text(10), **SAMPLED)
        list(islice(stream, 3))
        parts = [fast, fast._session, fast._ctx, fast._model, fast._session._draft, stream]
        random.Random(seed).shuffle(parts)
        cycle: list[Any] = [*parts]
        cycle.append(cycle)
        fast._self = fast
        del fast, stream, parts, cycle
        gc.collect()


def test_parts_that_outlive_the_object(model: ModelFactory) -> None:
    """Freed under them: an exception, not a crash."""
    m = model("qwen35")
    fast = Llama(str(m.path), spec_type="mtp", **COMMON)
    session, context = fast._session, fast._ctx
    list(islice(fast.generate(m.text(10), **SAMPLED), 3))
    fast.close()
    del fast
    gc.collect()
    assert session.closed
    with pytest.raises(ClosedError):
        session.settle()
    session.close()
    context.close()
