"""Print how many tokens were compared with stock over every sampler setting, and how many parted.

    python tests/bench/figures/samplers.py [tokens a setting and architecture]

Settings without Python callbacks go through ``measure.identity``, with the host's default cache
in half precision, as users have it. Callbacks, biases and response formats cannot be replayed by
that check: their texts are compared directly, with a cache in single precision, and any difference
counts as illegal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

sys.path.insert(0, str(Path(__file__).parents[2]))
import models
from conftest import COMMON
from rich.console import Console
from rich.table import Table
from sampling import GRAMMARS, GREEDY, PROCESSORS, SAMPLED, SCHEMA, SETTINGS, grammar, processors

from llama_mtp import Llama
from llama_mtp.measure.identity import check_identity, clear, fresh_text, text

N_TOKENS = 360
DEPTH = 3
CHAT = [{"role": "user", "content": "one or two"}]
BIAS = {models.FIRST_WORD + 5: 4.0, models.FIRST_WORD + 9: -100.0}

Row = tuple[int, int, int]  # tokens, partings, illegal


def pair(model: models.Model, **options: Any) -> tuple[Any, Any]:
    """Return stock and ours on one model."""
    options = {**COMMON, "n_ctx": 1024, **options}
    fast = Llama(
        str(model.path),
        spec_type="draft-mtp",
        spec_draft_n_max=DEPTH,
        spec_adaptive=False,
        **options,
    )
    return llama_cpp.Llama(str(model.path), **options), fast


def checked(model: models.Model, n: int) -> dict[str, Row]:
    """Every setting that the two-part check can replay; grammars too."""
    plain, fast = pair(model, type_k=None, type_v=None)
    settings: dict[str, dict[str, Any]] = dict(SETTINGS)
    for name, source in GRAMMARS.items():
        settings[f"grammar {name}"] = {"grammar": grammar(source), **SAMPLED}
    rows = {}
    for i, (name, sampling) in enumerate(settings.items()):
        report = check_identity(
            plain, fast, model.text(16, i), n, i + 1, 1 + DEPTH, quiet=True, **sampling
        )
        rows[name] = (report.n_tokens, len(report.divergences), len(report.illegal))
    plain.close()
    fast.close()
    return rows


def compared(model: models.Model, n: int) -> dict[str, Row]:
    """Python callbacks, and what is made of them: texts side by side."""
    plain, fast = pair(model)
    rows: dict[str, Row] = {}

    def book(name: str, truth: list[Any], mine: list[Any], tokens: int) -> None:
        before = rows.get(name, (0, 0, 0))
        differs = int(truth != mine)
        rows[name] = (before[0] + tokens, before[1] + differs, before[2] + differs)

    for name, functions in PROCESSORS.items():
        for sampling in (GREEDY, SAMPLED):
            options = {**sampling, "logits_processor": processors(*functions)}
            truth = fresh_text(plain, model.text(16), n // 2, **options)
            mine = text(fast, model.text(16), n // 2, **options)
            book(f"logits_processor {name}", truth, mine, len(mine))
    stop = llama_cpp.StoppingCriteriaList([lambda ids, row: len(ids) % 97 == 0])
    for seed in range(4):
        truth = fresh_text(plain, model.text(16, seed), n, 1, stopping_criteria=stop, **SAMPLED)
        mine = text(fast, model.text(16, seed), n, 1, stopping_criteria=stop, **SAMPLED)
        book("stopping_criteria", truth, mine, len(mine))

    def answers(name: str, call: Callable[[Any], Any]) -> None:
        clear(plain)
        expected, got = call(plain), call(fast)
        n_tokens = got["usage"]["completion_tokens"]
        book(name, expected["choices"], got["choices"], n_tokens)

    for seed in range(4):
        answers(
            "logit_bias",
            lambda llama, seed=seed: llama.create_completion(
                "hello", max_tokens=n // 4, seed=seed, logit_bias=BIAS
            ),
        )
        answers(
            "response_format, JSON schema",
            lambda llama, seed=seed: llama.create_chat_completion(
                CHAT,
                max_tokens=n // 4,
                seed=seed,
                response_format={"type": "json_object", "schema": SCHEMA},
            ),
        )
        answers(
            "everything at once",
            lambda llama, seed=seed: llama.create_completion(
                "you are",
                max_tokens=n // 4,
                seed=seed,
                logit_bias=BIAS,
                logits_processor=processors(*PROCESSORS["two"]),
                grammar=grammar(GRAMMARS["letters"]),
                repeat_penalty=1.1,
            ),
        )
    plain.close()
    fast.close()
    return rows


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else N_TOKENS
    start = time.perf_counter()
    totals: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in models.ARCHITECTURES:
            m = models.build(Path(folder) / f"{arch}.gguf", arch, state_scale=1.0)
            for name, row in [*checked(m, n).items(), *compared(m, n).items()]:
                before = totals.get(name, (0, 0, 0))
                totals[name] = (before[0] + row[0], before[1] + row[1], before[2] + row[2])
    table = Table("setting", "tokens", "partings", "illegal")
    for name, row in totals.items():
        table.add_row(name, *(str(x) for x in row))
    tokens, partings, illegal = (sum(row[i] for row in totals.values()) for i in range(3))
    table.add_section()
    table.add_row(f"{len(totals)} settings", str(tokens), str(partings), str(illegal))
    Console().print(table)
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(1 if illegal else 0)


if __name__ == "__main__":
    main()
