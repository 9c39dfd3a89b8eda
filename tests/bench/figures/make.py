"""Measure the figures of tests/bench/FIGURES.md, and write that page.

    python tests/bench/figures/make.py                          # everything: some hours
    python tests/bench/figures/make.py --only identity,samplers
    python tests/bench/figures/make.py --quick                  # small sizes, in a folder apart
    python tests/bench/figures/make.py --render                 # the page alone
    python tests/bench/figures/make.py --list

Each figure is an entry of entries.py. Its result is written to results/NAME.json as soon as it is
there, and replaces an older one; then FIGURES.md, the table in README.md and the picture are
written from all results. Nothing else should run on the machine. With --quick results and page go
to build/figures-quick: the numbers mean nothing, but every program has run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import page
import results
from entries import ENTRIES, MODELS, Entry, filled, folder_of, models_of

PROGRAMS = {
    "python": [sys.executable],
    "pytest": [sys.executable, "-m", "pytest"],
    "llama-mtp": [sys.executable, "-m", "llama_mtp"],
}
# What is printed becomes a part of the page: no colours, and as wide as a page.
PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
READERS = {"depths": results.depths, "fresh": results.fresh, "peers": results.peers}


class Failed(Exception):
    """A command did not end well."""


class Maker:
    """Runs commands in the repository's root and keeps the models that they need."""

    def __init__(self, *, quick: bool) -> None:
        self._quick = quick

    def result(self, entry: Entry) -> results.Result:
        """Run an entry. Raises Failed."""
        for program in entry.needs:
            if not (results.ROOT / program).exists():
                raise Failed(f"there is no {program}; tests/bench/README.md says how to install it")
        return results.of_today(entry.name, tuple(self._run(entry, c) for c in entry.commands))

    def _run(self, entry: Entry, template: str) -> results.Run:
        for name in models_of(template):
            if not (results.ROOT / folder_of(quick=self._quick) / MODELS[name].file).exists():
                self._print_and_call(filled(MODELS[name].command, {}, quick=self._quick))
        command = filled(template, entry.sizes, quick=self._quick)
        start = time.monotonic()
        if entry.table == "output":
            printed = self._print_and_call(command)
            lines = tuple(line.rstrip() for line in printed.strip("\n").splitlines())
            return results.Run(command, round(time.monotonic() - start, 1), lines)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "raw.json")
            self._print_and_call(command, "--json", str(file))
            raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        seconds = round(time.monotonic() - start, 1)
        return results.Run(command, seconds, data=READERS[entry.table](raw))

    def _print_and_call(self, command: str, *more: str) -> str:
        print(f"$ {command}", flush=True)
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [*PROGRAMS[program], *arguments, *more],
            cwd=results.ROOT,
            env={**os.environ, **PLAIN},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise Failed(f"{command} ended with status {done.returncode}:\n{done.stdout}")
        return done.stdout


def chosen(names: str | None) -> list[Entry]:
    """Entries by their names, separated by commas; all for None. Raises SystemExit."""
    if names is None:
        return list(ENTRIES)
    known = {entry.name: entry for entry in ENTRIES}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no figure is called {', '.join(unknown)}; --list shows the names.")
    return [known[name] for name in wanted]


def render(folder: Path, figures: Path, readme: Path | None) -> None:
    """Write the page; with `readme`, its table and the picture too."""
    figures.write_text(page.figures(folder), encoding="utf-8")
    print(f"wrote {figures}")
    if readme is None:
        return
    readme.write_text(page.readme(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")
    print(f"wrote {readme}")
    if importlib.util.find_spec("matplotlib") is None:
        print("The picture stays as it is: there is no matplotlib. pip install 'llama-mtp[bench]'")
        return
    import plot

    for file in plot.draw(results.HERE, folder):
        print(f"wrote {file}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="A,B", help="these figures")
    parser.add_argument("--quick", action="store_true", help="small sizes, in a folder apart")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="names, minutes and titles")
    args = parser.parse_args(argv)
    entries = chosen(args.only)
    if args.list:
        for entry in entries:
            print(f"{entry.name:20}{entry.minutes:4g} min  {entry.title}")
        return 0
    models = results.ROOT / folder_of(quick=args.quick)
    models.mkdir(parents=True, exist_ok=True)
    folder = models / "results" if args.quick else results.FOLDER
    maker = Maker(quick=args.quick)
    failed = []
    for entry in entries if not args.render else ():
        try:
            results.save(maker.result(entry), folder)
        except Failed as error:
            print(f"{entry.name}: {error}", file=sys.stderr, flush=True)
            failed.append(entry.name)
    if args.quick:
        render(folder, models / "FIGURES.md", None)
    else:
        render(folder, results.HERE.parent / "FIGURES.md", results.ROOT / "README.md")
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
