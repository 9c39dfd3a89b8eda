"""Random sequences of everything one can do to an object, each answer compared with fresh stock.

    python tests/engine/test_stateful.py 100000

runs that many steps, divided among the architectures, and prints what they did. The test run does
2,000 (``LLAMA_MTP_STATEFUL_STEPS`` changes that).
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))
import hypothesis.strategies as st
import llama_cpp
import models
import numpy as np
import pytest
from conftest import COMMON, ModelFactory
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models.families import qwen3next
from sampling import GREEDY, SAMPLED, by_position, processors

from llama_mtp import Llama
from llama_mtp.measure.identity import clear, fresh_text

N_CTX = 256
N_BATCH = 32
DEPTH = 4
STEPS_PER_EXAMPLE = 50
OPTIONS: dict[str, Any] = {**COMMON, "n_ctx": N_CTX, "n_batch": N_BATCH}


SAMPLERS: tuple[dict[str, Any], ...] = (
    GREEDY,
    SAMPLED,
    {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temp": 0.0, "repeat_penalty": 1.4},
    {"temp": 1.0, "typical_p": 0.8, "presence_penalty": 0.3},
    {"mirostat_mode": 1},
    {"mirostat_mode": 2, "frequency_penalty": 0.2},
    {"temp": 0.8, "logits_processor": processors(by_position)},
)

samplers = st.sampled_from(range(len(SAMPLERS)))
seeds = st.integers(0, 3)  # few, so that prompts and prefixes come back
counts = st.integers(1, 14)
depths = st.integers(0, DEPTH)
proposals = st.none() | st.tuples(st.integers(0, 6), st.integers(0, 2))  # right, wrong
# On both sides of a batch, of two, and of the sliding window.
lengths = st.sampled_from([1, 2, 3, 7, 20, 31, 32, 33, 47, 49, 64, 65, 100])


class Failure(Exception):
    """What a callback raises here."""


@dataclass
class Stream:
    """An open generation and what it has to yield."""

    tokens: Any
    prompt: list[int]
    truth: list[int]
    taken: int = 0

    @property
    def evaluated(self) -> list[int]:
        """What the object holds once the latest token was yielded."""
        return self.prompt + self.truth[: self.taken - 1]


class Conversation(RuleBasedStateMachine):
    """One object of ours; the truth is a list of tokens and a freshly cleared stock object.

    ``context`` is what the object has evaluated. A stream that something else has overtaken is
    left lying. It is read on later, and finds its own text again; or it is dropped, and that may
    not disturb what runs by then.
    """

    model: models.Model
    plain: Any  # the stock object, cleared before each use
    did: ClassVar[Counter[str]] = Counter()
    steps: ClassVar[int] = 0
    tokens: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.fast = Llama(
            str(self.model.path),
            spec_type="draft-mtp",
            spec_draft_n_max=DEPTH,
            spec_adaptive=False,
            **OPTIONS,
        )
        self.context: list[int] = []
        self.stream: Stream | None = None
        self.left_lying: list[Stream] = []
        self.states: list[tuple[Any, list[int]]] = []

    def teardown(self) -> None:
        self.fast.close()

    # ---- what is true

    def count(self, name: str, *, step: bool = True) -> None:
        type(self).did[name] += 1
        type(self).steps += step

    def expect(self, prompt: Sequence[int], n: int, seed: int, sampler: int) -> list[int]:
        return fresh_text(self.plain, prompt, n, seed, **SAMPLERS[sampler])

    def overtake(self) -> None:
        """Something else uses the object: leave the stream where it is."""
        if self.stream is not None:
            self.left_lying.append(self.stream)
            self.stream = None

    def generate(self, prompt: list[int], n: int, seed: int, sampler: int) -> None:
        """Generate ``n`` tokens in one go and stop."""
        self.overtake()
        n = min(n, N_CTX - len(prompt))
        truth = self.expect(prompt, n, seed, sampler)
        self.fast.set_seed(seed)
        stream = self.fast.generate(prompt, **SAMPLERS[sampler])
        assert list(islice(stream, n)) == truth
        stream.close()
        self.context = prompt + truth[: n - 1]
        self.tokens_seen(n)

    def tokens_seen(self, n: int) -> None:
        type(self).tokens += n

    def room(self, n: int) -> bool:
        return len(self.context) + n <= N_CTX - 20

    @invariant()
    def the_text_is_what_was_evaluated(self) -> None:
        assert self.fast._input_ids.tolist() == self.context

    @invariant()
    def the_statistics_add_up(self) -> None:
        stats = self.fast.spec_stats
        assert 0 <= stats.num_accepted_tokens <= stats.num_draft_tokens
        assert stats.num_rounds <= stats.num_target_decodes or stats.num_rounds == 0

    # ---- prompts

    @rule(
        n_prompt=lengths,
        text=seeds,
        n=counts,
        depth=depths,
        seed=seeds,
        sampler=samplers,
    )
    def prompt_anew(
        self, n_prompt: int, text: int, n: int, depth: int, seed: int, sampler: int
    ) -> None:
        self.count("prompt, change depth")
        self.fast.spec_depth = depth
        self.generate(self.model.text(n_prompt, text), n, seed, sampler)

    @rule(more=st.sampled_from([1, 2, 5, 40]), text=seeds, n=counts, seed=seeds, sampler=samplers)
    def go_on_with_the_conversation(
        self, more: int, text: int, n: int, seed: int, sampler: int
    ) -> None:
        self.count("continue")
        if not self.room(more):
            self.context_reset()
        self.generate(self.context + self.model.text(more, text), n, seed, sampler)

    @precondition(lambda self: len(self.context) > 1)
    @rule(cut=st.integers(1, 40), other=st.integers(0, 3), n=counts, seed=seeds, sampler=samplers)
    def change_the_end_of_the_conversation(
        self, cut: int, other: int, n: int, seed: int, sampler: int
    ) -> None:
        """A shorter prompt, or another end; ``other`` 0 and ``cut`` small: a regenerated answer."""
        self.count("change the end")
        kept = self.context[: max(1, len(self.context) - cut - other)]
        self.generate(kept + self.model.text(other, other), n, seed, sampler)

    @precondition(lambda self: self.context)
    @rule(n=counts, seed=seeds, sampler=samplers)
    def prompt_exactly_what_is_there(self, n: int, seed: int, sampler: int) -> None:
        self.count("exact hit")
        self.generate(list(self.context), n, seed, sampler)

    @precondition(lambda self: self.context and self.room(10))
    @rule(more=st.integers(0, 5), text=seeds, n=counts, seed=seeds, sampler=samplers)
    def go_on_without_reset(self, more: int, text: int, n: int, seed: int, sampler: int) -> None:
        self.count("reset=False")
        self.overtake()
        added = self.model.text(more, text)
        prompt = self.context + added
        n = min(n, N_CTX - len(prompt))
        truth = self.expect(prompt, n, seed, sampler)
        self.fast.set_seed(seed)
        stream = self.fast.generate(added, reset=False, **SAMPLERS[sampler])
        assert list(islice(stream, n)) == truth
        stream.close()
        self.context = prompt + truth[: n - 1]
        self.tokens_seen(n)

    @rule(short=st.integers(1, 9), text=seeds, seed=seeds, sampler=samplers)
    def fill_the_context(self, short: int, text: int, seed: int, sampler: int) -> None:
        """To the last position and past it: the same tokens, then an exception as stock raises."""
        self.count("full context")
        self.overtake()
        prompt = self.model.text(N_CTX - short, text)
        outcomes = []
        clear(self.plain)
        for llama in (self.plain, self.fast):
            llama.set_seed(seed)
            emitted: list[int] = []
            try:
                for token in islice(llama.generate(prompt, **SAMPLERS[sampler]), 2 * N_CTX):
                    emitted.append(token)
                outcomes.append((emitted, None))
            except Exception as e:
                outcomes.append((emitted, type(e)))
        assert outcomes[0] == outcomes[1]
        self.context = self.fast._input_ids.tolist()
        assert self.context == (prompt + outcomes[0][0])[: len(self.context)]
        self.tokens_seen(len(outcomes[0][0]))

    @rule(n=st.sampled_from([1, 40]), text=seeds)
    def prompt_too_long(self, n: int, text: int) -> None:
        self.count("prompt too long")
        self.overtake()
        with pytest.raises(ValueError):
            self.fast.create_completion(self.model.text(N_CTX + n, text))

    # ---- streams

    @rule(
        n_prompt=lengths,
        follow=st.booleans(),
        text=seeds,
        reads=st.lists(st.tuples(counts, depths, proposals), min_size=1, max_size=3),
        seed=seeds,
        sampler=samplers,
    )
    def open_a_stream(
        self,
        n_prompt: int,
        follow: bool,
        text: int,
        reads: list[tuple[int, int, tuple[int, int] | None]],
        seed: int,
        sampler: int,
    ) -> None:
        self.count("open a stream")
        self.overtake()
        before = self.context if follow and self.room(n_prompt) else []
        prompt = before + self.model.text(n_prompt, text)
        truth = self.expect(prompt, min(50, N_CTX - len(prompt)), seed, sampler)
        self.fast.set_seed(seed)
        self.stream = Stream(self.fast.generate(prompt, **SAMPLERS[sampler]), prompt, truth)
        for n, depth, proposal in reads:
            self.read(n, depth, proposal, step=False)

    def take(self, n: int, proposed: list[int] | None = None) -> None:
        """Read the stream; at the end of what we know, stop it."""
        stream = self.stream
        assert stream is not None
        n = min(n, len(stream.truth) - stream.taken)
        if n <= 0:
            self.stop_the_stream()
            return
        got = [] if proposed is None else [stream.tokens.send(proposed)]
        got += islice(stream.tokens, n - len(got))
        assert got == stream.truth[stream.taken : stream.taken + n]
        stream.taken += n
        self.context = stream.evaluated
        self.tokens_seen(n)

    def stop_the_stream(self) -> None:
        assert self.stream is not None
        self.stream.tokens.close()
        self.stream = None

    def read(
        self, n: int, depth: int, proposal: tuple[int, int] | None, *, step: bool = True
    ) -> None:
        """Read on at some depth; ``proposal`` is how many right and wrong tokens to send."""
        stream = self.stream
        if stream is None:
            return
        self.fast.spec_depth = depth
        if proposal is None or stream.taken == 0:
            self.count("read a stream", step=step)
            self.take(n)
        else:
            self.count("send", step=step)
            right, wrong = proposal
            truth = stream.truth[stream.taken : stream.taken + right]
            self.take(n, [*truth, *self.model.text(wrong, 9)])

    @precondition(lambda self: self.stream)
    @rule(n=counts, depth=depths, proposal=proposals)
    def read_the_stream(self, n: int, depth: int, proposal: tuple[int, int] | None) -> None:
        self.read(n, depth, proposal)

    @precondition(lambda self: self.left_lying)
    @rule(which=st.integers(0, 5), n=counts)
    def go_on_with_an_overtaken_stream(self, which: int, n: int) -> None:
        self.count("read an overtaken stream")
        stream = self.left_lying.pop(which % len(self.left_lying))
        self.overtake()
        self.stream = stream
        self.take(n)

    @precondition(lambda self: self.stream)
    @rule()
    def stop(self) -> None:
        self.count("stop")
        self.stop_the_stream()

    @precondition(lambda self: self.left_lying)
    @rule(close=st.booleans())
    def drop_an_abandoned_stream(self, close: bool) -> None:
        self.count("drop an abandoned stream")
        stream = self.left_lying.pop(0)
        if close:
            stream.tokens.close()
        del stream

    @rule(n_prompt=lengths, text=seeds, at=st.integers(0, 9), seed=seeds, where=st.booleans())
    def exception_in_a_callback(
        self, n_prompt: int, text: int, at: int, seed: int, where: bool
    ) -> None:
        self.count("exception")
        self.overtake()
        prompt = self.model.text(n_prompt, text)
        truth = self.expect(prompt, at + 1, seed, 1)
        calls = 0

        def fail(ids: Any, row: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > at:
                raise Failure
            return row if where else False

        callback = (
            {"logits_processor": llama_cpp.LogitsProcessorList([fail])}
            if where
            else {"stopping_criteria": fail}
        )
        self.fast.set_seed(seed)
        stream = self.fast.generate(prompt, **callback, **SAMPLERS[1])
        assert list(islice(stream, at)) == truth[:at]
        with pytest.raises(Failure):
            next(stream)
        self.context = prompt + truth[:at]

    # ---- by hand

    def context_reset(self) -> None:
        self.overtake()
        self.fast.reset()
        self.context = []

    @precondition(lambda self: self.context)
    @rule()
    def reset(self) -> None:
        self.count("reset")
        self.context_reset()

    @precondition(lambda self: self.room(45))
    @rule(n=st.sampled_from([1, 2, 6, 33, 40]), text=seeds)
    def eval_by_hand(self, n: int, text: int) -> None:
        self.count("eval")
        self.overtake()
        added = self.model.text(n, text)
        self.fast.eval(added)
        self.context += added

    @precondition(lambda self: self.context)
    @rule(sampler=samplers, seed=seeds)
    def sample_by_hand(self, sampler: int, seed: int) -> None:
        self.count("sample")
        self.overtake()
        clear(self.plain)
        self.plain.eval(self.context)
        picks = []
        for llama in (self.plain, self.fast):
            llama.set_seed(seed)
            llama._sampler = None  # of the generation before: stock would go on with it
            picks.append(llama.sample(**SAMPLERS[sampler]))
        assert picks[0] == picks[1]

    @precondition(lambda self: len(self.context) > 1)
    @rule(cut=st.integers(1, 8), n=st.integers(1, 4), text=seeds)
    def go_back_by_hand(self, cut: int, n: int, text: int) -> None:
        """As scripts do it: lower ``n_tokens``, then evaluate something else."""
        self.count("go back")
        self.overtake()
        kept = max(0, len(self.context) - cut - n)
        self.fast.n_tokens = kept
        added = self.model.text(n, text)
        self.fast.eval(added)
        self.context = self.context[:kept] + added

    # ---- states

    @rule()
    def save(self) -> None:
        """Also in the middle of a stream, which goes on as if nothing had been."""
        self.count("save")
        self.states.append((self.fast.save_state(), list(self.context)))
        del self.states[:-3]

    @rule(n_prompt=lengths, text=seeds, n=counts)
    def save_with_stock(self, n_prompt: int, text: int, n: int) -> None:
        self.count("save with stock")
        prompt = self.model.text(n_prompt, text)
        truth = self.expect(prompt, n, 1, 1)
        self.states.append((self.plain.save_state(), prompt + truth[:-1]))
        del self.states[:-3]

    @precondition(lambda self: self.states)
    @rule(which=st.integers(0, 2), pickled=st.booleans(), n=counts, seed=seeds, sampler=samplers)
    def load(self, which: int, pickled: bool, n: int, seed: int, sampler: int) -> None:
        self.count("load")
        self.overtake()
        state, self.context = self.states[which % len(self.states)]
        self.context = list(self.context)
        self.fast.load_state(pickle.loads(pickle.dumps(state)) if pickled else state)
        assert self.fast._input_ids.tolist() == self.context
        if self.context and self.room(n):
            self.generate(list(self.context), n, seed, sampler)

    # ---- settings and completions

    @rule(
        cache=st.sampled_from(["as it is", "new", "new", "none"]),
        n_prompt=lengths,
        follow=st.booleans(),
        text=seeds,
        n=counts,
        seed=seeds,
        temperature=st.sampled_from([0.0, 0.9]),
        stop=st.sampled_from([[], ["e"], ["in", "a"]]),
        stream=st.booleans(),
    )
    def complete(
        self,
        cache: str,
        n_prompt: int,
        follow: bool,
        text: int,
        n: int,
        seed: int,
        temperature: float,
        stop: list[str],
        stream: bool,
    ) -> None:
        self.overtake()
        if cache != "as it is":
            new = llama_cpp.LlamaRAMCache(capacity_bytes=16 << 20)
            self.fast.set_cache(new if cache == "new" else None)
        self.count("complete" if self.fast.cache is None else "complete with a cache")
        before = self.context if follow and self.room(n_prompt + n) else []
        prompt = before + self.model.text(n_prompt, text)
        options: dict[str, Any] = {
            "max_tokens": n,
            "seed": seed,
            "temperature": temperature,
            "stop": stop,
            "stream": stream,
        }
        answers = []
        for llama in (self.plain, self.fast, self.fast):  # the second time from the cache
            clear(self.plain)
            answer = llama.create_completion(list(prompt), **options)
            answers.append([c["choices"] for c in answer] if stream else answer["choices"])
        assert answers[0] == answers[1] == answers[2]
        self.context = self.fast._input_ids.tolist()
        assert self.context == self.expect_evaluated(prompt, options)
        self.tokens_seen(2 * (len(self.context) - len(prompt) + 1))

    def expect_evaluated(self, prompt: list[int], options: dict[str, Any]) -> list[int]:
        """What stock has evaluated after this completion."""
        clear(self.plain)
        answer = self.plain.create_completion(list(prompt), **options)
        if options["stream"]:
            for _ in answer:
                pass
        ids: list[int] = self.plain._input_ids.tolist()
        return ids


def machine(model: models.Model, plain: Any) -> type[Conversation]:
    members = {"model": model, "plain": plain, "did": Counter(), "steps": 0, "tokens": 0}
    return type(f"Conversation_{model.arch}", (Conversation,), members)


def run_steps(model: models.Model, n_steps: int, *, derandomize: bool) -> type[Conversation]:
    """Run at least ``n_steps`` steps on one model; return the machine, which has counted them."""
    plain = llama_cpp.Llama(str(model.path), **OPTIONS)
    conversation = machine(model, plain)
    try:
        while conversation.steps < n_steps:
            left = n_steps - conversation.steps
            run_state_machine_as_test(
                conversation,
                settings=settings(
                    max_examples=max(1, -(-left // STEPS_PER_EXAMPLE)),
                    stateful_step_count=STEPS_PER_EXAMPLE,
                    deadline=None,
                    derandomize=derandomize,
                    database=None,
                    report_multiple_bugs=False,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        plain.close()
    return conversation


STEPS = int(os.environ.get("LLAMA_MTP_STATEFUL_STEPS", "2000"))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_any_sequence_of_calls(model: ModelFactory, arch: str) -> None:
    n_steps = -(-STEPS // len(models.ARCHITECTURES))
    conversation = run_steps(model(arch, state_scale=0.6), n_steps, derandomize=STEPS <= 2000)
    assert conversation.steps >= n_steps


def test_any_sequence_of_calls_with_a_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    """A trunk whose recurrent state has no snapshots."""
    path = qwen3next.build(tmp_path, 1, 1).path
    model = models.Model(path, "qwen3next", follow=np.zeros(0, np.int64), heads=())
    assert run_steps(model, 400, derandomize=True).steps >= 400


def main() -> None:
    n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    with tempfile.TemporaryDirectory() as name:
        for arch in models.ARCHITECTURES:
            m = models.build(Path(name) / f"{arch}.gguf", arch, state_scale=0.6)
            start = time.perf_counter()
            done = run_steps(m, -(-n_steps // len(models.ARCHITECTURES)), derandomize=False)
            took = time.perf_counter() - start
            print(
                f"{arch}: {done.steps} steps, {done.tokens} tokens compared with fresh "
                f"stock, {took:.0f} s: all the same"
            )
            print("  " + ", ".join(f"{k} {v}" for k, v in sorted(done.did.items())), flush=True)


if __name__ == "__main__":
    main()
