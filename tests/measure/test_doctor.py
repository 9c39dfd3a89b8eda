"""What ``llama-mtp doctor`` promises: the state of the installation, and one line about a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelFactory
from typer.testing import CliRunner

from llama_mtp import host
from llama_mtp._version import __version__
from llama_mtp.commands import main as cli
from llama_mtp.heads import split as splitting
from llama_mtp.measure import child, trial
from llama_mtp.measure.doctor import examine, findings
from llama_mtp.measure.trial import Judgement, Trial, judge

OPTIONS: dict[str, Any] = {
    "n_ctx": 512,
    "spec_draft_n_max": 3,
    "n_threads": 1,
    "n_threads_batch": 1,
    # In single precision rows of batches and of single tokens are the same bits.
    "type_k": 0,
    "type_v": 0,
}


def doctor(*args: object) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *map(str, args)])


# --- the installation -----------------------------------------------------------------------------


def test_names_versions_build_devices_and_functions() -> None:
    found = {finding.what: finding for finding in findings()}
    assert all(finding.ok for finding in found.values())
    assert found["llama-mtp"].detail == __version__
    assert found["llama-cpp-python"].detail == host.version()
    assert "CPU :" in found["host build"].detail
    assert "CPU: " in found["host devices"].detail
    assert "GiB free" in found["host devices"].detail
    assert found["host functions"].detail.startswith("all ")


def test_shows_the_environment_in_force_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_SPEC_DRAFT_N_MAX", "2")
    monkeypatch.setenv("LLAMA_MTP_BLOCK_PLUGINS", "x")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    done = doctor()
    assert done.exit_code == 0, done.output
    assert "LLAMA_ARG_SPEC_DRAFT_N_MAX=2" in done.output
    assert "LLAMA_MTP_BLOCK_PLUGINS=x" in done.output
    assert "secret" not in done.output


def test_a_function_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address_of = host.address_of

    def lacking(name: str) -> int:
        return address_of(name if name != "llama_decode" else "llama_decode_of_old")

    monkeypatch.setattr(host, "address_of", lacking)
    done = doctor("--json")
    assert done.exit_code == 1
    (bad,) = (line for line in json.loads(done.stdout)["findings"] if not line["ok"])
    assert bad["what"] == "host functions"
    assert "not found: llama_decode;" in bad["detail"]
    assert "install" in bad["detail"]


# --- judging --------------------------------------------------------------------------------------

GOOD = Trial(
    tokens=192,
    partings=(),
    illegal=0,
    drafted=200,
    accepted=150,
    acceptance=(0.9, 0.8, 0.7),
    plain_rate=10.0,
    mtp_rate=15.0,
    ratio=1.5,
    depth=2,
    reckoning="Depth 2",
    memory={},
    added_memory=0,
    on_gpu=False,
)


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        ({}, "on", "Turn MTP on here, at depth 2: 1.50 times as fast"),
        ({"ratio": 1.01}, "even", "no clear difference"),
        ({"ratio": 1.2, "depth": 0}, "even", "no clear difference"),
        ({"ratio": 0.8, "depth": 0}, "off", "cost more than they save: 0.80 times"),
        ({"ratio": 0.8}, "even", "0.80 times as fast"),  # one measurement contradicts the other
        ({"acceptance": (0.04, 0.5, 0.5), "accepted": 3}, "broken", "3 of 200 drafts agreed"),
        ({"acceptance": (0.0,), "accepted": 0, "ratio": 1.2}, "broken", "it is broken"),
        ({"partings": ("a", "b"), "illegal": 1}, "broken", "1 of 2 places"),
        ({"partings": ("a", "b")}, "on", "Turn MTP on"),
        ({"drafted": 0, "acceptance": ()}, "even", "Nothing was drafted"),
    ],
)
def test_the_advice_follows_the_numbers(change: dict[str, Any], verdict: str, says: str) -> None:
    said = judge(replace(GOOD, **change))
    assert said.verdict == verdict
    assert says in said.advice
    assert "\n" not in said.advice


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_broken_head_comes_with_things_to_try(on_gpu: bool) -> None:
    attempts = judge(replace(GOOD, acceptance=(0.01,), on_gpu=on_gpu)).attempts
    assert any("another GGUF" in text for text in attempts)
    assert any("llama-mtp graft" in text for text in attempts)
    assert any("--n-gpu-layers 0" in text and "27151" in text for text in attempts) == on_gpu


@pytest.mark.parametrize("ratio", [1.5, 1.0, 0.8])
def test_a_gpu_that_was_left_out_is_mentioned(ratio: float) -> None:
    """What was measured on the processor says nothing about the card beside it."""
    tried = replace(GOOD, ratio=ratio, depth=2 if ratio > 1 else 0)
    for can_offload, on_gpu in ((True, False), (True, True), (False, False)):
        said = judge(replace(tried, can_offload=can_offload, on_gpu=on_gpu))
        mentioned = any("--n-gpu-layers -1" in text for text in said.attempts)
        assert mentioned == (can_offload and not on_gpu)


@pytest.mark.parametrize("ratio", [1.5, 1.0, 0.8])
def test_cheaper_drafts_are_mentioned(ratio: float) -> None:
    tried = replace(GOOD, ratio=ratio, depth=2 if ratio > 1 else 0)
    said = judge(tried, "llama-mtp graft it")
    assert said.attempts == ("llama-mtp graft it: drafts then read less",)
    assert judge(tried).attempts == ()


def test_an_environment_that_no_model_would_load_with_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMA_ARG_SPEC_TYPE", "draft-mpt")
    done = doctor()
    assert done.exit_code == 1
    assert "There is no spec type 'draft-mpt'" in " ".join(done.output.split())


# --- trying a file --------------------------------------------------------------------------------


def test_a_good_head_drafts_the_same_tokens(model: ModelFactory) -> None:
    found = examine(str(model("qwen35", right=0.9).path), **OPTIONS)
    tried = found.trial
    assert tried is not None
    assert tried.tokens == 3 * trial.MAX_TOKENS
    assert tried.partings == ()
    assert tried.acceptance[0] > 0.6
    assert tried.accepted > tried.drafted / 2
    assert tried.memory["draft KV"] > 0
    assert tried.plain_rate > 0
    assert found.judgement == judge(tried, found.inspection.cheaper_command)
    assert found.judgement.verdict in ("on", "even", "off")  # it is a model of microseconds


def test_a_head_that_is_always_wrong_is_broken(model: ModelFactory) -> None:
    path = model("mimo2", right=0.0).path
    done = doctor(path, "--threads", 1, "--n-ctx", 512, "--max-tokens", 24)
    assert done.exit_code == 1
    assert "it is broken: 0 of" in done.output
    assert "Try: llama-mtp graft" in done.output


def test_a_file_without_a_head_is_not_tried(model: ModelFactory) -> None:
    path = model("qwen35", head=None).path
    done = doctor(path, "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert said["trial"] is None
    assert said["verdict"] == "impossible"
    assert "no NextN head" in said["advice"]
    assert said["attempts"] == [f"llama-mtp graft {path} HEAD.gguf -o JOINED.gguf"]


def test_a_dropped_head_is_not_tried(model: ModelFactory) -> None:
    done = doctor(model("mimo2", drop_head_tensors=True).path)
    assert done.exit_code == 1
    assert "lacks blk.2.nextn.eh_proj.weight" in done.output
    assert "Try: llama-mtp graft" in done.output


def test_a_head_in_a_file_of_its_own_is_tried(model: ModelFactory, tmp_path: Path) -> None:
    trunk, head = splitting.split(model("qwen35").path, tmp_path)
    found = examine(str(trunk), str(head), max_tokens=16, **OPTIONS)
    assert found.trial is not None, found.judgement
    assert found.trial.acceptance[0] > 0.5


def test_json_holds_all_of_it(model: ModelFactory) -> None:
    args = ("--json", "--threads", 1, "--n-ctx", 512, "--max-tokens", 16, "--depth", 2)
    done = doctor(model("hy_v3").path, *args)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert {line["what"] for line in said["findings"]} == {line.what for line in findings()}
    assert said["spec_types"]["draft-mtp"] is True
    assert said["broken_plugins"] == {}
    assert said["inspection"]["architecture"] == "hy_v3"
    assert said["trial"]["tokens"] == 48
    assert len(said["trial"]["acceptance"]) == 2
    assert said["verdict"] in ("on", "even", "off")
    assert said["advice"]


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    for name, data in (("zip.gguf", b"PK\x03\x04" + bytes(64)), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            examine(str(tmp_path / name), **OPTIONS)


DYING = """
import os, sys
sys.stderr.write("/build/ggml.c:7: GGML_ASSERT(a->ne[0] == b->ne[0]) failed\\n")
sys.stderr.flush()
os.abort()
"""


def test_a_host_that_dies_drafting_is_named(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ask = child.ask

    def dies(module: str, *args: Any, **options: Any) -> child.Reply:
        return ask("dying" if module == trial.__name__ else module, *args, **options)

    monkeypatch.setattr(child, "ask", dies)
    found = examine(str(model("qwen35").path), **OPTIONS)
    assert found.trial is None
    assert found.judgement == Judgement(
        "impossible",
        "Leave MTP off here: the host died of SIGABRT over it, last words: "
        "ggml.c:7: GGML_ASSERT(a->ne[0] == b->ne[0]) failed",
    )
