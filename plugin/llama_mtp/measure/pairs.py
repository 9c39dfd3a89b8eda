"""Plain decoding against MTP on one file: paired greedy runs, medians, and where the time goes.

Both sides use the same GGUF, the same threads and the same prompts, one right after the other, so
that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from ..llama import Llama

#: The nine classes of the benchmark that llama.cpp users know; the prompts are our own.
PROMPTS: Mapping[str, str] = {
    "code_python": "Write a Python function that merges two sorted lists into one sorted list "
    "without using sort(), with type hints and a docstring.",
    "code_cpp": "Write a C++17 class for a ring buffer of fixed capacity with push, pop, size and "
    "empty, and show how to use it.",
    "explain_concept": "Explain to a curious teenager why the sky is blue in the daytime and red "
    "at sunset.",
    "summarize": "Summarize in three sentences: The printing press made books cheap. More people "
    "learned to read, ideas travelled between cities in weeks instead of years, and scholars could "
    "compare the same edition of a text. Rulers and churches lost their monopoly on knowledge, and "
    "new arguments about science and faith spread faster than anyone could censor them.",
    "qa_factual": "Which planets of the solar system have rings, and what are the rings made of?",
    "translation": "Translate into French: The train to the coast leaves at nine in the morning, "
    "and we should buy the tickets the day before.",
    "creative_short": "Write a short story about a lighthouse keeper who finds a letter in a "
    "bottle that is addressed to her.",
    "stepwise_math": "A shop sells pens at 3 for 2 euros. Anna buys 18 pens and pays with a "
    "20 euro note. How much change does she get? Think step by step.",
    "long_code_review": "Review this code for bugs, style and speed, and suggest a better version:"
    "\n\n```python\ndef load(path, cache={}):\n    if path in cache:\n        return cache[path]\n"
    "    f = open(path)\n    rows = []\n    for line in f.readlines():\n"
    "        cols = line.split(',')\n        if len(cols) > 0:\n            row = {}\n"
    "            for i in range(len(cols)):\n                row[i] = cols[i].strip()\n"
    "            rows = rows + [row]\n    cache[path] = rows\n    return rows\n```",
}


@dataclass(frozen=True)
class Run:
    """One generation. Times in seconds; the first token is timed with the prompt."""

    tokens: tuple[int, ...]
    prompt_seconds: float
    decode_seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Pair:
    """One prompt, plain and with MTP, several times over. Draft counts are sums over the runs."""

    name: str
    plain: tuple[Run, ...]
    mtp: tuple[Run, ...]
    drafted: int
    accepted: int

    @property
    def same_tokens(self) -> bool:
        return len({run.tokens for run in self.plain + self.mtp}) == 1

    @property
    def plain_rate(self) -> float:
        return median(run.rate for run in self.plain)

    @property
    def mtp_rate(self) -> float:
        return median(run.rate for run in self.mtp)

    @property
    def ratio(self) -> float:
        """Median over the pairs of MTP speed to plain speed; above 1 MTP is faster."""
        pairs = zip(self.plain, self.mtp, strict=True)
        return median(m.rate / p.rate if p.rate else 1.0 for p, m in pairs)


def chat_tokens(llm: Llama, prompt: str) -> list[int]:
    """Token ids of `prompt` as one user message in the file's own chat template, if it has one."""
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        tokens: list[int] = llm.tokenize(prompt.encode())
        return tokens
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def text(token: int) -> str:
        return llm.detokenize([token], special=True).decode(errors="replace") if token >= 0 else ""

    formatter = Jinja2ChatFormatter(
        template=template, eos_token=text(llm.token_eos()), bos_token=text(llm.token_bos())
    )
    rendered = formatter(messages=[{"role": "user", "content": prompt}])
    tokens = llm.tokenize(
        rendered.prompt.encode(), add_bos=not rendered.added_special, special=True
    )
    return tokens


def generate(
    llm: Llama,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temp: float = 0.0,
    seed: int = 1,
    go_on: bool = False,
) -> Run:
    """Generation from an empty context, to the end of the text or `max_tokens`.

    Greedy unless `temp` says otherwise; `go_on` goes past the end of the text.
    """
    from ..host import C

    llm.reset()
    llm.set_seed(seed)
    tokens: list[int] = []
    start = first = time.perf_counter()
    for token in llm.generate(list(prompt), temp=temp):
        if not tokens:
            first = time.perf_counter()
        tokens.append(token)
        if len(tokens) >= max_tokens:
            break
        if not go_on and C.llama_vocab_is_eog(llm._model.vocab, token):
            break
    end = time.perf_counter()
    return Run(tuple(tokens), first - start, end - first)


def compare(
    plain: Llama, mtp: Llama, prompts: Mapping[str, str], *, max_tokens: int, repeats: int
) -> Iterator[Pair]:
    """Yields one :class:`Pair` per prompt; which side goes first alternates.

    A short untimed run warms both sides up. ``mtp.spec_stats`` then counts the timed runs only.
    """
    warm_up = chat_tokens(plain, "Count from one to ten.")
    for llm in (plain, mtp):
        generate(llm, warm_up, 16)
    stats = mtp.spec_stats
    stats.reset()
    for name, text in prompts.items():
        prompt = chat_tokens(plain, text)
        runs: dict[bool, list[Run]] = {False: [], True: []}
        drafted, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
        for repeat in range(repeats):
            for with_mtp in (False, True) if repeat % 2 == 0 else (True, False):
                llm = mtp if with_mtp else plain
                runs[with_mtp].append(generate(llm, prompt, max_tokens))
        yield Pair(
            name,
            tuple(runs[False]),
            tuple(runs[True]),
            stats.num_draft_tokens - drafted,
            stats.num_accepted_tokens - accepted,
        )


@contextmanager
def open_pair(path: str | Path, **options: Any) -> Iterator[tuple[Llama, Llama, int]]:
    """The same file twice, without and with MTP, and the bytes that MTP adds.

    `options` goes to both constructors. The bytes are the host's own report of its buffers (KV
    cache, recurrent state, compute, output) of both contexts, less those of the plain object;
    negative where fewer output rows save more than the draft context takes.

    Raises LlamaMtpError where the host does not load the file.
    """
    from ..errors import LlamaMtpError
    from ..host import BufferSizes
    from ..llama import Llama

    plain_options = {key: value for key, value in options.items() if not key.startswith("spec_")}
    with ExitStack() as stack:
        try:
            with quiet_host():
                with BufferSizes() as sizes:
                    plain = stack.enter_context(Llama(str(path), spec_type="none", **plain_options))
                mtp = stack.enter_context(Llama(str(path), spec_type="draft-mtp", **options))
        except LlamaMtpError:
            raise
        except ValueError as error:
            raise LlamaMtpError(
                f"The host does not load {Path(path).name}: {error}. "
                f"`llama-mtp inspect {path}` says what the file holds."
            ) from error
        yield plain, mtp, sum(mtp.spec_memory().values()) - sum(sizes.bytes.values())


@contextmanager
def quiet_host() -> Iterator[None]:
    """Drop what the host prints while it loads: its warnings come through ``verbose=False``."""
    with redirect_stderr(io.StringIO()):
        yield


def show_pairs(console: Console, pairs: Iterable[Pair]) -> list[Pair]:
    """Print the pairs as they come in; returns them."""
    table = Table("prompt", "tokens", "accepted")
    for heading in ("plain tok/s", "MTP tok/s", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("same")
    done: list[Pair] = []
    with Live(table, console=console, auto_refresh=False) as live:
        for pair in pairs:
            done.append(pair)
            table.add_row(
                pair.name,
                str(sum(len(run.tokens) for run in pair.mtp)),
                f"{pair.accepted} of {pair.drafted}",
                f"{pair.plain_rate:.1f}",
                f"{pair.mtp_rate:.1f}",
                f"{pair.ratio:.2f}",
                "yes" if pair.same_tokens else "no",
            )
            live.refresh()
    if not console.is_terminal:  # Live ends without a line break there
        console.print()
    return done


def show_summary(console: Console, pairs: Sequence[Pair], mtp: Llama, added_memory: int) -> None:
    """Ratio over all prompts, acceptance, added memory, and the cost of a round outside decode."""
    stats = mtp.spec_stats
    same = sum(pair.same_tokens for pair in pairs)
    draft_memory = sum(
        size for part, size in mtp.spec_memory().items() if part.startswith("draft ")
    )
    per_position = " ".join(f"{rate:.2f}" for rate in stats.acceptance_per_pos)
    rows = {
        "same tokens": f"{same} of {len(pairs)} prompts",
        "ratio, median": f"{median(pair.ratio for pair in pairs):.2f}",
        "mean acceptance length": f"{stats.mean_acceptance_length:.2f} tokens a round",
        "acceptance per position": per_position or "nothing drafted",
        "rounds with a draft": f"{stats.num_drafts} of {stats.num_rounds}",
        "added memory": f"{added_memory / 2**20:+.1f} MiB "
        f"(of which the draft context {draft_memory / 2**20:.1f} MiB)",
    }
    if stats.num_rounds:
        rollback = stats.rollback_ns / stats.num_rounds / 1000
        native = stats.native_overhead_ns / stats.num_rounds / 1000
        python = stats.python_ns / stats.num_rounds / 1000
        rows["a round outside decode"] = (
            f"{rollback:.1f} µs rollback, {native:.1f} µs native, {python:.1f} µs Python"
        )
    if mtp._session is not None:
        rows["depth"] = mtp._session.policy.explain()
    grid = Table.grid(padding=(0, 2))
    for row in rows.items():
        grid.add_row(*row)
    console.print(grid)


def show_partings(
    console: Console,
    plain: Llama,
    mtp: Llama,
    prompts: Mapping[str, str],
    pairs: Sequence[Pair],
    max_tokens: int,
) -> None:
    """Where texts parted, say whether the host's own rounding is the cause: the two-part check.

    It runs at the full depth, where batches are largest, whatever depth the policy has reached.
    """
    from .identity import check_identity

    if mtp.spec_type == "none" or all(pair.same_tokens for pair in pairs):
        return
    depth = mtp.spec_depth
    for pair in pairs:
        if pair.same_tokens:
            continue
        prompt = chat_tokens(plain, prompts[pair.name])
        with mtp.spec_constant_depth(depth):
            report = check_identity(
                plain, mtp, prompt, max_tokens, max_batch=1 + depth, quiet=True, temp=0.0
            )
        for parting in report.divergences:
            console.print(f"{pair.name}: {parting}", highlight=False)
        if not report.divergences:
            console.print(f"{pair.name}: did not part again", highlight=False)
    console.print(
        "A parting is legal where the host itself gives a row other last bits in a batch than "
        "alone, by as much, and its own sampler then picks the same token.",
        highlight=False,
    )
