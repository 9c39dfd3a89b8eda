"""What the page beside this file says of the host is so: each fault is shown, in its own process.

A release of the host that mends one fails here; then what stands in its way can go.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models.families import common, deepseek4, glm4moe, hy_v3, step35
from models.families.common import Tensors

HERE = Path(__file__).parents[1]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=HERE
    )


def draft(path: Path) -> subprocess.CompletedProcess[str]:
    """Let the stock host draft with a file's head."""
    return run(HERE / "hostile" / "make_draft.py", path)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("hidden_rows", ["96 of 96 rows wrong, after a new plan 0"]),
        ("emptied_cache", ["last position before: 3", "last position after: -1"]),
        ("third_head", ["masked=False: off by 0.0", "masked=True: off by 3."]),
    ],
)
def test_the_scripts_show_what_they_say(script: str, says: list[str]) -> None:
    done = run(HERE / "host_issues" / f"{script}.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(text in done.stdout for text in says), done.stdout


def test_deepseek4_keys_as_wide_as_the_indexer_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepseek4, "HEAD_DIM", deepseek4.INDEXER_WIDTH)
    assert draft(deepseek4.build(tmp_path, 1, 1).path).returncode < 0


def test_a_glm4moe_head_with_mrope_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, arch: str, keys: dict[str, Any], tensors: Tensors) -> None:
        common.write(path, arch, {**keys, "rope.dimension_sections": [2, 1, 1, 0]}, tensors)

    monkeypatch.setattr(glm4moe, "write", write)
    assert draft(glm4moe.build(tmp_path, 1, 1).path).returncode < 0


@pytest.mark.parametrize("family", [step35, hy_v3], ids=lambda m: m.ARCH)
def test_a_head_without_half_of_its_experts_ends_the_process(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, arch: str, keys: dict[str, Any], tensors: Tensors) -> None:
        head = max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
        del tensors[f"blk.{head}.ffn_up_exps.weight"]
        common.write(path, arch, keys, tensors)

    assert draft(family.build(tmp_path, 1, 1).path).returncode == 0  # as it is, it drafts
    monkeypatch.setattr(family, "write", write)
    assert draft(family.build(tmp_path, 1, 1).path).returncode < 0
