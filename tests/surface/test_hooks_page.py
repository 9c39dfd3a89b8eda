"""hooks/README.md lists exactly the hooks that there are, and its example runs as it stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ModelFactory

import llama_mtp
from llama_mtp import hooks, registry
from llama_mtp.hooks import records, specs

PAGE = (Path(__file__).parents[2] / "hooks" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    registry.reset()
    yield
    registry.reset()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_lists_every_hook_with_its_parameters_in_firing_order() -> None:
    marked = [
        f"{name}({', '.join(inspect.signature(member).parameters)})"
        for name, member in vars(specs).items()
        if hasattr(member, f"{hooks.NAMESPACE}_spec")
    ]
    assert re.findall(r"^\| `(mtp_.+?)` \|", PAGE, re.MULTILINE) == marked


def test_the_page_names_every_record() -> None:
    frozen = [
        name
        for name in hooks.__all__
        if hasattr(getattr(records, name, None), "__dataclass_fields__")
    ]
    assert len(frozen) == 5
    assert all(f"`{name}`" in PAGE for name in frozen)


def test_the_example_runs_as_it_stands(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed by hand: its module, and its entry points as the page's pyproject.toml has them."""
    (source,), (project,) = blocks("python"), blocks("toml")
    (tmp_path / "my_lookup.py").write_text(source)
    info = tmp_path / "example-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1\n")
    entry_points = project.replace("[project.entry-points.llama_mtp]", "[llama_mtp]")
    (info / "entry_points.txt").write_text(entry_points.replace('"', ""))
    monkeypatch.syspath_prepend(str(tmp_path))

    m = model("hy_v3", head=None)
    options = {"spec_adaptive": False, "n_ctx": 256, "n_threads": 1, "verbose": False}
    with llama_mtp.Llama(str(m.path), spec_type="repeat-last", **options) as llm:
        tokens = llm.generate(m.text(10), temp=0.0)
        assert [next(tokens) for _ in range(8)]
        tokens.close()
        assert llm.spec_type == "repeat-last"
        assert llm.spec_stats.num_draft_tokens > 0
    assert registry.broken_plugins() == {}
