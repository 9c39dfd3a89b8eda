"""Plain decoding beside MTP on one loaded file: the prompts, and one timed generation.

Both sides use the same weights, the same threads and the same prompts, one right after the other,
so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlamaMtpError

if TYPE_CHECKING:
    from ..host import StockLlama
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


def chat_tokens(llm: StockLlama, prompt: str) -> list[int]:
    """Token ids of `prompt` as one user message in the file's own chat template, if it has one."""
    from ..host import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        return list(llm.tokenize(prompt.encode()))

    def text(token: int) -> str:
        return llm.detokenize([token], special=True).decode(errors="replace") if token >= 0 else ""

    formatter = Jinja2ChatFormatter(
        template=template, eos_token=text(llm.token_eos()), bos_token=text(llm.token_bos())
    )
    message = formatter(messages=[{"role": "user", "content": prompt}])
    add_bos = not message.added_special
    return list(llm.tokenize(message.prompt.encode(), add_bos=add_bos, special=True))


def generate(
    llm: StockLlama,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temp: float = 0.0,
    seed: int = 1,
    go_on: bool = False,
) -> Run:
    """Generate from an empty context, to the end of the text or `max_tokens`.

    Greedy unless `temp` says otherwise; `go_on` goes past the end of the text.
    """
    from ..host import is_end_of_generation

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
        if not go_on and is_end_of_generation(llm._model, token):
            break
    end = time.perf_counter()
    return Run(tuple(tokens), first - start, end - first)


@contextmanager
def open_pair(path: str | Path, **options: Any) -> Iterator[tuple[StockLlama, Llama, int]]:
    """Load a file once, for two objects: stock, and with MTP; and the bytes that MTP adds.

    `options` goes to both constructors, what begins with ``spec_`` to ours alone. The bytes are the
    host's own report of its buffers (KV cache, recurrent state, compute, output) of both contexts
    with MTP, less those of the stock one; negative where fewer output rows save more than the draft
    context takes.

    Raises LlamaMtpError where the host does not load the file.
    """
    from ..host import BufferSizes, twin
    from ..llama import Llama

    stock_options = {key: value for key, value in options.items() if not key.startswith("spec_")}
    with ExitStack() as stack:
        try:
            with quiet_host():
                mtp = stack.enter_context(Llama(str(path), spec_type="draft-mtp", **options))
                with BufferSizes() as sizes:
                    plain = stack.enter_context(closing(twin(mtp, **stock_options)))
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
