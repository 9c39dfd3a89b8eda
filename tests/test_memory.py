"""The draft context adds its own KV cache and compute buffer, the target its snapshots, no more.

The sizes are the host's own words, read off its log while it makes the contexts.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import models
import pytest
from conftest import ModelFactory

from llama_mtp import Llama
from llama_mtp.host import BufferSizes

OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_batch": 256, "verbose": False, "seed": 1}
ROUNDING = 2**20 * 0.01  # the host prints hundredths of a MiB, one line per buffer


def stock_sizes(path: str) -> dict[str, int]:
    with BufferSizes() as sizes:
        llama_cpp.Llama(path, **OPTIONS).close()
    return sizes.bytes


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_target_grows_by_its_snapshots_only(model: ModelFactory, arch: str) -> None:
    m = model(arch)
    plain = stock_sizes(str(m.path))
    with Llama(str(m.path), spec_type="draft-mtp", spec_draft_n_max=3, **OPTIONS) as fast:
        ours = fast.spec_memory
    assert ours["target KV"] == pytest.approx(plain["KV"], abs=2 * ROUNDING)
    # Four outputs instead of n_ubatch: the compute buffer may only shrink.
    assert ours["target compute"] <= plain["compute"] + 2 * ROUNDING
    if arch == "qwen35":
        assert ours["target RS"] == pytest.approx((1 + 3) * plain["RS"], abs=4 * ROUNDING)
    else:
        assert "target RS" not in ours


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_draft_context_holds_one_layer(model: ModelFactory, arch: str) -> None:
    m = model(arch)
    with Llama(str(m.path), spec_type="draft-mtp", **OPTIONS) as fast:
        ours = fast.spec_memory
    one_layer = 1024 * models.N_HEAD * models.HEAD_DIM * 2 * 2  # K and V in half precision
    assert ours["draft KV"] == pytest.approx(one_layer, abs=2 * ROUNDING)
    assert set(ours) <= {
        *(f"target {part}" for part in ("KV", "RS", "compute", "output")),
        *(f"draft {part}" for part in ("KV", "compute", "output")),
    }


def test_the_draft_cache_has_types_of_its_own(model: ModelFactory) -> None:
    m = model("qwen35")
    with Llama(
        str(m.path),
        spec_type="draft-mtp",
        spec_draft_type_k=llama_cpp.GGML_TYPE_F32,
        spec_draft_type_v=llama_cpp.GGML_TYPE_F32,
        **OPTIONS,
    ) as fast:
        ours = fast.spec_memory
    assert ours["draft KV"] == pytest.approx(
        1024 * models.N_HEAD * models.HEAD_DIM * 2 * 4, abs=2 * ROUNDING
    )
