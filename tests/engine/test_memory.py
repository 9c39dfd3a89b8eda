"""The draft context adds its own KV cache and compute buffer, the target its snapshots, no more.

The sizes are the host's own words, read off its log while it makes the contexts.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import models
import pytest
from conftest import ModelFactory
from models import large

from llama_mtp import Llama, host
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
        ours = fast.spec_memory()
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
        ours = fast.spec_memory()
    one_layer = 1024 * models.N_HEAD * models.HEAD_DIM * 2 * 2  # K and V in half precision
    assert ours["draft KV"] == pytest.approx(one_layer, abs=2 * ROUNDING)
    assert set(ours) <= {
        *(f"target {part}" for part in ("KV", "RS", "compute", "output")),
        *(f"draft {part}" for part in ("KV", "compute", "output")),
        "hidden rows",
    }


def draft_ubatch(llm: Llama) -> int:
    assert llm._session is not None and llm._session.draft_context is not None
    return int(llama_cpp.llama_n_ubatch(llm._session.draft_context.ctx))


def test_the_draft_context_computes_few_rows_at_a_time(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("mimo2", head="hidden")
    options: dict[str, Any] = {**OPTIONS, "n_batch": 512, "n_ubatch": 512, "n_threads": 1}
    prompt = m.text(300)  # read in five parts; a wrong hidden row would show in what is accepted
    sizes, texts = {}, {}
    for n_ubatch in (512, host.DRAFT_UBATCH):
        monkeypatch.setattr(host, "DRAFT_UBATCH", n_ubatch)
        with Llama(str(m.path), spec_type="draft-mtp", spec_adaptive=False, **options) as fast:
            assert draft_ubatch(fast) == n_ubatch
            texts[n_ubatch] = list(islice(fast.generate(prompt, temp=0.0), 40))
            expected = models.expected_acceptance(m, prompt, texts[n_ubatch], 3)
            last = fast.spec_stats.last
            assert last is not None
            assert last.num_accepted_per_pos == expected.accepted_per_pos(3)
            sizes[n_ubatch] = fast.spec_memory()["draft compute"]
    few, many = sorted(sizes)
    assert texts[few] == texts[many]
    assert sizes[few] == pytest.approx(sizes[many] * few / many, abs=2 * ROUNDING)


@pytest.mark.parametrize(("bound", "n_ubatch"), [(3, 64), (62, 64), (64, 66)])
def test_a_round_of_drafts_is_computed_in_one_part(
    model: ModelFactory, bound: int, n_ubatch: int
) -> None:
    with Llama(
        str(model("hy_v3").path), spec_type="draft-mtp", spec_draft_n_max=bound, **OPTIONS
    ) as fast:
        assert draft_ubatch(fast) == n_ubatch


def test_the_draft_context_computes_no_more_rows_than_the_target(model: ModelFactory) -> None:
    with Llama(
        str(model("hy_v3").path), spec_type="draft-mtp", **{**OPTIONS, "n_ubatch": 16}
    ) as fast:
        assert draft_ubatch(fast) == 16


def test_the_draft_cache_has_types_of_its_own(model: ModelFactory) -> None:
    m = model("qwen35")
    with Llama(
        str(m.path),
        spec_type="draft-mtp",
        spec_draft_type_k=llama_cpp.GGML_TYPE_F32,
        spec_draft_type_v=llama_cpp.GGML_TYPE_F32,
        **OPTIONS,
    ) as fast:
        ours = fast.spec_memory()
    assert ours["draft KV"] == pytest.approx(
        1024 * models.N_HEAD * models.HEAD_DIM * 2 * 4, abs=2 * ROUNDING
    )


def test_parts_by_device_add_up_to_the_parts(model: ModelFactory) -> None:
    with Llama(str(model("qwen35").path), spec_type="draft-mtp", **OPTIONS) as fast:
        next(fast.generate(model("qwen35").text(100), temp=0.0))
        parts, devices = fast.spec_memory(), fast.spec_memory(by_device=True)
    assert {"draft KV on CPU", "target RS on CPU", "checkpoints on CPU"} <= set(devices)
    sums: dict[str, int] = {}
    for key, size in devices.items():
        part = key.partition(" on ")[0]
        sums[part] = sums.get(part, 0) + size
    assert sums == parts


def test_a_plain_object_has_none(model: ModelFactory) -> None:
    with Llama(str(model("qwen35").path), spec_type="none", **OPTIONS) as plain:
        assert plain.spec_memory() == {}


class AllSizes(BufferSizes):
    """Weights too."""

    _LINE = re.compile(r"(\S+) +(KV|RS|state|compute|output|model) +buffer size = +([0-9.]+) MiB")


class Trimmed(llama_cpp.Llama):
    """The stock class with as few output rows as a round of depth 3 needs, or as ours has."""

    rows = 4

    @property
    def context_params(self) -> Any:
        return self.__dict__["context_params"]

    @context_params.setter
    def context_params(self, params: Any) -> None:
        params.n_outputs_max = self.rows
        self.__dict__["context_params"] = params


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_with_a_large_vocabulary_mtp_takes_less_than_stock_and_hardly_more_than_a_trimmed_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arch: str,
) -> None:
    """248k tokens, n_ctx 4096, weights included. Against a trimmed host the draft context is added.

    Prints the totals.
    """
    small = models.build(tmp_path / "small.gguf", arch, head="hidden")
    path = str(large.write(tmp_path / "large.gguf", small))
    options: dict[str, Any] = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1}

    def sizes(cls: type[llama_cpp.Llama]) -> dict[str, int]:
        with AllSizes() as seen:
            cls(path, verbose=False, **options).close()
        return seen.bytes

    with monkeypatch.context() as patched:
        patched.setattr(host, "BufferSizes", AllSizes)
        with Llama(path, spec_type="draft-mtp", verbose=False, **options) as fast:
            ours, rows = fast.spec_memory(), fast.context_params.n_outputs_max
    stock, trimmed = (sum(sizes(cls).values()) for cls in (llama_cpp.Llama, Trimmed))
    total = sum(ours.values())
    with capsys.disabled():
        print(
            f"\n{arch}, {large.N_VOCAB} tokens, n_ctx 4096: stock {stock / 2**20:.1f} MiB, "
            f"with MTP {total / 2**20:.1f}, trimmed stock {trimmed / 2**20:.1f} "
            f"({total / trimmed - 1:+.1%})"
        )
    assert total < stock
    assert total < 1.1 * trimmed
    # Nothing but the draft context, the head's weights and the snapshots comes on top.
    monkeypatch.setattr(Trimmed, "rows", rows)
    alike = sizes(Trimmed)
    for part in ("KV", "compute", "output"):
        assert ours[f"target {part}"] == pytest.approx(alike[part], abs=2 * ROUNDING)
    draft = sum(size for part, size in ours.items() if part.startswith("draft "))
    head = ours["target model"] - alike["model"]
    snapshots = ours.get("target RS", 0) - alike.get("RS", 0)
    added = total - sum(alike.values())
    assert added == pytest.approx(draft + head + snapshots, abs=8 * ROUNDING)
