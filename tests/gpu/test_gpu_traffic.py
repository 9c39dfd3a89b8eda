"""``tests/gpu/traffic.py``: counts of a run against what the engine says it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import traffic
from conftest import ModelFactory
from models.families import qwen3next

from llama_mtp import Llama, host
from llama_mtp.measure.pairs import generate


@pytest.mark.parametrize("arch", ["mimo2", "qwen35"])
def test_counts_are_those_of_the_engine(
    arch: str, model: ModelFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes follow from rows: 4 for each value of a hidden row, each logit and each pick."""
    out = tmp_path / "traffic.json"
    path = str(model(arch).path)
    options = ["--depth", "2", "--tokens", "40", "--threads", "1", "--json", str(out)]
    assert traffic.main([path, *options]) == 0
    found = json.loads(out.read_text())
    with Llama(path, spec_type="none", n_ctx=512, verbose=False) as plain:
        n_vocab, n_embd = plain.n_vocab(), plain.n_embd()

    calls, rows = found["calls"], found["rows"]
    assert found["num_emitted_tokens"] == 39, "the first token is sampled from the prompt's rows"
    assert calls["decode target"] == found["num_target_decodes"] == found["num_rounds"]
    assert calls["decode draft"] == found["num_draft_decodes"] == 2 * found["num_rounds"]
    assert found["waits"] == calls["decode target"] + calls["decode draft"]
    drafted = found["spec_decode_num_draft_tokens_total"]
    assert rows["target"] == found["num_rounds"] + drafted
    assert found["up"] == {"hidden rows": 4 * n_embd * rows["draft"]}
    # mimo2's head gathers: it publishes the rows of its outputs alone, one a decode.
    published = calls["decode draft"] if arch == "mimo2" else rows["draft"]
    assert found["down"] == {
        "hidden rows": 4 * n_embd * (rows["target"] + published),
        "logits": 4 * n_vocab * rows["target"],
        "picks": 4 * drafted,
    }
    assert calls["sampler_sample"] == found["num_emitted_tokens"]
    said = capsys.readouterr().out
    assert "waits for the device" in said and "target decode" in said


def test_copies_of_a_recurrent_state_are_counted(tmp_path: Path) -> None:
    """qwen3next is rolled back by copies: one out a round, and one back where a draft was wrong."""
    path = str(qwen3next.build(tmp_path, 1, 1).path)
    options: dict[str, Any] = {"spec_type": "draft-mtp", "spec_adaptive": False, "verbose": False}
    with traffic.counted() as of, Llama(path, **options) as llama:
        counts = of(llama)
        generate(llama, [5, 6, 7], 30)
        size = host.C.llama_state_seq_get_size_ext(llama._ctx.ctx, 0, 1)
        found = counts.as_dict()
    assert found["calls"]["state_seq_get_data_ext"] > 0
    assert found["down"]["recurrent state"] == size * found["calls"]["state_seq_get_data_ext"]
    loaded = found["calls"].get("state_seq_set_data_ext", 0)
    assert found["up"].get("recurrent state", 0) == size * loaded


def test_counting_ends_with_the_block(model: ModelFactory) -> None:
    original = host.address_table
    with traffic.counted() as of:
        assert host.address_table is not original
    assert host.address_table is original
    with Llama(str(model("mimo2").path), spec_type="draft-mtp", verbose=False) as llama:
        counts = of(llama)
        generate(llama, [5, 6, 7], 8)
    assert counts.as_dict() == {"waits": 0, "calls": {}, "rows": {}, "up": {}, "down": {}}
