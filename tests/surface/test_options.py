"""The options: where they may be given, which values they take, and what they change."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sysconfig
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import models
import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from sampling import GREEDY

from llama_mtp import Llama, SpecTypeError
from llama_mtp.settings import MAX_DEPTH, PREFILL_WINDOW, SpecOptions, read_options

# Keyword, environment variable, field; default; a variable's text and what it says; another value.
KEYWORDS: tuple[tuple[str, str, str, Any, str, Any, Any], ...] = (
    ("spec_type", "LLAMA_ARG_SPEC_TYPE", "spec_type", "auto", "none", "none", "draft-mtp"),
    ("spec_draft_n_max", "LLAMA_ARG_SPEC_DRAFT_N_MAX", "n_max", 3, "2", 2, 5),
    ("spec_draft_p_min", "LLAMA_ARG_SPEC_DRAFT_P_MIN", "p_min", 0.0, "0.25", 0.25, 0.5),
    ("spec_draft_model", "LLAMA_ARG_SPEC_DRAFT_MODEL", "draft_model", None, "7", "7", "x.gguf"),
    ("spec_draft_type_k", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K", "type_k", None, "q8_0", 8, 0),
    ("spec_draft_type_v", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V", "type_v", None, "BF16", 30, 1),
    ("spec_adaptive", "LLAMA_MTP_ADAPTIVE", "adaptive", True, "off", False, True),
)
VARIABLES: tuple[tuple[str, str, Any, str, Any], ...] = (
    ("LLAMA_ARG_CTX_CHECKPOINTS", "checkpoints", 4, "2", 2),
    ("LLAMA_MTP_PREFILL_WINDOW", "prefill_window", PREFILL_WINDOW, "0", 0),
    ("LLAMA_MTP_ALLOW_UNTESTED", "allow_untested", False, "1", True),
)
NAMES = [option[0] for option in KEYWORDS]
COMMAND = str(Path(sysconfig.get_path("scripts"), "llama-mtp"))
# A cache in these types needs flash attention, whose width of a head is that of a block.
Q8_0: dict[str, Any] = {"type_k": 8, "type_v": 8, "flash_attn": True}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [*(o[1] for o in KEYWORDS), *(o[0] for o in VARIABLES)]:
        monkeypatch.delenv(variable, raising=False)


# ---- where they may be given


@pytest.mark.parametrize("option", KEYWORDS, ids=NAMES)
def test_a_keyword_beats_its_variable_which_beats_the_default(
    option: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyword, variable, name, default, text, said, value = option
    assert getattr(read_options(), name) == default
    monkeypatch.setenv(variable, f" {text} ")
    assert getattr(read_options(), name) == said
    assert getattr(read_options(**{keyword: None}), name) == said
    assert getattr(read_options(**{keyword: value}), name) == value
    monkeypatch.setenv(variable, " ")
    assert getattr(read_options(), name) == default


@pytest.mark.parametrize("option", VARIABLES, ids=lambda option: option[0])
def test_some_options_have_a_variable_alone(
    option: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, name, default, text, said = option
    assert getattr(read_options(), name) == default
    monkeypatch.setenv(variable, text)
    assert getattr(read_options(), name) == said


def test_the_constructor_has_the_stock_arguments_and_seven_of_its_own() -> None:
    parameters = inspect.signature(Llama).parameters
    assert set(inspect.signature(llama_cpp.Llama).parameters) - {"kwargs"} <= set(parameters)
    assert sorted(name for name in parameters if name.startswith("spec_")) == sorted(NAMES)
    assert {parameters[name].default for name in NAMES} == {None}


def test_run_has_a_flag_for_each_of_the_seven(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from llama_mtp.settings import read_options\n"
        "print(json.dumps([sys.argv[1:], asdict(read_options())]))\n"
    )
    head = tmp_path / "head.gguf"
    head.touch()
    given: dict[str, Any] = {
        "spec_type": "mtp",
        "spec_draft_n_max": 5,
        "spec_draft_p_min": 0.5,
        "spec_draft_model": head.name,
        "spec_draft_type_k": "q8_0",
        "spec_draft_type_v": "f32",
    }
    assert [*given, "spec_adaptive"] == NAMES
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    given["spec_draft_model"] = str(head.resolve())
    for switch, adaptive in (("--spec-adaptive", True), ("--no-spec-adaptive", False)):
        done = run(tmp_path, *flags, switch, script.name, switch)
        assert done.returncode == 0, done.stderr
        expected = read_options(**given, spec_adaptive=adaptive)
        seen = json.loads(done.stdout)
        assert seen == [[switch], vars(expected)]


def test_run_refuses_what_an_option_does_not_take_before_the_script_runs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    for flag in ("--spec-draft-p-min=2", "--spec-draft-type-k=q9", "--spec-draft-n-max=65"):
        done = run(tmp_path, flag, script.name)
        assert (done.returncode, done.stdout) == (1, "")
        keyword, value = flag[2:].replace("-", "_").split("=")
        assert done.stderr.startswith(f"error: {keyword} takes ")
        assert value in done.stderr and len(done.stderr.splitlines()) == 1


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "run", *args],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


@given(st.data())
def test_the_keywords_of_options_make_the_same_options(data: st.DataObject) -> None:
    given_: dict[str, Any] = {
        "spec_type": data.draw(st.sampled_from(["auto", "mtp"])),
        "spec_draft_n_max": data.draw(st.integers(0, MAX_DEPTH)),
        "spec_draft_p_min": data.draw(st.floats(0, 1, exclude_max=True)),
        "spec_draft_model": data.draw(st.none() | st.just("x.gguf")),
        "spec_draft_type_k": data.draw(st.sampled_from([None, "f16", 8])),
        "spec_draft_type_v": data.draw(st.sampled_from([None, "f32", 30])),
        "spec_adaptive": data.draw(st.booleans()),
    }
    options = read_options(**given_)
    assert list(options.keywords()) == NAMES
    assert read_options(**options.keywords()) == options


def test_a_pickled_object_has_its_options_where_the_variables_are_others(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_SPEC_DRAFT_N_MAX", "2")
    pickled = pickle.dumps(ours(model("hy_v3")))
    monkeypatch.delenv("LLAMA_ARG_SPEC_DRAFT_N_MAX")
    with pickle.loads(pickled) as again:
        assert (again.spec_type, again.spec_depth) == ("draft-mtp", 2)


def test_without_a_spec_type_a_variable_for_the_head_is_no_contradiction(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_SPEC_DRAFT_MODEL", "head.gguf")
    with Llama(str(model("hy_v3").path), spec_type="none", **COMMON) as llm:
        pickled = pickle.dumps(llm)
    with pickle.loads(pickled) as again:
        assert again.spec_type == "none"
    with pytest.raises(SpecTypeError, match="leave one of the two out"):
        read_options(spec_type="none", spec_draft_model="head.gguf")


# ---- keywords that there are not


@pytest.mark.parametrize(
    ("keyword", "instead"),
    [
        ("spec_depth", "pass spec_adaptive=False for a constant depth"),
        ("spec_draft_adaptive", "pass spec_adaptive="),
        ("spec_draft_n_min", "leave it out"),
        ("spec_checkpoints", "set the environment variable LLAMA_ARG_CTX_CHECKPOINTS"),
        ("spec_prefill_window", "set the environment variable LLAMA_MTP_PREFILL_WINDOW"),
        ("spec_allow_untested", "set the environment variable LLAMA_MTP_ALLOW_UNTESTED"),
    ],
)
def test_a_keyword_that_is_gone_names_its_successor(
    model: ModelFactory, keyword: str, instead: str
) -> None:
    for value in (None, "fixed", 1):
        with pytest.raises(TypeError) as caught:
            Llama(str(model("hy_v3").path), **{keyword: value}, **COMMON)
        assert str(caught.value) == f"{keyword}= is gone; {instead}."


# A slip in the last letter of these two may mean the other.
UNMISTAKABLE = sorted(set(NAMES) - {"spec_draft_type_k", "spec_draft_type_v"})


@given(st.sampled_from(UNMISTAKABLE), st.data())
def test_an_unknown_keyword_is_refused_and_the_nearest_is_named(
    meant: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(len("spec_"), len(meant) - 1))
    slip = data.draw(st.sampled_from(["", "q", meant[at] * 2]))
    typed = meant[:at] + slip + meant[at + 1 :]
    with pytest.raises(TypeError, match=f"no argument {typed}=; did you mean {meant}=\\?"):
        Llama("no such file.gguf", **{typed: 1})


# ---- which values they take


@pytest.mark.parametrize(
    ("keyword", "value", "plain"),
    [
        ("spec_draft_n_max", np.int64(2), 2),
        ("spec_draft_n_max", np.uint8(0), 0),
        ("spec_draft_n_max", True, 1),
        ("spec_draft_p_min", np.float32(0.5), 0.5),
        ("spec_draft_p_min", np.float64(0.5), 0.5),
        ("spec_draft_p_min", 0, 0.0),
        ("spec_draft_p_min", np.int32(0), 0.0),
        ("spec_draft_model", Path("a", "head.gguf"), str(Path("a", "head.gguf"))),
        ("spec_draft_model", b"head.gguf", "head.gguf"),
        ("spec_draft_type_k", GGMLQuantizationType.Q4_0, 2),
        ("spec_draft_type_k", np.int32(20), 20),
        ("spec_draft_type_v", "IQ4_NL", 20),
        ("spec_adaptive", 0, False),
        ("spec_adaptive", 1, True),
        ("spec_adaptive", np.bool_(False), False),
        ("spec_adaptive", np.int64(1), True),
    ],
)
def test_values_are_taken_as_programs_have_them(keyword: str, value: Any, plain: Any) -> None:
    taken = read_options(**{keyword: value}).keywords()[keyword]
    assert (taken, type(taken)) == (plain, type(plain))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("spec_type", 5),
        ("spec_type", b"mtp"),
        ("spec_draft_n_max", "3"),
        ("spec_draft_n_max", 3.0),
        ("spec_draft_n_max", [3]),
        ("spec_draft_p_min", "0.5"),
        ("spec_draft_p_min", 1j),
        ("spec_draft_p_min", float("nan")),
        ("spec_draft_model", 7),
        ("spec_draft_model", ["head.gguf"]),
        ("spec_draft_type_k", "q9"),
        ("spec_draft_type_k", 8.0),
        ("spec_draft_type_v", 14),  # llama.cpp has no cache in Q6_K
        ("spec_draft_type_v", []),
        ("spec_adaptive", "fixed"),
        ("spec_adaptive", 2),
        ("spec_adaptive", {}),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_in_one_sentence(keyword: str, value: Any) -> None:
    with pytest.raises(SpecTypeError) as caught:
        Llama("no such file.gguf", **{keyword: value})
    message = str(caught.value)
    assert message.startswith(f"{keyword} takes a") or message.startswith(f"{keyword} takes True")
    assert message.endswith(f", got {value!r}.")
    assert ". " not in message and "\n" not in message


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("LLAMA_ARG_SPEC_DRAFT_N_MAX", "two"),
        ("LLAMA_ARG_SPEC_DRAFT_N_MAX", "2.5"),
        ("LLAMA_ARG_SPEC_DRAFT_N_MAX", "-1"),
        ("LLAMA_ARG_SPEC_DRAFT_P_MIN", "1.5"),
        ("LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K", "q9"),
        ("LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V", "F 16"),
        ("LLAMA_MTP_ADAPTIVE", "fixed"),
        ("LLAMA_ARG_CTX_CHECKPOINTS", "-1"),
        ("LLAMA_MTP_PREFILL_WINDOW", "all"),
        ("LLAMA_MTP_ALLOW_UNTESTED", "perhaps"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(SpecTypeError) as caught:
        Llama("no such file.gguf")
    message = str(caught.value)
    assert message.startswith(f"{variable} takes ") and message.endswith(f", got {text!r}.")


@given(st.integers())
def test_a_depth_is_taken_up_to_the_largest(depth: int) -> None:
    assert taken("spec_draft_n_max", depth) == (0 <= depth <= MAX_DEPTH)


@given(st.floats())
def test_a_probability_is_taken_below_one(probability: float) -> None:
    assert taken("spec_draft_p_min", probability) == (0 <= probability < 1)


def taken(keyword: str, value: Any) -> bool:
    try:
        options: SpecOptions = read_options(**{keyword: value})
    except SpecTypeError:
        return False
    return bool(options.keywords()[keyword] == value)


# ---- what they change


def tokens(llm: Any, prompt: list[int], n: int) -> list[int]:
    return list(islice(llm.generate(prompt, **GREEDY), n))


def test_a_constant_depth_drafts_on_where_the_adaptive_one_has_stopped(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3", right=0.0)
    for adaptive in (True, False):
        fast = ours(m, spec_adaptive=adaptive)
        tokens(fast, m.text(10), 400)
        last = fast.spec_stats.last
        assert (last.num_draft_tokens < 3 * (last.num_rounds - 3)) == adaptive


def test_below_the_least_probability_nothing_is_drafted(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("hy_v3")
    counts = []
    for p_min in (0.0, 0.999999):
        fast = ours(m, spec_draft_p_min=p_min)
        tokens(fast, m.text(10), 60)
        counts.append(fast.spec_stats.num_draft_tokens)
    assert counts[0] > 50 and counts[1] == 0


def test_checkpoints_are_kept_unless_the_variable_says_none(
    model: ModelFactory, ours: LlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("qwen35")
    for number in ("", "0"):
        monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", number)
        fast = ours(m)
        tokens(fast, m.text(60), 5)
        assert ("checkpoints" in fast.spec_memory()) == (number == "")


# ---- the draft context's cache


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_the_draft_cache_has_the_types_of_the_targets(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch)

    def size(**options: Any) -> int:
        # So long a context that the sizes are whole MiB; the host tells them to hundredths.
        return int(ours(m, n_ctx=8192, **options).spec_memory()["draft KV"])

    f32, f16, q8_0 = size(), size(type_k=1, type_v=1), size(**Q8_0)
    assert f32 == 2 * f16 and f16 > q8_0
    assert size(spec_draft_type_k="f16", spec_draft_type_v=1) == f16
    assert size(**Q8_0, spec_draft_type_k="f16", spec_draft_type_v="f16") == f16
    assert size(spec_draft_type_k="f16") == (f32 + f16) // 2  # V as the target's


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_a_quantized_draft_cache_drafts_the_same_text(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, arch: str
) -> None:
    m = model(arch)
    fast = ours(m, spec_draft_type_k="q8_0", spec_draft_type_v="q8_0", flash_attn=True)
    prompt = m.text(20)
    emitted = tokens(fast, prompt, 100)
    assert emitted == tokens(stock(m, flash_attn=True), prompt, 100)
    expected = models.expected_acceptance(m, prompt, emitted, 3)
    assert fast.spec_stats.num_accepted_tokens == expected.accepted > 0


@pytest.fixture
def narrow_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.Model:
    """A head whose rows do not fill a block of Q8_0, for a model whose rows do."""
    monkeypatch.setattr(models, "HEAD_DIM", models.HEAD_DIM // 2)
    monkeypatch.setattr(models, "N_HEAD", 2 * models.N_HEAD)
    head = models.build(tmp_path / "head.gguf", "hy_v3", head_only=True)
    monkeypatch.undo()
    return head


def test_where_the_targets_types_do_not_fit_the_head_its_cache_is_the_hosts_default(
    model: ModelFactory, stock: StockFactory, ours: LlamaFactory, narrow_head: models.Model
) -> None:
    m = model("hy_v3", head=None)
    fast = ours(m, spec_draft_model=narrow_head.path, **Q8_0)
    other = ours(m, spec_draft_model=narrow_head.path, type_k=1, type_v=1)
    assert fast.spec_memory()["draft KV"] == other.spec_memory()["draft KV"]
    prompt = m.text(20)
    emitted = tokens(fast, prompt, 100)
    assert emitted == tokens(stock(m, **Q8_0), prompt, 100)
    expected = models.expected_acceptance(narrow_head, prompt, emitted, 3)
    assert fast.spec_stats.num_accepted_tokens == expected.accepted > 0


def test_types_that_the_host_refuses_are_refused_with_the_remedy(
    model: ModelFactory, ours: LlamaFactory, narrow_head: models.Model
) -> None:
    m = model("hy_v3", head=None)
    for options in (
        {"spec_draft_type_v": "q8_0"},  # quantized V without flash attention
        {"spec_draft_type_k": "q8_0", "flash_attn": True},
    ):
        with pytest.raises(
            SpecTypeError, match="leave out spec_draft_type_k and spec_draft_type_v"
        ):
            ours(m, spec_draft_model=narrow_head.path, **options)
