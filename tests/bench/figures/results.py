"""Results, ``results/NAME.json``: what was run, when and where, and what came out."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE / "results"
ROOT = HERE.parents[2]


@dataclass(frozen=True)
class Run:
    """One command and its outcome.

    Attributes:
        command: as a reader can type it in the repository's root.
        seconds: that it took; 0 where nobody kept them.
        output: what it printed, line by line; empty where there is data.
        data: what :func:`depths`, :func:`fresh` or :func:`peers` kept of the JSON that it wrote.
    """

    command: str
    seconds: float = 0.0
    output: tuple[str, ...] = ()
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        date, machine, versions: when and where it was measured.
        text: Markdown that stands in place of the runs' outputs, in results that were taken over
            from an earlier page and not measured by make.py.
    """

    name: str
    date: str
    machine: str
    versions: str
    runs: tuple[Run, ...]
    text: tuple[str, ...] = ()


def load(name: str, folder: Path = FOLDER) -> Result | None:
    """The result of this name, or None if there is none."""
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    runs = tuple(Run(**{**run, "output": tuple(run["output"])}) for run in found.pop("runs"))
    return Result(**{**found, "text": tuple(found["text"])}, runs=runs)


def save(result: Result, folder: Path = FOLDER) -> None:
    """Write a result, or replace the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    new = folder / f"{result.name}.new"
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(folder / f"{result.name}.json")


def of_today(name: str, runs: tuple[Run, ...]) -> Result:
    """A result measured here and now."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("llama-mtp", "llama-cpp-python"))
    versions = f"{packages}, Python {platform.python_version()}" + (commit and f", commit {commit}")
    return Result(name, datetime.date.today().isoformat(), _machine(), versions, runs)


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}"


# --- what is kept of the JSON of other programs ------------------------------------------------


def depths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of tests/bench/instrument.py: speed over stock by class, and what a round takes.

    ``speed[temperature][row]`` has one number for each class, ``mean[temperature][row]`` the
    geometric mean and its interval; rows are ``bound``, ``adaptive`` and the constant depths.
    ``rounds[temperature][row]`` is tokens a round, first drafts accepted, and microseconds in
    native code, in the host's removal of rows, and in Python.
    """
    series = [one for one in raw["series"] if one["depth"] != "plain"]
    temps = list(dict.fromkeys(f"{one['temperature']:g}" for one in series))
    speed: dict[str, dict[str, list[float]]] = {temp: {"bound": []} for temp in temps}
    mean: dict[str, dict[str, list[float]]] = {temp: {} for temp in temps}
    taken: dict[str, dict[str, list[list[float]]]] = {temp: {} for temp in temps}
    for one in raw["bounds"]:
        speed[f"{one['temperature']:g}"]["bound"].append(_short(one["bound"]))
    for one in series:
        temp, row = f"{one['temperature']:g}", str(one["depth"])
        speed[temp].setdefault(row, []).append(_short(one["ratio"]))
        taken[temp].setdefault(row, []).append(_round(one))
    for one in raw["mean_bounds"]:
        mean[f"{one['temperature']:g}"]["bound"] = [_short(one["bound"])]
    for one in raw["means"]:
        numbers = [one["ratio"], *one["ratio_interval"][:2]]
        mean[f"{one['temperature']:g}"][str(one["depth"])] = [_short(x) for x in numbers]
    rounds = {
        temp: {
            row: [_short(median(column)) for column in zip(*those, strict=True)]
            for row, those in rows.items()
        }
        for temp, rows in taken.items()
    }
    classes = list(dict.fromkeys(one["class"] for one in series))
    prompt = raw["prompt"]
    return {
        "classes": classes,
        "speed": speed,
        "mean": mean,
        "rounds": rounds,
        "prompt": {
            "tokens": prompt["tokens"],
            "first_token": [_short(prompt["ratio"]), *map(_short, prompt["ratio_interval"][:2])],
            "read_by_draft": _short(prompt["catch_up_share"]),
        },
    }


def _round(one: Mapping[str, Any]) -> list[float]:
    n = max(1, one["num_rounds"])
    times = (one[key] / n / 1e3 for key in ("native_overhead_ns", "rollback_ns", "python_ns"))
    first = (one["acceptance_per_pos"] or [0.0])[0]
    return [one["mean_acceptance_length"], first, *times]


def fresh(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of the same with ``--fresh``: speed over stock, by generation, with its interval."""
    means = [generation["means"][0] for generation in raw["generations"]]
    pairs = [[one["ratio"], *one["ratio_interval"][:2]] for one in means]
    return {"generations": [[_short(x) for x in pair] for pair in pairs]}


def peers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of tests/bench/peers.py: our speed over each peer's, with its interval, by kind of ratio."""
    return {
        pair: {
            kind: [_short(found[key]) for key in ("median", "low", "high")]
            for kind, found in kinds.items()
        }
        for pair, kinds in raw["geometric_mean_ratios"].items()
    }


def _short(number: float) -> float:
    return float(f"{number:.4g}")
