"""The pages are true: links lead somewhere, names are the code's, figures those of the results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mtp.heads.architectures import ARCHITECTURES, NOT_EXECUTABLE
from llama_mtp.settings import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("examples", "hooks", "native", "plugin", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]


def section(title: str) -> str:
    """The README from a heading to the next."""
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def anchors(page: Path) -> set[str]:
    """What a link into this page can name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target, _, anchor in (("".join(link)).partition("#") for link in links):
        to = page.parent / target if target else page
        assert to.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(to), f"{page}: {target}#{anchor}"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ending = "&& .venv/bin/pytest"
    assert sum(line.endswith(ending) for line in README.splitlines()) == 1
    assert "grep -E '&& \\.venv/bin/pytest$' README.md" in (ROOT / ".ci/run").read_text()


def test_the_readme_names_every_family_that_runs_and_every_one_that_cannot() -> None:
    run, cannot = section("Which models work").split("These run:")[1].split("These declare")
    assert set(re.findall(r"`(.+?)`", run)) == set(ARCHITECTURES)
    assert set(re.findall(r"`(.+?)`", cannot)) == set(NOT_EXECUTABLE)


def test_the_heads_page_has_a_row_for_every_family() -> None:
    page = (ROOT / "plugin" / "llama_mtp" / "heads" / "README.md").read_text(encoding="utf-8")
    table = page.split("## Which families work\n", 1)[1]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == set(ARCHITECTURES)
    assert all(f"`{name}`" in table for name in NOT_EXECUTABLE)


def test_the_readme_has_every_option_with_its_variable() -> None:
    rows = re.findall(r"^\| `(spec_\w+)` \|.*?\| `(\w+)` \|", section("Options"), re.MULTILINE)
    assert rows == [(o.keyword, o.variable) for o in OPTIONS.values() if o.keyword]
    assert all(f"`{option.variable}`" in section("Options") for option in OPTIONS.values())


def test_the_trees_list_what_is_there() -> None:
    package, native = ROOT / "plugin" / "llama_mtp", ROOT / "native" / "src"
    tree = (package / "README.md").read_text(encoding="utf-8").split("```")[1]
    named = {word.rstrip("/") for word in re.findall(r"[\w]+(?:\.py|/)", tree)} - {"hf"}
    modules = [*package.glob("[!_]*.py"), *package.glob("engine/[!_]*.py")]
    rooms = [file.parent for file in package.glob("*/__init__.py")]
    assert named == {path.name for path in (*modules, *rooms)}
    text = (ROOT / "native" / "README.md").read_text(encoding="utf-8")
    for file in native.rglob("*.*pp"):
        name = file.relative_to(native.parent).with_suffix("")
        assert f"{name}.*" in text or f"{name}{file.suffix}" in text, name


def test_figures_and_the_readme_say_what_the_results_say() -> None:
    """Rendered in a process of its own: the figures programs are no package."""
    code = (
        "import page, sys; sys.stdout.write(page.figures() + '\\0' + page.readme(sys.stdin.read()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests" / "bench" / "figures",
        input=README,
        capture_output=True,
        encoding="utf-8",
        check=True,
        env={"PYTHONIOENCODING": "utf-8"},
    )
    figures, readme = done.stdout.split("\0")
    again = "Run: python tests/bench/figures/make.py --render"
    assert figures == (ROOT / "tests/bench/FIGURES.md").read_text(encoding="utf-8"), again
    assert readme == README, again
