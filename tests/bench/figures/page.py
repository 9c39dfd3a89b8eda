"""FIGURES.md and the README's table, written from the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from entries import ENTRIES, MODELS, Entry, filled, models_of
from results import FOLDER, Result, Run, load

HEAD = """\
# Figures

This page is written by `python tests/bench/figures/make.py`. Each figure has its command, and the
date and machine of its own run; you can make any of them again on your machine. `make.py --list`
shows their names, `make.py --only NAME` runs one, and `make.py --quick` runs all on small sizes.
Tables come from the JSON that the programs write with `--json`; everything else is shown as it was
printed. *Stock* is llama-cpp-python without this package. Ranges in brackets are 95 % intervals
where there were six turns or more.

Results that were taken over from an earlier page have the command of their day. What was
`llama-mtp bench` then is `python tests/bench/instrument.py` now.
"""
CARRIED = "taken over from an earlier page"
BEGIN, END = "<!-- figures: written by tests/bench/figures/make.py -->", "<!-- end of figures -->"


def figures(folder: Path = FOLDER) -> str:
    """The whole page."""
    parts = [HEAD]
    for section, entries in groupby(ENTRIES, key=lambda entry: entry.section):
        parts.append(f"## {section}\n")
        parts += [_figure(entry, load(entry.name, folder)) for entry in entries]
    return "\n".join([*parts, _models()])


def readme(page: str, folder: Path = FOLDER) -> str:
    """The README with its table of figures as the results have it."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{_readme_table(folder)}\n\n{END}{after}"


def _figure(entry: Entry, result: Result | None) -> str:
    lines = [f"### {entry.title}\n", f"{entry.shows}\n"]
    if result is None:
        commands = [filled(command, entry.sizes) for command in entry.commands]
        return "\n".join([*lines, *_block(commands, "sh"), "\nNot measured yet.\n"])
    made = CARRIED if result.text else result.versions
    minutes = sum(run.seconds for run in result.runs) / 60
    took = f", {minutes:.0f} min" if minutes >= 1 else ""
    lines.append(f"`{entry.name}`: {result.date}, {result.machine}{took}; {made}.\n")
    if result.text:
        return "\n".join(
            [*lines, *_block([run.command for run in result.runs], "sh"), "", *result.text, ""]
        )
    for run in result.runs:
        lines += [*_block([run.command], "sh"), "", *_table(entry, run), ""]
    return "\n".join(lines)


def _table(entry: Entry, run: Run) -> list[str]:
    if run.data is None:
        return _block(run.output)
    return {"depths": _depths, "fresh": _fresh, "peers": _peers}[entry.table](run.data)


def _block(lines: Sequence[str], language: str = "") -> list[str]:
    return [f"```{language}", *lines, "```"]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _interval(numbers: Sequence[float], digits: int = 3) -> str:
    """``1.262 [1.240, 1.306]``, or the number alone."""
    first, *rest = (f"{number:.{digits}f}" for number in numbers)
    return f"{first} [{', '.join(rest)}]" if rest else first


def _row_name(row: str) -> str:
    return f"constant depth {row}" if row.isdecimal() else row


def _depths(data: Mapping[str, Any]) -> list[str]:
    speed = [
        [temp, _row_name(row), *(f"{x:.2f}" for x in numbers), _interval(data["mean"][temp][row])]
        for temp, rows in data["speed"].items()
        for row, numbers in rows.items()
    ]
    rounds = [
        [temp, _row_name(row), f"{tokens:.2f}", f"{first:.0%}", *(f"{us:.0f}" for us in times)]
        for temp, rows in data["rounds"].items()
        for row, (tokens, first, *times) in rows.items()
    ]
    prompt = data["prompt"]
    columns = (
        "tokens a round",
        "first drafts accepted",
        "native",
        "host's removal of rows",
        "Python",
    )
    return [
        *_markdown(["T", "speed over stock", *data["classes"], "geometric mean"], speed),
        "",
        "Medians over the classes; the last three columns are microseconds of a round outside",
        "decodes and samplers.",
        "",
        *_markdown(["T", "depth", *columns], rounds),
        "",
        f"To the first token of a prompt of {prompt['tokens']} tokens: "
        f"{_interval(prompt['first_token'])} of stock's time. The draft's own reading, after that "
        f"token, takes {prompt['read_by_draft']:.1%} of it.",
    ]


def _fresh(data: Mapping[str, Any]) -> list[str]:
    names = ("first", "second", "third")
    rows = [[name, _interval(pair)] for name, pair in zip(names, data["generations"], strict=False)]
    return _markdown(["generation", "speed over a new stock object"], rows)


def _peers(data: Mapping[str, Any]) -> list[str]:
    kinds = list(dict.fromkeys(kind for those in data.values() for kind in those))
    rows = [
        [pair, *(_interval(those[kind]) if kind in those else "" for kind in kinds)]
        for pair, those in data.items()
    ]
    return _markdown(["ours over", *kinds], rows)


def _models() -> str:
    used = {
        model for entry in ENTRIES for command in entry.commands for model in models_of(command)
    }
    commands = [filled(made.command, {}) for name, made in MODELS.items() if name in used]
    return "\n".join(
        [
            "## The models\n",
            "`make.py` makes these files when a figure needs them, some 13 GB in all.\n",
            *_block(commands, "sh"),
            "",
        ]
    )


# --- the README --------------------------------------------------------------------------------

# What the table says, the result that has it, and where it stands there.
_ROWS: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("a head that is right for 9 of 10 words", "hybrid", lambda d: _of_class(d, "code_cpp")),
    ("right for 6 of 10", "hybrid", lambda d: _of_class(d, "translation")),
    ("right for 2 of 10", "hybrid", lambda d: _of_class(d, "stepwise_math")),
    (
        "never right, in the first text of a new object",
        "wrong-head",
        lambda d: d["generations"][0][0],
    ),
    (
        "the demo, whose drafts cost a fifth of a token each",
        "demo-large",
        lambda d: d["mean"]["0"]["adaptive"][0],
    ),
)


def _of_class(data: Mapping[str, Any], name: str) -> float:
    return float(data["speed"]["0"]["adaptive"][data["classes"].index(name)])


def _readme_table(folder: Path) -> str:
    rows = []
    for what, name, number in _ROWS:
        result = load(name, folder)
        if result is not None:
            rows.append([what, f"{number(result.runs[0].data):.2f}"])
    head = ["a model of 1 GB (BF16) on two CPU cores, greedy", "tokens per second, stock = 1"]
    return "\n".join(_markdown(head, rows))
