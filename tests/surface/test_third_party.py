"""A plugin package of someone else: built as a wheel, installed, found by entry point, and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import FIRST_WORD, build

SOURCE = Path(__file__).parents[1] / "third_party"

# Runs in a process of its own, because this one must not see the installed plugin.
USE = """
import json, sys
from llama_cpp import Llama as Stock
from llama_mtp import Llama, registry

path, prompt, n = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
arguments = dict(n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)


def tokens(llm, **sampling):
    generated = []
    for token in llm.generate(prompt, **sampling):
        generated.append(token)
        if len(generated) == n:
            return generated


answer = {"broken": registry.broken_plugins()}
samplings = {
    "greedy": dict(temp=0.0),
    "sampled": dict(temp=0.8, top_k=20, top_p=0.95, min_p=0.02),
}
for name, sampling in samplings.items():
    stock = Stock(path, seed=7, **arguments)
    answer["stock", name] = tokens(stock, **sampling)
    stock.close()
    # The depth is constant so that what is accepted does not hang on the machine's speed.
    constant = dict(spec_type="prompt-lookup", spec_adaptive=False)
    with Llama(path, seed=7, **constant, **arguments) as llm:
        answer["ours", name] = tokens(llm, **sampling)
        answer["spec_type"] = llm.spec_type
        answer["accepted", name] = llm.spec_stats.num_accepted_tokens
        answer["drafted", name] = llm.spec_stats.num_draft_tokens
print(json.dumps({"/".join(k) if isinstance(k, tuple) else k: v for k, v in answer.items()}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from its wheel, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(SOURCE, folder / "source")  # setuptools builds inside the source tree
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, target = folder / "wheels", folder / "site"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, *build, str(folder / "source")], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def test_a_source_of_drafts_takes_at_most_40_lines() -> None:
    lines = [line for path in SOURCE.glob("**/*.py") for line in path.read_text().splitlines()]
    assert 0 < len(lines) <= 40


def run(installed: Path, *arguments: str) -> Any:
    paths = [str(installed), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_installed_package_is_found_by_its_entry_point(installed: Path) -> None:
    code = (
        "import json; from llama_mtp import registry; print(json.dumps([*registry.spec_types()]))"
    )
    assert run(installed, "-c", code) == ["draft-mtp", "mtp", "prompt-lookup"]


@pytest.mark.parametrize("arch", ["hy_v3", "qwen35"])
def test_its_drafts_are_accepted_and_the_tokens_are_those_of_stock(
    installed: Path, tmp_path: Path, arch: str
) -> None:
    """On an attention-only and on a hybrid trunk, neither of which has a head to draft with.

    The text depends on all that came before it, so that some drafts are wrong, and what a wrong
    rollback leaves behind would change it.
    """
    model = build(tmp_path / "model.gguf", arch, head=None, state_scale=1.0)
    prompt = [FIRST_WORD]
    while len(prompt) < 400:  # more than one turn of the cycle: there is something to look up
        prompt.append(int(model.follow[prompt[-1]]))
    n = 200
    answer = run(installed, "-c", USE, str(model.path), json.dumps(prompt), str(n))
    assert answer["broken"] == {}
    assert answer["spec_type"] == "prompt-lookup"
    for sampling in ("greedy", "sampled"):
        assert len(answer[f"stock/{sampling}"]) == n
        assert answer[f"ours/{sampling}"] == answer[f"stock/{sampling}"]
        assert answer[f"drafted/{sampling}"] > answer[f"accepted/{sampling}"] > n // 10
