"""Draw the README's picture: speed over stock by how often the head is right.

    python tests/bench/figures/plot.py [FOLDER]

Takes the figure ``hybrid`` (results/hybrid.json) and writes speed-light.svg and speed-dark.svg, one
for each kind of page. make.py draws them too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from results import FOLDER, HERE, load

SHARES = (
    95,
    90,
    85,
    80,
    70,
    60,
    40,
    20,
    0,
)  # % of right words by class: examples/inflate/hybrid.py
LINES = {  # row of the result: what it is called, style
    "3": ("always 3 drafts", {"color": "other", "linewidth": 1.6, "marker": "s"}),
    "bound": (
        "best constant depth, computed",
        {"color": "text", "linewidth": 1.4, "linestyle": (0, (4, 3))},
    ),
    "adaptive": ("llama-mtp, adaptive", {"color": "ours", "linewidth": 2.8, "marker": "o"}),
}
THEMES = {
    "light": {"text": "#3d444d", "grid": "#d1d9e0", "ours": "#0969da", "other": "#bc4c00"},
    "dark": {"text": "#c9d1d9", "grid": "#3d444d", "ours": "#58a6ff", "other": "#f0883e"},
}
STYLE = {
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text, in a font that the reader has
    "svg.hashsalt": "llama-mtp",  # the same picture is the same file
}


def draw(folder: Path = HERE, results: Path = FOLDER) -> list[Path]:
    """Write both pictures to `folder`; none where the figure has not been measured."""
    result = load("hybrid", results)
    if result is None or result.runs[0].data is None:
        return []
    speed = result.runs[0].data["speed"]["0"]
    files = []
    for theme, colours in THEMES.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(7.2, 3.6), layout="constrained")
            axes = figure.add_subplot()
            axes.axhline(1.0, color=colours["text"], linewidth=0.8)
            axes.text(1, 1.015, "stock", color=colours["text"])
            for row, (label, style) in LINES.items():
                line = {**style, "color": colours[style["color"]]}
                axes.plot(SHARES, speed[row], label=label, markersize=5, **line)
            axes.set_xlabel("how often the head is right, %", color=colours["text"])
            axes.set_ylabel("tokens per second, stock = 1", color=colours["text"])
            axes.set_xlim(-2, 98)
            axes.tick_params(colors=colours["text"], length=0)
            axes.grid(color=colours["grid"], linewidth=0.6)
            axes.set_axisbelow(True)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.legend(frameon=False, labelcolor=colours["text"], loc="upper left", reverse=True)
            file = folder / f"speed-{theme}.svg"
            figure.savefig(file, transparent=True, metadata={"Date": None})
        files.append(file)
    return files


if __name__ == "__main__":
    for written in draw(*map(Path, sys.argv[1:])):
        print(written)
