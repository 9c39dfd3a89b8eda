"""Every sampler: same seed, same tokens; callbacks see one row, and the tokens before it."""

from __future__ import annotations

import ctypes
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import llama_cpp
import models
import numpy as np
import pytest
from conftest import LlamaFactory, ModelFactory, StockFactory
from sampling import (
    GRAMMARS,
    GREEDY,
    PROCESSORS,
    SAMPLED,
    SCHEMA,
    SETTINGS,
    Ids,
    Row,
    by_position,
    grammar,
    no_repeats,
    processors,
)

from llama_mtp.measure.identity import check_identity, clear, fresh_text, text


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_seed_same_tokens(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, settings: str
) -> None:
    arch = models.ARCHITECTURES[list(SETTINGS).index(settings) % len(models.ARCHITECTURES)]
    m = model(arch, state_scale=1.0)
    report = check_identity(stock(m), ours(m), m.text(12), 150, seed=3, **SETTINGS[settings])
    assert report.divergences == []


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_parts_where_its_rows_say_so(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, mode: int
) -> None:
    """Its state adds up the last bits of all rows: a stock chain given our rows agrees with us.

    And the check is no weaker for it: a chain with another learning rate is found out.
    """
    m = model("mimo2", state_scale=1.0)
    half = {"n_ctx": 1024, "type_k": None, "type_v": None}
    plain, fast = stock(m, **half), ours(m, **half)
    sampling = {"mirostat_mode": mode, "repeat_penalty": 1.3}
    for seed in range(3):
        report = check_identity(plain, fast, m.text(16, seed), 300, seed, 4, **sampling)
        assert report.illegal == []
    build = fast._init_sampler
    fast._init_sampler = lambda **options: build(**{**options, "mirostat_eta": 0.11})
    report = check_identity(plain, fast, m.text(16), 300, 1, 4, quiet=True, **sampling)
    assert report.illegal


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("name", GRAMMARS)
def test_grammar(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str, name: str
) -> None:
    m = model(arch, state_scale=0.6)
    plain, fast = stock(m), ours(m)
    for sampling in (GREEDY, SAMPLED, {"mirostat_mode": 2}):
        report = check_identity(
            plain, fast, m.text(8), 40, 5, grammar=grammar(GRAMMARS[name]), **sampling
        )
        assert report.divergences == []


def same_completions(plain: Any, fast: Any, method: str, *args: Any, **options: Any) -> Any:
    """Compare the answer and the stream; return our answer."""
    clear(plain)
    expected = getattr(plain, method)(*args, **options)
    got = getattr(fast, method)(*args, **options)
    assert got["choices"] == expected["choices"]
    assert got["usage"] == expected["usage"]
    clear(plain)
    pieces = [c["choices"] for c in getattr(plain, method)(*args, stream=True, **options)]
    assert [c["choices"] for c in getattr(fast, method)(*args, stream=True, **options)] == pieces
    return got


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_json_schema_response_format(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=0.6)
    plain, fast = stock(m), ours(m)
    chat = [{"role": "user", "content": "one or two"}]
    for options in (
        {"response_format": {"type": "json_object", "schema": SCHEMA}, "temperature": 0.0},
        {"response_format": {"type": "json_object", "schema": SCHEMA}, "seed": 4},
        {"response_format": {"type": "json_object"}, "seed": 5, "temperature": 1.2},
    ):
        got = same_completions(
            plain, fast, "create_chat_completion", chat, max_tokens=120, **options
        )
        choice = got["choices"][0]
        if choice["finish_reason"] == "stop":
            answer = json.loads(choice["message"]["content"])
            if "schema" in options["response_format"]:
                assert set(answer) == set(SCHEMA["required"])


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_logit_bias(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    wanted, banned = models.FIRST_WORD + 5, models.FIRST_WORD + 9
    for bias in ({wanted: 6.0}, {banned: -100.0, wanted: 3.0}, {str(wanted): 100}):
        for options in ({"seed": 2}, {"temperature": 0.0}, {"seed": 3, "mirostat_mode": 2}):
            same_completions(
                plain, fast, "create_completion", "in", max_tokens=50, logit_bias=bias, **options
            )


# ---- what callbacks see


@dataclass
class Recorder:
    """A callback that remembers its arguments; ``answer`` is what it returns, None for the row."""

    answer: Any = None
    ids: list[list[int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __call__(self, ids: Ids, row: Row) -> Any:
        self.ids.append([int(i) for i in ids])
        self.rows.append(np.array(row))
        return row if self.answer is None else self.answer


def assert_same_rows(got: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(got) == len(expected)
    for mine, truth in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, {"mirostat_mode": 1}], ids=str)
def test_logits_processor(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    name: str,
    sampling: dict[str, Any],
) -> None:
    """Each row once, its own logits, exactly the tokens before it: as with stock."""
    m = model(arch, state_scale=1.0, right=0.9)
    plain, fast = stock(m), ours(m)
    prompt = m.text(12)
    expected, got = Recorder(), Recorder()
    truth = fresh_text(
        plain,
        prompt,
        120,
        logits_processor=processors(expected, *PROCESSORS[name]),
        **sampling,
    )
    mine = text(fast, prompt, 120, logits_processor=processors(got, *PROCESSORS[name]), **sampling)
    assert mine == truth
    assert got.ids == expected.ids
    assert got.ids == [(prompt + truth)[: len(prompt) + i] for i in range(120)]
    assert_same_rows(got.rows, expected.rows)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_processors_see_no_row_before_its_token_is_asked_for(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    """A row is sampled when its token is asked for, not when its round is verified."""
    m = model(arch, right=1.0, state_scale=0.1)
    fast = ours(m)
    seen = Recorder()
    stream = fast.generate(m.text(10), temp=0.0, logits_processor=processors(seen))
    for n in range(1, 40):
        next(stream)
        assert len(seen.ids) == n
    assert fast.spec_stats.mean_acceptance_length > 2


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_stopping_criteria(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    sampling: dict[str, Any],
) -> None:
    """The ids as stock's, and the row that the token was sampled from (stock hands out another)."""
    m = model(arch, state_scale=1.0, right=0.9)
    plain, fast = stock(m, logits_all=True), ours(m)
    prompt = m.text(12)
    expected, got = Recorder(answer=False), Recorder(answer=False)
    truth = fresh_text(plain, prompt, 100, stopping_criteria=expected, **sampling)
    rows = [plain.scores[len(ids) - 1].copy() for ids in expected.ids]
    assert text(fast, prompt, 100, stopping_criteria=got, **sampling) == truth
    assert got.ids == expected.ids
    assert_same_rows(got.rows, rows)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_stopping_criteria_stop_where_stock_does(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    prompt = m.text(12)
    for length in range(12, 30):

        def criteria(ids: Ids, row: Row, length: int = length) -> bool:
            return len(ids) >= length

        stop = llama_cpp.StoppingCriteriaList([criteria])
        truth = fresh_text(plain, prompt, 100, stopping_criteria=stop, **SAMPLED)
        assert len(truth) == length - 12
        assert text(fast, prompt, 100, stopping_criteria=stop, **SAMPLED) == truth
        # Mid-round; the generation goes on from there as if it had not stopped.
        longer = fresh_text(plain, prompt + truth, 10, **SAMPLED)
        assert text(fast, prompt + truth, 10, **SAMPLED) == longer
    for stream in (False, True):
        outcomes = []
        for llama in (plain, fast):
            clear(llama)
            answer = llama.create_completion(
                prompt, max_tokens=50, seed=1, stopping_criteria=stop, stream=stream
            )
            outcomes.append([c["choices"] for c in answer] if stream else answer["choices"])
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_callbacks_with_everything_else(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    """Processor, bias, grammar, penalties and stop words in one completion."""
    m = model(arch, state_scale=1.0)
    plain, fast = stock(m), ours(m)
    for seed in range(4):
        same_completions(
            plain,
            fast,
            "create_completion",
            "you are",
            max_tokens=60,
            seed=seed,
            stop=["zz"],
            logits_processor=processors(by_position, no_repeats),
            logit_bias={models.FIRST_WORD + 3: 2.0},
            grammar=grammar(GRAMMARS["letters"]),
            repeat_penalty=1.1,
        )


# ---- exceptions in callbacks


class Oops(BaseException):
    """Not even an Exception."""


def set_interrupt() -> None:
    ctypes.pythonapi.PyErr_SetInterrupt()


def raiser(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


FAILURES: dict[str, tuple[Callable[[], None], type[BaseException]]] = {
    "ValueError": (raiser(ValueError("mine")), ValueError),
    "KeyboardInterrupt": (raiser(KeyboardInterrupt()), KeyboardInterrupt),
    "SystemExit": (raiser(SystemExit(3)), SystemExit),
    "BaseException": (raiser(Oops()), Oops),
    "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
    "PyErr_SetInterrupt": (set_interrupt, KeyboardInterrupt),
}


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("callback", ["logits_processor", "stopping_criteria"])
def test_exception_in_a_callback(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    failure: str,
    callback: str,
) -> None:
    """It comes out as itself, whichever row of a round it was; what follows is right."""
    m = model(arch, state_scale=0.3, right=0.9)
    plain, fast = stock(m), ours(m)
    prompt = m.text(12)
    truth = fresh_text(plain, prompt, 30, **SAMPLED)
    act, kind = FAILURES[failure]
    for at in range(8):
        calls = 0

        def fail(ids: Ids, row: Row, at: int = at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                act()
                for _ in range(1000):  # where Python looks for signals
                    pass
            return row if callback == "logits_processor" else False

        options = {callback: processors(fail) if callback == "logits_processor" else fail}
        fast.set_seed(1)
        stream = fast.generate(prompt, **options, **SAMPLED)
        assert list(islice(stream, at)) == truth[:at]
        with pytest.raises(kind) as caught:
            next(stream)
        if failure == "ValueError":
            assert caught.type is ValueError and str(caught.value) == "mine"
        assert next(stream, None) is None
        # Usable: the same prompt, or on from what was emitted, without a reset in between.
        if at % 2:
            assert text(fast, prompt, 30, **SAMPLED) == truth
        else:
            further = prompt + truth[:at]
            assert text(fast, further, 15, **SAMPLED) == fresh_text(plain, further, 15, **SAMPLED)


def test_exception_through_completions(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35", state_scale=0.3)
    plain, fast = stock(m), ours(m)

    def fail(ids: Ids, row: Row) -> Row:
        if len(ids) > 20:
            raise LookupError("mine")
        return row

    expected = plain.create_completion("hello", max_tokens=30, seed=2)
    for stream in (False, True):
        with pytest.raises(LookupError, match="mine"):
            answer = fast.create_completion(
                "hello", max_tokens=60, seed=2, logits_processor=processors(fail), stream=stream
            )
            for _ in answer:
                pass
        got = fast.create_completion("hello", max_tokens=30, seed=2)
        assert got["choices"] == expected["choices"]


def test_exception_in_sample(model: ModelFactory, ours: LlamaFactory) -> None:
    """The low-level calls raise too, and leave no error behind for a later call."""
    m = model("hy_v3")
    fast = ours(m)
    fast.eval(m.text(5))
    with pytest.raises(LookupError):
        fast.sample(logits_processor=processors(lambda ids, row: {}[1]))
    assert fast.sample(temp=0.0) == fast.sample(temp=0.0)
