"""What ``run.sh`` runs: attachment, identity at full and partial offload, speed with and without.

python tests/gpu/check.py [--attach-only] [MODEL.gguf ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers beside the other tests

import llama_cpp
import models
from llama_cpp import Llama as StockLlama
from llama_cpp import llama_supports_gpu_offload
from rich.console import Console

from llama_mtp import Llama
from llama_mtp.heads.check import check_head
from llama_mtp.measure.bench import DEPTHS
from llama_mtp.measure.bench_report import run_bench
from llama_mtp.measure.doctor import findings
from llama_mtp.measure.identity import IdentityReport, check_identity
from llama_mtp.measure.pairs import PROMPTS, chat_tokens

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temp": 0.0},
    "temperature": {"temp": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
}
PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain it."

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attach-only", action="store_true", help="everything on the CPU")
    parser.add_argument("--tokens", type=int, default=400, help="tokens per identity check")
    parser.add_argument("models", nargs="*", type=Path, help="GGUF files with a NextN head")
    args = parser.parse_args()

    failures = attachment(needs_card=not args.attach_only)
    with tempfile.TemporaryDirectory() as folder:
        built = [models.build(Path(folder, f"{a}.gguf"), a).path for a in models.ARCHITECTURES]
        for path in (*built, *args.models):
            trunk = check_head(path).n_layer_trunk
            for layers in (0,) if args.attach_only else (-1, max(1, trunk // 2), 0):
                failures += identity(path, layers, args.tokens)
    for path in () if args.attach_only else args.models:
        for layers in (-1, check_head(path).n_layer_trunk // 2):
            console.rule(f"speed of {path.name}, {layers} layers on the GPU")
            run_bench(
                console,
                path,
                prompts=PROMPTS,
                temps=(0.0, 0.8),
                depths=DEPTHS,
                max_tokens=192,
                repeats=2,
                bound=3,
                n_ctx=2048,
                n_gpu_layers=layers,
            )
    console.print(f"{failures} failures")
    return 1 if failures else 0


def attachment(*, needs_card: bool) -> int:
    """The parts fit, the host is a CUDA build, and a card is there if one is needed."""
    failures = 0
    for finding in findings():
        console.print("ok" if finding.ok else "NO", finding.what, finding.detail, sep="  ")
        failures += not finding.ok
    cuda = list((Path(llama_cpp.__file__).parent / "lib").glob("libggml-cuda*"))
    console.print(f"CUDA backend: {cuda[0].name if cuda else 'none, this is no CUDA build'}")
    card = llama_supports_gpu_offload()
    console.print(f"card: {'yes' if card else 'none here'}")
    return failures + (not cuda) + (needs_card and not card)


def identity(path: Path, layers: int, n_tokens: int) -> int:
    """The two-part check against the stock class with as many layers on the GPU."""
    options: dict[str, Any] = {"n_ctx": 2048, "n_gpu_layers": layers, "verbose": False}
    stock = StockLlama(str(path), **options)
    failures = 0
    with Llama(str(path), spec_type="draft-mtp", spec_adaptive=False, **options) as ours:
        prompt = chat_tokens(ours, PROMPT)
        for name, sampling in SAMPLING.items():
            report: IdentityReport = check_identity(stock, ours, prompt, n_tokens, 1, **sampling)
            stats = ours.spec_stats.last
            rate = stats.draft_acceptance_rate if stats is not None else 0.0
            console.print(
                f"{path.name}  {layers} layers on the GPU  {name}: {report.n_tokens} tokens, "
                f"{len(report.divergences)} divergences, {len(report.illegal)} illegal, "
                f"acceptance {rate:.2f}"
            )
            failures += len(report.illegal)
    stock.close()
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
