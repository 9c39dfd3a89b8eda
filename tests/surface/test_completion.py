"""Completions are stock's, chunk by chunk and dict by dict, at a cost that does not grow.

Stock runs with ``logits_all=True`` where log-probabilities are compared, freshly cleared before
every call; ours never has ``logits_all`` unless a test is about it.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from typing import Any

import llama_cpp
import models
import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_mtp import ClosedError, Llama, completion, text
from llama_mtp.measure.identity import clear

BYTE = models.N_SPECIAL  # id of the token of byte 0
WORD = models.FIRST_WORD + 27  # id of a two-letter word, "aa"


@pytest.fixture(scope="module")
def pair(model: ModelFactory) -> Iterator[tuple[Any, Any]]:
    """Return stock with all rows, and ours without, on a hybrid model whose text meanders."""
    path = str(model("qwen35", state_scale=1.0).path)
    plain = llama_cpp.Llama(path, **COMMON, logits_all=True)
    fast = Llama(path, **COMMON, spec_type="draft-mtp", spec_adaptive=False)
    yield plain, fast
    plain.close()
    fast.close()


def answers(llama: Any, prompt: Any, **options: Any) -> Any:
    """Return the chunks, ids and times taken out, or the class and text of the exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = llama.create_completion(prompt, **options)
            chunks = list(answer) if options.get("stream") else [answer]
    except Exception as e:
        return type(e), str(e)
    for chunk in chunks:
        assert chunk.pop("id").startswith("cmpl-")
        assert chunk.pop("created") > 0
        assert chunk.pop("model") == options.get("model", llama.model_path)
    return chunks


def assert_same(pair: tuple[Any, Any], prompt: Any, **options: Any) -> Any:
    """Compare both ways of asking; return the whole completion."""
    plain, fast = pair
    whole = None
    for stream in (True, False):
        clear(plain)
        expected = answers(plain, prompt, stream=stream, **options)
        whole = answers(fast, prompt, stream=stream, **options)
        assert_close(whole, expected)
    return whole[0]


def assert_close(got: Any, expected: Any) -> None:
    """Equal in every key, type, order and string; floats to within 1e-4."""
    if isinstance(expected, float | np.floating):
        assert type(got) is float
        assert got == pytest.approx(float(expected), abs=1e-4)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_close(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected), (got, expected)
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b)
    else:
        assert got == expected


def forced(*tokens: int, start: int) -> Any:
    """Return a logits processor that makes the text be ``tokens``, after ``start`` of them."""

    def force(input_ids: Any, scores: Any) -> Any:
        at = len(input_ids) - start
        if at < len(tokens):
            scores = np.full_like(scores, -np.inf)
            scores[tokens[at]] = 0.0
        return scores

    return llama_cpp.LogitsProcessorList([force])


def byte_tokens(text: str | bytes) -> list[int]:
    return [BYTE + b for b in (text.encode() if isinstance(text, str) else text)]


# ---- the same answers


def test_the_signature_is_the_one_we_know() -> None:
    """Arguments by position and by name mean the same, whatever stock's create_completion does."""
    stock = inspect.signature(llama_cpp.Llama._create_completion).parameters
    ours = inspect.signature(completion.Completion._complete).parameters
    assert list(ours)[1:] == list(stock)[1:]
    for name in list(stock)[2:]:
        if name != "stop":  # a mutable default there
            assert ours[name].default == stock[name].default


@pytest.mark.parametrize("max_tokens", [None, 0, -1, 1, 2, 50, 10_000])
def test_max_tokens(pair: tuple[Any, Any], max_tokens: int | None) -> None:
    got = assert_same(pair, "hello", max_tokens=max_tokens, seed=3)
    if max_tokens is not None and 0 < max_tokens <= 50:
        assert got["usage"]["completion_tokens"] == max_tokens
    else:
        assert got["usage"]["total_tokens"] >= 512


@pytest.mark.parametrize("stop", ["e", ["e", "o"], ["zz", ""], "aneru", [], None, ("e",)])
def test_stop_sequences(pair: tuple[Any, Any], stop: Any) -> None:
    assert_same(pair, "hello worldly", max_tokens=60, seed=3, stop=stop)


@pytest.mark.parametrize("length", [2, 3, 5, 9])
def test_a_stop_sequence_spans_tokens(pair: tuple[Any, Any], length: int) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0.0}
    text = assert_same(pair, "hello", **options)["choices"][0]["text"]
    for start in range(20, 32):
        stop = text[start : start + length]
        choice = assert_same(pair, "hello", stop=stop, **options)["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == text[: text.index(stop)]


def test_a_stop_sequence_begins_and_does_not_come(pair: tuple[Any, Any]) -> None:
    """What was held back goes out."""
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0}
    text = assert_same(pair, "hello", **options)["choices"][0]["text"]
    stops = [text[k : k + 4] + "?" for k in range(0, 40, 3)] + [text[-3:] + "more"]
    assert assert_same(pair, "hello", stop=stops, **options)["choices"][0]["text"] == text


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompt=st.text("abcdefghij ", max_size=12),
    stop=st.lists(st.text("aeioun", max_size=3), max_size=3),
    max_tokens=st.integers(-1, 40).filter(bool),
    seed=st.integers(0, 2**31),
    logprobs=st.none() | st.integers(0, 4),
    echo=st.booleans(),
)
def test_any_request(
    pair: tuple[Any, Any],
    prompt: str,
    stop: list[str],
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    echo: bool,
) -> None:
    if logprobs is not None and not prompt:
        prompt = "a"  # stock has IndexErrors there: test_logprobs_of_an_empty_prompt
    if max_tokens < 0:
        stop = [*stop, "e"]
    assert_same(
        pair,
        prompt,
        stop=stop,
        max_tokens=max_tokens,
        seed=seed,
        logprobs=logprobs,
        echo=echo,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"echo": True},
        {"suffix": " and so on"},
        {"suffix": ""},
        {"suffix": "x", "echo": True},
        {"model": "a name"},
        {"logit_bias": {WORD: 4.0, models.FIRST_WORD + 9: -50.0}},
        {"logit_bias": {str(WORD): 4.0}},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"mirostat_mode": 2},
        {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"seed": None},
    ],
)
def test_options(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    for prompt in ("hello", "", " hel lo", "☃"):
        assert_same(pair, prompt, max_tokens=30, **{"seed": 3, **options})


def test_bias_and_processors_together(pair: tuple[Any, Any]) -> None:
    """Stock's list.extend() makes it drop both: so do we, for the same tokens."""
    processors = [forced(WORD, WORD, WORD, start=6) for _ in pair]
    for stream in (True, False):
        got = []
        for llama, processor in zip(pair, processors, strict=True):
            clear(llama)
            options: dict[str, Any] = {"logits_processor": processor, "logit_bias": {WORD: 9.0}}
            got.append(answers(llama, "hello", stream=stream, seed=3, **options))
        assert got[0] == got[1]
    assert len(processors[0]) == len(processors[1]) == 3


def test_a_prompt_of_tokens(pair: tuple[Any, Any]) -> None:
    for prompt in ([models.BOS, WORD], [WORD, WORD + 1, WORD + 2], [models.BOS, models.BOS, WORD]):
        assert_same(pair, prompt, max_tokens=30, seed=1)
        assert_same(pair, prompt, max_tokens=30, seed=1, logprobs=2)
        assert_same(pair, prompt, max_tokens=30, seed=1, suffix="x")
    got = assert_same(pair, [WORD], max_tokens=5, echo=True)  # TypeError, of the same text
    assert got is TypeError or "usage" in got


def test_spm_infill(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    plain.spm_infill = fast.spm_infill = True
    try:
        assert_same(pair, "hello", suffix="world", max_tokens=20, seed=1)
    finally:
        plain.spm_infill = fast.spm_infill = False


def test_grammar_and_response_format(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ([a-m] | " "){1,30}', verbose=False)
    assert_same(pair, "hello", max_tokens=40, seed=4, grammar=grammar)
    assert_same(pair, "hello", max_tokens=40, seed=4, grammar=grammar, logprobs=2)
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}}
    schema["required"] = ["n"]  # type: ignore[assignment]
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a number"}],
        "response_format": {"type": "json_object", "schema": schema},
        "max_tokens": 40,
        "seed": 2,
    }
    clear(plain)
    expected = plain.create_chat_completion(**chat)
    got = fast.create_chat_completion(**chat)
    assert got["choices"] == expected["choices"]


def test_a_prompt_that_does_not_fit(pair: tuple[Any, Any]) -> None:
    got = [answers(llama, [WORD] * 512, max_tokens=3) for llama in pair]
    assert got[0] == got[1]
    assert got[0][0] is ValueError


def test_two_bos_warn(pair: tuple[Any, Any]) -> None:
    with pytest.warns(RuntimeWarning, match='Detected duplicate leading "<s>"'):
        pair[1].create_completion([models.BOS, models.BOS, WORD], max_tokens=1)


# ---- bytes and special tokens


TEXTS = [
    "é",
    "aé☃b😀c",
    "😀😀",
    "☃",
    b"\xff\xfe",  # never a character
    b"ab\xe2\x98",  # the beginning of one
    b"\x80\x80abc",
    b"\xf0\x9f\x98\x80\xf0\x9f",
    b"a\xc3\xc3\xa9b",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("logprobs", [None, 2])
def test_characters_that_span_tokens(
    pair: tuple[Any, Any], text: str | bytes, logprobs: int | None
) -> None:
    tokens = byte_tokens(text)
    for stop in ([], ["☃"], ["b"], ["é☃"], ["☃?", "😀!"]):
        for max_tokens in (2, len(tokens), len(tokens) + 6):
            assert_same(
                pair,
                [models.BOS, WORD],
                logits_processor=forced(*tokens, start=2),
                max_tokens=max_tokens,
                seed=1,
                stop=stop,
                logprobs=logprobs,
            )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    raw=st.lists(
        st.sampled_from([*"ab é☃😀"]).map(str.encode) | st.binary(min_size=1, max_size=2),
        min_size=1,
        max_size=8,
    ),
    stop=st.lists(st.text("abé☃", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 20),
)
def test_any_bytes(
    pair: tuple[Any, Any], raw: list[bytes], stop: list[str], max_tokens: int
) -> None:
    assert_same(
        pair,
        [models.BOS, WORD],
        logits_processor=forced(*byte_tokens(b"".join(raw)), start=2),
        max_tokens=max_tokens,
        seed=1,
        stop=stop,
    )


@pytest.mark.parametrize("prompt", ["", [models.BOS, WORD]])
def test_special_tokens_in_the_text(pair: tuple[Any, Any], prompt: Any) -> None:
    """A BOS, tokens without text, and a space after the BOS that an empty prompt begins with."""
    space = models.FIRST_WORD
    for tokens in (
        [models.BOS, space, WORD],
        [space, WORD, models.BOS, space, space],
        [0, 0, WORD, 0, BYTE + 0xE2, 0, BYTE + 0x98, BYTE + 0x83, 0],
        [models.BOS, models.BOS],
    ):
        start = 1 if prompt == "" else 2
        for stop in ([], ["aa"], [" "]):
            assert_same(
                pair,
                prompt,
                logits_processor=forced(*tokens, start=start),
                max_tokens=12,
                seed=1,
                stop=stop,
            )


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("logprobs", [None, 1])
def test_end_of_generation_anywhere_in_a_draft(
    pair: tuple[Any, Any], at: int, logprobs: int | None
) -> None:
    """The text ends there, and what comes next finds nothing of the rows after it."""
    plain, fast = pair
    probe = answers(fast, [models.BOS, WORD], max_tokens=20, temperature=0.0)
    tokens = fast.tokenize(probe[0]["choices"][0]["text"].encode(), add_bos=False)

    def end(input_ids: Any, scores: Any) -> Any:
        if len(input_ids) == 2 + at:
            scores = np.copy(scores)
            scores[models.EOS] = 1000.0
        return scores

    got = assert_same(
        pair,
        [models.BOS, WORD],
        logits_processor=llama_cpp.LogitsProcessorList([end]),
        max_tokens=20,
        temperature=0.0,
        logprobs=logprobs,
    )
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] == at
    assert fast.n_tokens == plain.n_tokens == 2 + at
    prompt = [models.BOS, WORD, *tokens[:at], WORD]
    assert_same(pair, prompt, max_tokens=20, temperature=0.0)


# ---- log-probabilities


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [0, 1, 5, -1, 10_000])
def test_logprobs(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    arch: str,
    echo: bool,
    logprobs: int,
) -> None:
    m = model(arch, state_scale=1.0)
    both = stock(m, logits_all=True), ours(m)
    n = 30 if 0 <= logprobs < 100 else 4
    prompt = "hello to the world of words"
    got = assert_same(both, prompt, max_tokens=n, seed=2, logprobs=logprobs, echo=echo)
    json.dumps(got)
    assert len(got["choices"][0]["logprobs"]["tokens"]) >= n
    assert n < 30 or both[1].spec_stats.num_accepted_tokens > 0
    # The prompt that was evaluated row by row is a prompt like any other afterwards.
    assert_same(both, prompt + " anew", max_tokens=20, seed=5)


def test_logprobs_with_all_rows(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3", state_scale=1.0)
    both = stock(m, logits_all=True), ours(m, logits_all=True)
    for echo in (False, True):
        assert_same(both, "hello", max_tokens=30, seed=2, logprobs=3, echo=echo)


def test_logprobs_with_stops_and_echo_of_one_token(pair: tuple[Any, Any]) -> None:
    for stop in (["e"], ["u", "ne"], []):
        assert_same(pair, "hello", max_tokens=30, seed=2, logprobs=3, stop=stop)
    assert_same(pair, [WORD], max_tokens=8, seed=2, logprobs=2)
    assert_same(pair, [models.BOS], max_tokens=8, seed=2, logprobs=2)


def test_equal_logits_are_listed_as_stock_lists_them(pair: tuple[Any, Any]) -> None:
    values = np.array([1.0, 3.0, 3.0, -np.inf, 3.0, 2.0, -np.inf], dtype=np.single)
    for n in range(8):
        expected = sorted(zip(values, range(len(values)), strict=True), reverse=True)[:n]
        assert text._largest(values, n).tolist() == [i for _, i in expected]


def test_logprobs_of_an_empty_prompt(pair: tuple[Any, Any]) -> None:
    """Whole: stock's rows, whichever they are. Streaming: stock fails, ours has each token once."""
    plain, fast = pair
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "logprobs": 2}
    clear(plain)
    whole = answers(fast, "", **options)
    assert_close(whole, answers(plain, "", **options))
    clear(plain)
    assert answers(plain, "", stream=True, **options)[0] is IndexError
    chunks = answers(fast, "", stream=True, **options)
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole[0]["choices"][0]["text"]
    for chunk in chunks[:-1]:  # greedy: the token is the most likely one of its own row
        (value,) = chunk["choices"][0]["logprobs"]["token_logprobs"]
        assert value == max(chunk["choices"][0]["logprobs"]["top_logprobs"][0].values())


def test_chat_top_logprobs(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": "are you in"}],
        "max_tokens": 20,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 4,
    }
    clear(plain)
    expected = plain.create_chat_completion(**chat)
    assert_close(fast.create_chat_completion(**chat)["choices"], expected["choices"])
    clear(plain)
    expected = [c["choices"] for c in plain.create_chat_completion(stream=True, **chat)]
    got = [c["choices"] for c in fast.create_chat_completion(stream=True, **chat)]
    assert_close(got, expected)


def test_rows_take_a_few_bytes(pair: tuple[Any, Any]) -> None:
    rows = text.Rows(text.Text(pair[1], chars=True), 5, models.N_VOCAB)
    logits = np.random.default_rng(0).normal(size=models.N_VOCAB).astype(np.single)
    for _ in range(1000):
        rows.add(logits, 3, 4)
    size = sum(len(a) * a.itemsize for a in (rows.own, rows.next, rows._ids, rows._values))
    assert size == 1000 * 48


# ---- cache, callbacks, lifetime


def test_cache(pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for llama in pair:
        llama.set_cache(llama_cpp.LlamaRAMCache())
    try:
        for prompt in ("hello", "other words", "hello", "hello again", ""):
            for stream in (False, True):
                got = [
                    answers(llama, prompt, max_tokens=20, temperature=0.0, stream=stream)
                    for llama in pair
                ]
                assert got[0] == got[1]
        keys = [list(llama.cache.cache_state) for llama in pair]
        assert keys[0] == keys[1]
    finally:
        for llama in pair:
            llama.set_cache(None)


def test_the_stopping_criterion_is_asked_at_the_end(pair: tuple[Any, Any]) -> None:
    """With the row that the last token came from."""
    seen: list[list[int]] = []
    tops: list[list[int]] = []
    for llama in pair:
        seen.append([])
        tops.append([])

        def criterion(input_ids: Any, row: Any) -> bool:
            seen[-1].append(len(input_ids))
            tops[-1].append(int(np.argmax(row)))
            return len(input_ids) >= 12

        clear(llama)
        got = answers(llama, "hello", max_tokens=40, temperature=0.0, stopping_criteria=criterion)
        assert got[0]["choices"][0]["finish_reason"] == "stop"
    assert seen[0] == seen[1]
    assert tops[1][-1] == tops[1][-2]  # greedy, and asked twice about the same row


def test_close_while_streaming(model: ModelFactory, ours: LlamaFactory) -> None:
    for logprobs in (None, 2):
        fast = ours(model("qwen35"))
        stream = fast.create_completion("hello", stream=True, max_tokens=50, logprobs=logprobs)
        next(stream)
        fast.close()
        with pytest.raises(ClosedError):
            list(stream)
        with pytest.raises(ClosedError):
            fast.create_completion("hello")


def test_a_stream_that_is_dropped(pair: tuple[Any, Any]) -> None:
    for n in range(1, 8):
        stream = pair[1].create_completion("hello", stream=True, max_tokens=50, seed=1)
        for _ in range(n):
            next(stream)
        stream.close()
        assert_same(pair, "hello", max_tokens=20, seed=3)


def test_a_tokenizer_of_the_callers_goes_the_stock_way(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory
) -> None:
    class Shouting(llama_cpp.LlamaTokenizer):
        def detokenize(self, tokens: Any, prev_tokens: Any = None, special: bool = False) -> bytes:
            return super().detokenize(tokens, prev_tokens, special).upper()

    m = model("hy_v3", state_scale=1.0)
    both = stock(m), ours(m)
    for llama in both:
        llama.tokenizer_ = Shouting(llama)
    got = assert_same(both, "hello", max_tokens=20, seed=1)
    assert got["choices"][0]["text"].isupper()


# ---- cost


def test_each_token_is_detokenised_once(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is counted, not timed: tests/bench/figures/completion.py has the microseconds."""
    fast = ours(model("qwen35"), n_ctx=1024)
    detokenized = []
    one = fast.tokenizer_.detokenize
    monkeypatch.setattr(
        fast.tokenizer_,
        "detokenize",
        lambda tokens, **rest: detokenized.append(len(tokens)) or one(tokens, **rest),
    )
    for stream in (False, True):
        detokenized.clear()
        answers(fast, "hello", max_tokens=900, stream=stream, stop=["???"])
        assert sum(detokenized) <= models.N_VOCAB
