"""Long texts of every family against a freshly cleared stock object, with both kinds of KV cache.

    python tests/bench/figures/families.py [TOKENS]

Each family and number of heads writes eight texts of 400 tokens, greedy and sampled, on its tiny
random model. Where a text parts from stock, the two-part check of `measure.identity` judges.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from models.cases import CASES, opened
from rich.console import Console
from rich.table import Table
from sampling import GREEDY, SAMPLED

from llama_mtp.measure.identity import check_identity

CACHES = {"F32": 0, "F16": 1}  # ggml types


def partings(arch: str, n_heads: int, kind: int, n_tokens: int) -> tuple[int, int, int, float]:
    """Return tokens, partings, those that are illegal, and the mean acceptance length."""
    tokens = parted = illegal = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        opened(arch, n_heads, Path(folder), type_k=kind, type_v=kind) as case,
    ):
        for seed in range(4):
            for sampling in (GREEDY, SAMPLED):
                report = check_identity(
                    case.stock,
                    case.ours,
                    case.prompt(40, 100 + seed),
                    n_tokens,
                    seed + 1,
                    1 + case.depth,
                    quiet=True,
                    **sampling,
                )
                tokens += report.n_tokens
                parted += len(report.divergences)
                illegal += len(report.illegal)
        length = case.ours.spec_stats.mean_acceptance_length
    return tokens, parted, illegal, length


def main() -> None:
    n_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    table = Table("family", "heads", *(f"{kind} cache" for kind in CACHES), "tokens a round")
    sums = {kind: [0, 0, 0] for kind in CACHES}
    for arch, n_heads in CASES:
        cells, length = [], 0.0
        for kind, number in CACHES.items():
            *counts, length = partings(arch, n_heads, number, n_tokens)
            sums[kind] = [a + b for a, b in zip(sums[kind], counts, strict=True)]
            cells.append("{} tokens, {} partings, {} illegal".format(*counts))
        table.add_row(arch, str(n_heads), *cells, f"{length:.2f}")
    total = ["{} tokens, {} partings, {} illegal".format(*sums[kind]) for kind in CACHES]
    table.add_section()
    table.add_row("all", "", *total, "")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
