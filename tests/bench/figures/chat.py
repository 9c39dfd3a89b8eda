"""Print what ten turns of a chat cost on a hybrid model, measured here and now.

    python tests/bench/figures/chat.py

The recurrent state cannot be cut, so whether a turn is read in part or from its first token depends
on what the next prompt still shares with the text so far. Three chats:

- appended: each prompt is the text so far and the user's words;
- template: what opened the answer is not in the history later, as with models that think first;
- edited: the user changes the last message and gets a second answer; the changed prompt counts.

Stock, ours without and with checkpoints; one thread, constant depth 3, greedy. Times vary.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import models
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama

TURNS, ANSWER, WORDS, OPENING = 10, 60, 100, 3


class Chat:
    """One object and what its prompts cost."""

    def __init__(self, model: models.Model, **options: Any) -> None:
        self.llama = Llama(
            str(model.path),
            n_ctx=2048,
            n_threads=1,
            n_threads_batch=1,
            type_k=0,
            type_v=0,
            verbose=False,
            spec_adaptive=False,
            **options,
        )
        self.evaluated: list[int] = []
        self.acceptance: list[float] = []
        self.first_ms: list[float] = []
        self._batches = 0
        decode = self.llama._ctx.decode

        def count(batch: Any) -> None:
            self._batches += int(batch.batch.n_tokens)
            decode(batch)

        self.llama._ctx.decode = count

    def turn(self, prompt: list[int], *, counts: bool = True) -> list[int]:
        """Answer a prompt; tokens evaluated and times are those up to the first token."""
        self._batches = 0
        start = time.perf_counter()
        stream = self.llama.generate(prompt, temp=0.0)
        answer = [next(stream)]
        if counts:
            self.first_ms.append((time.perf_counter() - start) * 1e3)
            self.evaluated.append(self._batches)
        answer += islice(stream, ANSWER - 1)
        stream.close()
        last = self.llama.spec_stats.last
        if counts and last is not None:
            self.acceptance.append(last.mean_acceptance_length)
        return answer


def chat(model: models.Model, kind: str, c: Chat) -> list[list[int]]:
    """Run ten turns and return the answers."""
    history = model.text(WORDS, 1)
    opening = model.text(OPENING, 2) if kind == "template" else []
    answers = []
    for turn in range(TURNS):
        if kind == "edited":
            c.turn(history, counts=False)
            history = [*history[: -WORDS // 2], *model.text(WORDS // 2, 200 + turn)]
        answers.append(c.turn([*history, *opening]))
        history = [*history, *answers[-1], *model.text(WORDS, 100 + turn)]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", choices=("embedding", "hidden"), default="embedding")
    arguments = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        model = models.build(Path(name) / "chat.gguf", "qwen35", head=arguments.head)
        for kind in ("appended", "template", "edited"):
            chats = {"stock": Chat(model, spec_type="none")}
            for name, checkpoints in (("ours, none", "0"), ("ours, 4", "4")):
                os.environ["LLAMA_ARG_CTX_CHECKPOINTS"] = checkpoints
                chats[name] = Chat(model, spec_type="draft-mtp")
            texts = [chat(model, kind, c) for c in chats.values()]
            table = Table(
                title=f"{kind}: prompt tokens evaluated in each turn, same texts: "
                f"{all(t == texts[0] for t in texts)}"
            )
            table.add_column("checkpoints")
            for turn in range(TURNS):
                table.add_column(str(turn + 1), justify="right")
            table.add_column("all", justify="right")
            table.add_column("ms to first", justify="right")
            for label, c in chats.items():
                numbers = [str(n) for n in c.evaluated]
                ms = f"{sum(c.first_ms):.0f}"
                table.add_row(label, *numbers, str(sum(c.evaluated)), ms)
            ours = chats["ours, 4"]
            table.add_row("tokens a round", *(f"{a:.2f}" for a in ours.acceptance))
            console.print(table)
            now = ours.llama._session.counters()
            console.print(
                f"{now['n_checkpoints']} checkpoints hold {now['n_checkpoint_bytes']} bytes; "
                f"{now['n_checkpoints_saved']} saved, {now['n_checkpoints_restored']} restored\n"
            )
            for c in chats.values():
                c.llama.close()


if __name__ == "__main__":
    main()
