"""One side of ``peers.py`` that is a library, in a process and a Python of its own.

    PYTHON peer_child.py stock|ours|xllamacpp

One JSON object a line: first what to open, then what to generate; an answer for each. Needs nothing
but the side's own packages, because it also runs in environments that have no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

#: What every side samples with above temperature 0: the defaults of stock ``Llama.generate``.
SAMPLING: dict[str, Any] = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
N_BATCH = 512


def server_request(prompt: list[int], n: int, temp: float, seed: int) -> dict[str, Any]:
    """The body that llama-server and xllamacpp take; greedy is the cheapest chain there is."""
    greedy = {"samplers": ["top_k"], "top_k": 1}
    chain = {
        "samplers": ["top_k", "top_p", "min_p", "temperature"],
        "temperature": temp,
        **SAMPLING,
    }
    return {
        "prompt": prompt,
        "n_predict": n,
        "seed": seed,
        "cache_prompt": False,
        **(chain if temp > 0 else greedy),
    }


def from_timings(timings: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``peers.Run`` from llama-server's own clock, which starts at the first token."""
    return {
        "n_tokens": timings["predicted_n"],
        "prompt_seconds": timings["prompt_ms"] / 1e3,
        "decode_seconds": timings["predicted_ms"] / 1e3,
        "drafted": timings.get("draft_n", 0),
        "accepted": timings.get("draft_n_accepted", 0),
    }


class Library:
    """Stock ``llama_cpp.Llama``, or ours: at a constant depth, or with None at its defaults."""

    def __init__(
        self,
        kind: str,
        model: str,
        threads: int,
        n_ctx: int,
        gpu_layers: int,
        depth: int | None,
    ) -> None:
        import llama_cpp

        self.host = llama_cpp
        self.flags = llama_cpp.llama_print_system_info().decode()
        options: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_batch": N_BATCH,
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_gpu_layers": gpu_layers,
            "verbose": False,
        }
        cls = llama_cpp.Llama
        if kind == "ours":
            from llama_mtp import Llama

            cls = Llama
            options["spec_type"] = "draft-mtp"
            if depth is not None:
                options |= {"spec_draft_n_max": depth, "spec_adaptive": False}
        self.llm: Any = cls(model, **options)

    def _tokens(self, prompt: list[int], n: int, **sampling: Any) -> Iterator[int]:
        """Ours knows the end, as llama-server does; stock has no use for it."""
        if hasattr(self.llm, "_generate"):
            return self.llm._generate(prompt, (), sampling, wanted=n)
        return self.llm.generate(prompt, **sampling)

    def generate(self, prompt: list[int], n: int, temp: float, seed: int) -> dict[str, Any]:
        """Generate from an empty context, to the end of the text or `n` tokens."""
        llm = self.llm
        llm.reset()
        llm.set_seed(seed)
        tokens = 0
        start = first = time.perf_counter()
        for token in self._tokens(prompt, n, temp=temp, **SAMPLING):
            if not tokens:
                first = time.perf_counter()
            tokens += 1
            if tokens >= n or self.host.llama_vocab_is_eog(llm._model.vocab, token):
                break
        end = time.perf_counter()
        stats = getattr(llm, "spec_stats", None)
        last = stats.last if stats is not None else None
        return {
            "n_tokens": tokens,
            "prompt_seconds": first - start,
            "decode_seconds": end - first,
            "drafted": last.num_draft_tokens if last else 0,
            "accepted": last.num_accepted_tokens if last else 0,
        }


class XLlamaCpp:
    """The in-process llama-server of xllamacpp; at depth 0 without drafts."""

    def __init__(
        self, model: str, threads: int, n_ctx: int, gpu_layers: int, depth: int | None
    ) -> None:
        import xllamacpp

        self.flags: str = xllamacpp.get_system_info()
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_BATCH, N_BATCH
        params.n_parallel, params.n_gpu_layers, params.fit_params = 1, gpu_layers, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        kinds = xllamacpp.common_speculative_type
        if depth != 0:
            params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        if depth:
            params.speculative.draft.n_max = depth
        self.server = xllamacpp.Server(params)

    def generate(self, prompt: list[int], n: int, temp: float, seed: int) -> dict[str, Any]:
        answer = self.server.handle_completions(server_request(prompt, n, temp, seed))
        return from_timings(answer["timings"])


def main() -> None:
    kind = sys.argv[1]
    # Whatever the libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    opening = json.loads(sys.stdin.readline())
    side: Any = XLlamaCpp(**opening) if kind == "xllamacpp" else Library(kind, **opening)
    print(json.dumps({"flags": side.flags}), file=answers)
    for line in sys.stdin:
        print(json.dumps(side.generate(**json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
