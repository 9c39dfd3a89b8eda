"""What else a draft could be at a temperature: acceptance of the argmax, of a clone, of two tokens.

    python tests/bench/figures/temperature.py MODEL [--temps 0,0.3,0.7,1.0,1.3]
        [--tokens 96] [--seeds 2]

The target draws each token with the caller's chain, so a draft is right with the probability that
the chain gives it. Three drafts for the same place are compared with what was really drawn:

- the head's most likely token, which the engine drafts;
- a token drawn from the head's logits by a clone of the caller's chain in the same state
  (``llama_sampler_clone``): it would meet the draw more often than chance, as both use the same
  random number;
- the head's two most likely tokens together. One sequence can verify only one of them: the second
  needs a row, and a sequence of its own, for what it adds.

The last columns are the argmax by the head's own probability: what stopping by confidence uses.
Each token is drafted at the first position of a round and not verified, so the text is plain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llama_mtp import Llama
from llama_mtp.depth.rule import look
from llama_mtp.engine.generation import Generation
from llama_mtp.engine.native import check, ffi, lib
from llama_mtp.host import C, address_of_sampler, logits_row
from llama_mtp.measure.pairs import PROMPTS, chat_tokens, quiet_host

SAMPLING = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
BOUNDS = (0.5, 0.8)  # between low, middling and high confidence


def confidence(logits: np.ndarray) -> float:
    """Probability of the most likely of the ten best, as the engine counts it."""
    best = np.sort(np.partition(logits, -10)[-10:])
    return float(1.0 / np.exp(best - best[-1]).sum())


def measure(llm: Llama, prompt: list[int], temp: float, tokens: int, seed: int) -> np.ndarray:
    """Rows of (argmax right, clone right, second right, confidence), one per token."""
    session = llm._session
    assert session is not None and session.draft_context is not None
    handle, draft, target = session._handle, session.draft_context, llm._ctx
    n_vocab = llm.n_vocab()
    llm.reset()
    llm.set_seed(seed)
    chain = llm._init_sampler(temp=temp, **SAMPLING)
    address = ffi.cast("void *", address_of_sampler(chain))
    session.begin(Generation(chain, address, temp), llm._input_ids)
    llm.eval(prompt)
    last = int(chain.sample(target, session.live_row))
    rule, step = session._load(look(), 1), ffi.new("struct mtp_step *")
    rows = []
    for pos in range(len(prompt), len(prompt) + tokens):
        twin = C.llama_sampler_clone(chain.sampler)
        check(lib.mtp_next(handle, address, last, pos, rule, ffi.NULL, 0, step), handle)
        assert (step.n_picks, step.n_drafted) == (1, 0), "the head drafted nothing"
        logits = logits_row(draft, -1, n_vocab)
        first, second = np.argsort(logits)[-2:][::-1]
        cloned = C.llama_sampler_sample(twin, draft.ctx, -1)
        C.llama_sampler_free(twin)
        last = int(step.token)
        rows.append((last == first, last == cloned, last == second, confidence(logits)))
        if last == llm.token_eos():
            break
    session.settle()
    return np.array(rows, dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--temps", default="0,0.3,0.7,1.0,1.3")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with quiet_host():
        llm = Llama(
            str(args.model), spec_type="draft-mtp", n_ctx=1024, n_threads=args.threads,
            n_threads_batch=args.threads, verbose=False,
        )  # fmt: skip
    table = Table(title=f"{args.model.name}: a draft for the next token is right")
    for column in (
        "T", "tokens", "argmax", "clone", "either of two", "second adds",
        f"p < {BOUNDS[0]}", "between", f"p > {BOUNDS[1]}", "shares",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for temp in (float(t) for t in args.temps.split(",")):
        runs = [
            measure(llm, chat_tokens(llm, text), temp, args.tokens, 1 + seed)
            for text in track(PROMPTS.values(), f"T {temp}", transient=True)
            for seed in range(args.seeds if temp else 1)
        ]
        rows = np.concatenate(runs)
        argmax, clone, second, p = rows.T
        parts = np.digitize(p, BOUNDS)
        by_class = [argmax[parts == k] for k in range(3)]
        table.add_row(
            f"{temp:g}", str(len(rows)), f"{argmax.mean():.3f}", f"{clone.mean():.3f}",
            f"{(argmax + second).mean():.3f}", f"{second.mean():.3f}",
            *(f"{c.mean():.2f}" if len(c) else "-" for c in by_class),
            " ".join(f"{len(c) / len(rows):.2f}" for c in by_class),
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
