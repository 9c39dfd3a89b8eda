"""``python -m llama_cpp.server``, unedited, under ``llama-mtp run``, and OpenAI's own client.

The stock server with the same model answers the same requests: at temperature 0, and with a seed.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
from conftest import ModelFactory
from programs import TIMEOUT, Programs

pytestmark = pytest.mark.clients

# A cache in single precision, as everywhere here: no two texts may part.
SERVER = ("--n_ctx", "512", "--n_threads", "1", "--n_threads_batch", "1")
SERVER += ("--type_k", "0", "--type_v", "0", "--verbose", "false")
MESSAGES = [
    {"role": "system", "content": "you are here"},
    {"role": "user", "content": "hello there"},
]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
}
ARCHITECTURES = ("qwen35", "mimo2")


class Both:
    """A client of the stock server and one of ours, and the rounds that ours did."""

    def __init__(self, stock: str, ours: str, programs: Programs) -> None:
        from openai import OpenAI

        self.stock, self.ours = (
            OpenAI(base_url=url, api_key="none", timeout=TIMEOUT, max_retries=0)
            for url in (stock, ours)
        )
        self.programs = programs

    def check_drafted(self) -> None:
        rounds = self.programs.rounds()
        assert rounds.accepted > 0, rounds


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(
    request: pytest.FixtureRequest, model: ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    m: models.Model = model(request.param, state_scale=0.6)
    programs = Programs(tmp_path_factory.mktemp("server"))
    args = ("--model", str(m.path), *SERVER, "--interrupt_requests", "false")
    options = ("--spec-type", "draft-mtp")
    with programs.server(*args, mtp=None) as stock, programs.server(*args, mtp=options) as ours:
        yield Both(stock, ours, programs)


def complete(client: Any, prompt: str = "hello", **options: Any) -> str:
    options = {"max_tokens": 48, "temperature": 0.0, **options}
    return str(client.completions.create(model="m", prompt=prompt, **options).choices[0].text)


def complete_stream(client: Any, prompt: str = "hello", **options: Any) -> list[str]:
    options = {"max_tokens": 48, "temperature": 0.0, **options}
    stream = client.completions.create(model="m", prompt=prompt, stream=True, **options)
    return [str(chunk.choices[0].text) for chunk in stream]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"logit_bias": {"300": 1.0}},
    {"temperature": 0.7, "seed": 1, "extra_body": {"mirostat_mode": 2, "min_tokens": 5}},
    {"extra_body": {"grammar": 'root ::= [a-m]+ "."'}},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_completions(both: Both, options: dict[str, Any]) -> None:
    expected = complete(both.stock, **options)
    assert complete(both.ours, **options) == expected
    assert complete_stream(both.ours, **options) == complete_stream(both.stock, **options)
    both.check_drafted()


def test_stop_sequence(both: Both) -> None:
    whole = complete(both.stock)
    stop = whole[30:33]  # the middle of a token, or two
    expected = complete(both.stock, stop=[stop])
    assert expected == whole[: whole.index(stop)]
    assert complete(both.ours, stop=[stop]) == expected
    assert complete_stream(both.ours, stop=[stop]) == complete_stream(both.stock, stop=[stop])
    both.check_drafted()


def chat(client: Any, messages: list[dict[str, str]] = MESSAGES, **options: Any) -> Any:
    options = {"max_tokens": 48, "temperature": 0.0, **options}
    return client.chat.completions.create(model="m", messages=messages, **options)


def chat_stream(client: Any, **options: Any) -> list[str | None]:
    return [chunk.choices[0].delta.content for chunk in chat(client, stream=True, **options)]


def test_chat(both: Both) -> None:
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        expected, got = (chat(c, **options) for c in (both.stock, both.ours))
        assert got.choices == expected.choices
        assert got.usage == expected.usage
        assert chat_stream(both.ours, **options) == chat_stream(both.stock, **options)
    both.check_drafted()


def test_a_conversation(both: Both) -> None:
    """Every turn reads the answers that came before it."""
    texts = []
    for client in (both.stock, both.ours):
        messages = list(MESSAGES)
        for turn in range(4):
            answer = chat(client, messages, max_tokens=24).choices[0].message.content
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": f"and {turn}"})
        texts.append([message["content"] for message in messages])
    assert texts[1] == texts[0]
    both.check_drafted()


def test_structured_output(both: Both) -> None:
    expected, got = (
        chat(c, response_format={"type": "json_object", "schema": SCHEMA}).choices[0].message
        for c in (both.stock, both.ours)
    )
    assert got.content == expected.content
    assert json.loads(got.content)["answer"] in ("yes", "no")


def test_forced_tool_call(both: Both) -> None:
    function = {"name": "decide", "parameters": SCHEMA}
    calls = []
    for client in (both.stock, both.ours):
        choice = {"type": "function", "function": {"name": "decide"}}
        message = (
            chat(client, tools=[{"type": "function", "function": function}], tool_choice=choice)
            .choices[0]
            .message
        )
        calls.append([(c.function.name, c.function.arguments) for c in message.tool_calls or []])
    assert calls[1] == calls[0]


def test_requests_at_once(both: Both) -> None:
    """The server takes one at a time; every answer is what it is alone."""
    prompts = ["hello", "hello you", "over there", "a b c d", "hello"]
    expected = [complete(both.stock, p) for p in prompts]
    start = threading.Barrier(2 * len(prompts))

    def one(index: int) -> str:
        prompt = prompts[index % len(prompts)]
        start.wait(TIMEOUT)
        if index < len(prompts):
            return complete(both.ours, prompt)
        return "".join(complete_stream(both.ours, prompt))

    with ThreadPoolExecutor(2 * len(prompts)) as pool:
        assert list(pool.map(one, range(2 * len(prompts)))) == expected * 2
    both.check_drafted()


def test_client_that_leaves_a_stream(both: Both) -> None:
    expected = complete(both.stock, "hello you")
    for n in (1, 2, 3, 5):
        stream = both.ours.completions.create(
            model="m", prompt="hello", stream=True, max_tokens=400, temperature=0.0
        )
        for _ in range(n):
            next(stream)
        stream.close()
        assert complete(both.ours, "hello you") == expected
    both.check_drafted()


def test_bad_request_and_the_next_one(both: Both) -> None:
    from openai import APIStatusError

    long = "hello " * 600
    codes = []
    for client in (both.stock, both.ours):
        with pytest.raises(APIStatusError) as caught:
            complete(client, long)
        codes.append(caught.value.status_code)
    assert codes[0] == codes[1]
    assert complete(both.ours) == complete(both.stock)


def test_stream_interrupted_by_the_next_request(
    model: ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The server's default: a request that comes in ends the stream that is running."""
    from httpx import RemoteProtocolError

    m = model("qwen35", state_scale=0.6)
    programs = Programs(tmp_path_factory.mktemp("server"))
    args = ("--model", str(m.path), *SERVER)
    with (
        programs.server(*args, mtp=None) as stock,
        programs.server(*args, mtp=("--spec-type", "mtp")) as ours,
    ):
        both = Both(stock, ours, programs)
        whole = complete(both.stock, "hello you")
        for client in (both.stock, both.ours) * 3:
            stream = client.completions.create(
                model="m", prompt="hello", stream=True, max_tokens=480, temperature=0.0
            )
            next(stream)
            assert complete(client, "hello you") == whole
            with contextlib.suppress(RemoteProtocolError):  # the stock server cuts it off
                assert len(list(stream)) < 479
        both.check_drafted()


def test_log_probabilities(model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> None:
    m = model("qwen35", state_scale=0.6)
    programs = Programs(tmp_path_factory.mktemp("server"))
    args = ("--model", str(m.path), *SERVER)
    with (
        programs.server(*args, "--logits_all", "true", mtp=None) as stock,
        programs.server(*args, mtp=("--spec-type", "draft-mtp")) as ours,
    ):
        both = Both(stock, ours, programs)
        for temperature in (0.0, 0.8):
            options = {"max_tokens": 40, "temperature": temperature, "seed": 5}
            expected, got = (
                c.completions.create(model="m", prompt="hello", logprobs=4, **options)
                .choices[0]
                .logprobs
                for c in (both.stock, both.ours)
            )
            assert got.tokens == expected.tokens
            assert got.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-3)
            assert got.text_offset == expected.text_offset
            expected, got = (
                chat(c, logprobs=True, top_logprobs=3, **options).choices[0].logprobs.content
                for c in (both.stock, both.ours)
            )
            assert [t.token for t in got] == [t.token for t in expected]
            assert [[t.token for t in token.top_logprobs] for token in got] == [
                [t.token for t in token.top_logprobs] for token in expected
            ]
            assert [t.logprob for t in got] == pytest.approx(
                [t.logprob for t in expected], abs=1e-3
            )
        both.check_drafted()
