"""Where a round's time goes: how often it waits for the device, and what is copied each way.

    python tests/gpu/traffic.py MODEL.gguf [--gpu-layers -1] [--depth 3] [--tokens 96]

Counted, not profiled: the engine's table of host functions is wrapped, and from each call follows
what the host copies for it. So the figures are the same on every device, and on the CPU, where
nothing is copied in truth. Waits inside ``llama_decode`` are not seen, nor what the host copies for
plain decoding as well (token ids, positions, the attention mask). The phases come from a second
object that is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_mtp import Llama, host
from llama_mtp.engine.stats import SpecStats
from llama_mtp.measure.pairs import PROMPTS, chat_tokens, generate, quiet_host

_P, _I, _N = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
_F = ctypes.CFUNCTYPE
#: Functions that wait until the context's last decode is done, if it is not.
WAITING = {
    "llama_synchronize": _F(None, _P),
    "llama_get_logits_ith": _F(_P, _P, _I),
    "llama_get_embeddings_nextn": _F(_P, _P),
    "llama_get_embeddings_nextn_ith": _F(_P, _P, _I),
    "llama_get_sampled_token_ith": _F(_I, _P, _I),
    "llama_sampler_sample": _F(_I, _P, _P, _I),
    "llama_state_seq_get_data_ext": _F(_N, _P, _P, _N, _I, ctypes.c_uint32),
    "llama_state_seq_set_data_ext": _F(_N, _P, _P, _N, _I, ctypes.c_uint32),
}
DECODE = "llama_decode"
MASK = "llama_set_embeddings_nextn"


@dataclass
class Traffic:
    """What an engine asked of its host. Bytes by what they are; ``calls`` by function."""

    n_embd: int
    n_vocab: int
    waits: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)  # of "target" and "draft" decodes
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    _busy: set[int] = field(default_factory=set)
    _masked: set[int] = field(default_factory=set)  # contexts that copy the rows of outputs alone

    def decoded(self, context: int, batch: Any) -> None:
        """A decode has begun. The head's rows come with hidden rows, the target's without."""
        n = int(batch.n_tokens)
        outputs = sum(bool(batch.logits[i]) for i in range(n))
        side = "draft" if batch.embd else "target"
        self.calls[f"decode {side}"] += 1
        self.rows[side] += n
        if side == "draft":
            self.up["hidden rows"] += 4 * n * self.n_embd
        else:
            self.down["logits"] += 4 * outputs * self.n_vocab
        self.down["hidden rows"] += 4 * (outputs if context in self._masked else n) * self.n_embd
        self._busy.add(context)

    def masked(self, context: int, _on: bool, masked: bool) -> None:
        """Which hidden rows a context copies was set."""
        (self._masked.add if masked else self._masked.discard)(context)

    def asked(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A function was called that waits for its context."""
        self.calls[name.removeprefix("llama_")] += 1
        context = arguments[1] if name == "llama_sampler_sample" else arguments[0]
        if context in self._busy:
            self._busy.discard(context)
            self.waits += 1
        if name == "llama_get_sampled_token_ith":
            self.down["picks"] += 4
        elif name == "llama_get_logits_ith":
            self.down["draft logits"] += 4 * self.n_vocab
        elif name == "llama_state_seq_get_data_ext":
            self.down["recurrent state"] += arguments[2]
        elif name == "llama_state_seq_set_data_ext":
            self.up["recurrent state"] += arguments[2]

    def clear(self) -> None:
        """Count from here."""
        self.waits = 0
        for counter in (self.calls, self.rows, self.up, self.down):
            counter.clear()

    def as_dict(self) -> dict[str, Any]:
        named = {k: dict(getattr(self, k)) for k in ("calls", "rows", "up", "down")}
        return {"waits": self.waits, **named}


@contextmanager
def counted() -> Iterator[Callable[[Llama], Traffic]]:
    """Engines that open in the block are counted; the function says what one has done since.

    One engine: what a second one asked would be added to it.
    """
    traffic = Traffic(0, 0)
    kept: list[Any] = []  # callbacks live as long as somebody holds them
    original = host.address_table

    def wrap(name: str, address: int) -> int:
        if name == DECODE:
            kind = _F(_I, _P, host.C.llama_batch)
        elif name == MASK:
            kind = _F(None, _P, ctypes.c_bool, ctypes.c_bool)
        elif name in WAITING:
            kind = WAITING[name]
        else:
            return address
        real = kind(address)

        def call(*arguments: Any) -> Any:
            if name == DECODE:
                traffic.decoded(*arguments)
            elif name == MASK:
                traffic.masked(*arguments)
            else:
                traffic.asked(name, arguments)
            answer = real(*arguments)
            return 0 if answer is None and kind._restype_ is not None else answer  # 0: NULL

        callback = kind(call)
        kept.extend((real, callback))
        return int(ctypes.cast(callback, ctypes.c_void_p).value or 0)

    def table(names: list[str]) -> dict[str, int]:
        return {name: wrap(name, address) for name, address in original(names).items()}

    def of(llama: Llama) -> Traffic:
        traffic.n_embd = int(host.C.llama_model_n_embd_out(llama._model.model))
        traffic.n_vocab = llama.n_vocab()
        traffic.clear()
        return traffic

    host.address_table = table
    try:
        yield of
    finally:
        host.address_table = original


def per_round(traffic: Traffic, stats: SpecStats) -> Table:
    """Waits, calls and bytes of one round."""
    n = max(1, stats.num_rounds)
    title = f"a round: {stats.mean_acceptance_length:.2f} tokens, {stats.num_rounds} rounds"
    table = Table("what", "a round", title=title)
    table.columns[1].justify = "right"
    table.add_row("waits for the device", f"{traffic.waits / n:.2f}")
    for side in ("target", "draft"):
        calls, rows = traffic.calls[f"decode {side}"], traffic.rows[side]
        table.add_row(f"{side} decodes, their rows", f"{calls / n:.2f}, {rows / n:.2f}")
    for way, counter in (("to the device", traffic.up), ("from the device", traffic.down)):
        for what, size in sorted(counter.items()):
            table.add_row(f"{what}, {way}", f"{size / n:,.0f} B")
        table.add_row(f"all {way}", f"{sum(counter.values()) / n:,.0f} B")
    return table


def phases(stats: SpecStats) -> Table:
    """Milliseconds of one round by phase."""
    n = max(1, stats.num_rounds)
    table = Table("phase", "ms a round", title="not counted: where the time of a round goes")
    table.columns[1].justify = "right"
    times: Mapping[str, int] = {
        "target decode": stats.target_ns,
        "draft decodes": stats.draft_ns,
        "sampling": stats.sample_ns,
        "rollback": stats.rollback_ns,
        "engine, the rest": stats.native_overhead_ns,
        "Python": stats.python_ns,
    }
    for name, ns in times.items():
        table.add_row(name, f"{ns / n / 1e6:.3f}")
    return table


def last(llama: Llama) -> SpecStats:
    stats = llama.spec_stats.last
    assert stats is not None
    return stats


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF with an MTP head")
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on the card; -1: all")
    parser.add_argument("--depth", type=int, default=3, help="drafts of every round")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, help="default: the host's")
    parser.add_argument("--times-only", action="store_true", help="count nothing: for a profiler")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    options: dict[str, Any] = {
        "spec_type": "draft-mtp",
        "spec_adaptive": False,
        "spec_draft_n_max": args.depth,
        "n_ctx": 1024,
        "n_gpu_layers": args.gpu_layers,
        "n_threads": args.threads,
        "verbose": False,
    }
    with quiet_host(), Llama(str(args.model), **options) as llama:
        prompt = chat_tokens(llama, PROMPTS["code_python"])
        generate(llama, prompt, 16)  # buffers and graphs are cold
        generate(llama, prompt, args.tokens)
        times = phases(last(llama))
    if args.times_only:
        console.print(times)
        return 0
    with counted() as of, quiet_host(), Llama(str(args.model), **options) as llama:
        start = generate(llama, prompt, 8)  # the prompt is in: what follows is rounds
        traffic = of(llama)
        text = llama.generate([*prompt, *start.tokens], temp=0.0)
        for _ in islice(text, args.tokens):
            pass
        text.close()
        stats = last(llama)
    console.print(per_round(traffic, stats), times)
    if args.json is not None:
        args.json.write_text(json.dumps({**traffic.as_dict(), **stats.as_dict()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
