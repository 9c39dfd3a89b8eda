"""The pages are true: links lead somewhere, names are the code's, figures those of the results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mtp.heads.architectures import ARCHITECTURES, NOT_EXECUTABLE

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


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ending = "&& .venv/bin/pytest"
    assert sum(line.endswith(ending) for line in README.splitlines()) == 1
    assert "grep -E '&& \\.venv/bin/pytest$' README.md" in (ROOT / ".ci/run").read_text()


def test_the_readme_names_every_family_that_runs_and_every_one_that_cannot() -> None:
    run, cannot = section("Which models work").split("These run:")[1].split("These declare")
    assert set(re.findall(r"`(.+?)`", run)) == set(ARCHITECTURES)
    assert set(re.findall(r"`(.+?)`", cannot)) == set(NOT_EXECUTABLE)


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
