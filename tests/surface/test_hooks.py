"""The hooks and the registry: loading, spec types, and what happens to a broken plugin."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pluggy
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory

from llama_mtp import Llama, hooks, registry
from llama_mtp.errors import SpecTypeError
from llama_mtp.hooks import (
    Draft,
    DraftRequest,
    SpecSettings,
    SpecType,
    Verdict,
    hookimpl,
    specs,
)
from llama_mtp.measure.identity import fresh_text, text

SPECS = [
    name
    for name, member in vars(specs).items()
    if inspect.isfunction(member) and hasattr(member, f"{hooks.NAMESPACE}_spec")
]
SETTINGS = SpecSettings("draft-mtp", n_max=3, p_min=0.0, n_ctx=64, n_vocab=32)


Register = Callable[[object, str], None]


class Repeat:
    """A drafter that repeats the last token."""

    def draft(self, request: DraftRequest) -> Draft:
        return Draft([int(request.tokens[-1])] * request.n_max)


def spec_type(name: str = "repeat", **changes: Any) -> SpecType:
    return dataclasses.replace(SpecType(name, lambda settings: Repeat()), **changes)


def offering(*offers: object) -> object:
    """A plugin that registers these."""

    class Plugin:
        @hookimpl
        def mtp_register_spec_types(self, register: Callable[[Any], None]) -> None:
            for offer in offers:
                register(offer)

    return Plugin()


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    registry.reset()
    yield
    registry.reset()


@pytest.fixture
def register() -> Register:
    def register(plugin: object, name: str) -> None:
        registry.plugin_manager().register(plugin, name=name)

    return register


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Install modules, given as name=source, as plugins of those names."""

    def install(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"plugin_{name}.py").write_text(source)
            info = tmp_path / f"{name}-1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (info / "entry_points.txt").write_text(f"[llama_mtp]\n{name} = plugin_{name}\n")
            monkeypatch.delitem(sys.modules, f"plugin_{name}", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


GOOD = """
from llama_mtp.hooks import Draft, SpecType, hookimpl

@hookimpl
def mtp_register_spec_types(register):
    register(SpecType("good", lambda settings: None))
"""


# ---- the specifications -------------------------------------------------------------------------


def test_specs_each_have_a_test_named_after_them() -> None:
    assert len(SPECS) == 5
    missing = [name for name in SPECS if f"test_{name}" not in globals()]
    assert not missing


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_prefixed_and_documented(name: str) -> None:
    assert name.startswith("mtp_")
    assert inspect.getdoc(getattr(specs, name))


def test_mtp_register_spec_types(register: Register) -> None:
    offer = spec_type(aliases=("again",))
    register(offering(offer), "mine")
    assert registry.spec_types()["repeat"] is registry.resolve("again") is offer
    assert offer.factory is not None
    request = DraftRequest(np.array([1, 2], np.int32), n_max=2)
    assert offer.factory(SETTINGS).draft(request) == Draft([2, 2])


def test_mtp_session_opened(register: Register, model: ModelFactory, ours: LlamaFactory) -> None:
    """Every plugin is told of every object, once."""
    seen: list[tuple[str, SpecSettings]] = []

    class Plugin:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def mtp_session_opened(self, settings: SpecSettings) -> None:
            seen.append((self.name, settings))

    for name in ("first", "second"):
        register(Plugin(name), name)
    m = model("hy_v3")
    llm = ours(m)
    assert sorted(name for name, _ in seen) == ["first", "second"]
    settings = seen[0][1]
    assert seen[1][1] is settings
    assert settings.spec_type == "draft-mtp"
    assert settings.n_max == llm.spec_depth == 3
    assert (settings.n_ctx, settings.n_vocab) == (llm.n_ctx(), llm.n_vocab())
    text(llm, m.text(10), 40)
    assert len(seen) == 2
    ours(m, n_ctx=256)
    assert [settings.n_ctx for _, settings in seen] == [512, 512, 256, 256]


class Chooser:
    """Chooses the depth of every round, and keeps what it was asked and what came of it."""

    def __init__(self, answer: int | None) -> None:
        self.answer = answer
        self.requests: list[DraftRequest] = []
        self.drafted: list[int] = []

    @hookimpl
    def mtp_choose_depth(self, request: DraftRequest) -> int | None:
        self.requests.append(DraftRequest(np.array(request.tokens), request.n_max))
        return self.answer

    @hookimpl
    def mtp_round_finished(self, verdict: Verdict) -> None:
        self.drafted.append(verdict.n_drafted)


@pytest.mark.parametrize(
    ("answer", "depth"), [(None, 3), (0, 0), (1, 1), (2, 2), (3, 3), (9, 3), (-1, 0)]
)
def test_mtp_choose_depth(
    register: Register, model: ModelFactory, ours: LlamaFactory, answer: int | None, depth: int
) -> None:
    """Asked once before each round, with the text so far; the answer is cut to what fits."""
    chooser = Chooser(answer)
    register(chooser, "chooser")
    m = model("hy_v3")
    prompt = m.text(10)
    emitted = text(ours(m), prompt, 60)
    assert len(chooser.drafted) > 10
    assert set(chooser.drafted) == {depth}
    whole = [*prompt, *emitted]
    lengths = [len(request.tokens) for request in chooser.requests]
    assert all(r.tokens.tolist() == whole[: len(r.tokens)] for r in chooser.requests)
    assert lengths[0] == len(prompt) + 1
    assert lengths == sorted(set(lengths))
    assert len(chooser.requests) == len(chooser.drafted)
    assert {request.n_max for request in chooser.requests} == {3}


def test_the_plugin_registered_last_chooses_the_depth_first(
    register: Register, model: ModelFactory, ours: LlamaFactory
) -> None:
    """Who has no opinion leaves the choice to the one before; nobody else is asked then."""
    first, second, silent = Chooser(1), Chooser(2), Chooser(None)
    for i, plugin in enumerate((first, second, silent)):
        register(plugin, str(i))
    m = model("hy_v3")
    text(ours(m), m.text(10), 60)
    assert set(silent.drafted) == {2}
    assert len(silent.requests) == len(second.requests) == len(silent.drafted)
    assert first.requests == []


def test_a_plugin_that_chooses_the_depth_has_the_last_word(
    register: Register, model: ModelFactory, ours: LlamaFactory
) -> None:
    """Also where the built-in policy would not draft, as with models this small."""
    chooser = Chooser(2)
    register(chooser, "two")
    m = model("hy_v3")
    text(ours(m, spec_adaptive=True), m.text(10), 400)
    assert len(chooser.drafted) > 100
    assert set(chooser.drafted) == {2}


def test_mtp_round_finished(register: Register, model: ModelFactory, ours: LlamaFactory) -> None:
    """Once for each round, with what the statistics book."""
    seen: list[Verdict] = []

    class Plugin:
        @hookimpl
        def mtp_round_finished(self, verdict: Verdict) -> None:
            seen.append(verdict)

    register(Plugin(), "observer")
    m = model("hy_v3")
    llm = ours(m)
    prompt = m.text(10)
    emitted = text(llm, prompt, 200)
    rounds = models.expected_acceptance(m, prompt, emitted, 3).rounds
    assert [(v.n_drafted, v.n_emitted, v.n_accepted) for v in seen] == rounds
    assert {v.n_accepted for v in seen} == {0, 1, 2, 3}
    assert all(v.target_ns > 0 and v.draft_ns > 0 for v in seen)


@pytest.mark.parametrize("how", ["close", "with", "del"])
def test_mtp_session_closed(register: Register, model: ModelFactory, how: str) -> None:
    """Once, with the settings that it was opened with, however the object ends."""
    seen: list[tuple[str, SpecSettings]] = []

    class Plugin:
        @hookimpl
        def mtp_session_opened(self, settings: SpecSettings) -> None:
            seen.append(("opened", settings))

        @hookimpl
        def mtp_session_closed(self, settings: SpecSettings) -> None:
            seen.append(("closed", settings))

    register(Plugin(), "observer")
    m = model("hy_v3")
    llm = Llama(str(m.path), spec_type="draft-mtp", **COMMON)
    if how == "with":
        with llm:
            text(llm, m.text(10), 20)
    else:
        text(llm, m.text(10), 20)
        assert [what for what, _ in seen] == ["opened"]
    if how == "close":
        llm.close()
        llm.close()
    del llm
    gc.collect()
    assert [what for what, _ in seen] == ["opened", "closed"]
    assert seen[0][1] is seen[1][1]


@pytest.mark.parametrize("hook", ["mtp_session_opened", "mtp_round_finished", "mtp_session_closed"])
def test_an_observer_that_raises_is_reported_once_and_costs_no_token(
    register: Register,
    model: ModelFactory,
    stock: StockFactory,
    caplog: pytest.LogCaptureFixture,
    hook: str,
) -> None:
    n_calls = 0

    def observe() -> None:
        nonlocal n_calls
        n_calls += 1
        raise RuntimeError("boom")

    register(type("Loud", (), {hook: staticmethod(hookimpl(observe))}), "loud")
    m = model("hy_v3")
    prompt = m.text(10)
    truth = fresh_text(stock(m), prompt, 60)
    with caplog.at_level(logging.WARNING, "llama_mtp"):
        llm = Llama(str(m.path), spec_type="draft-mtp", spec_adaptive=False, **COMMON)
        assert text(llm, prompt, 60) == truth
        rounds = llm.spec_stats.num_rounds
        assert llm.spec_stats.num_accepted_tokens > 0
        llm.close()
    assert n_calls == (rounds if hook == "mtp_round_finished" else 1)
    (record,) = caplog.records
    assert hook in record.getMessage()
    assert record.exc_info and "boom" in str(record.exc_info[1])


@pytest.mark.parametrize(
    "record", [SETTINGS, Draft([1]), Verdict(1, 1, 2, 0, 0), spec_type()], ids=lambda r: type(r)
)
def test_records_are_frozen(record: Any) -> None:
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)


# ---- spec types ---------------------------------------------------------------------------------


def test_built_in_type_comes_by_entry_point() -> None:
    assert registry.broken_plugins() == {}
    mtp = registry.resolve("draft-mtp")
    assert mtp == registry.resolve("mtp")
    assert mtp.needs_head and mtp.factory is None


def test_unknown_type_names_close_matches() -> None:
    with pytest.raises(SpecTypeError, match=r"no spec type 'draft-mpt'\. Use draft-mtp"):
        registry.resolve("draft-mpt")
    with pytest.raises(SpecTypeError, match="Use auto, draft-mtp, mtp, none"):
        registry.resolve("zzz")


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (spec_type("draft-mtp"), "'draft-mtp' is taken"),
        (spec_type(aliases=("mtp",)), "'mtp' is taken"),
        (spec_type("auto"), "'auto' is taken"),
        (spec_type(aliases=("repeat",)), "'repeat' is taken"),
        (spec_type("a,b"), "cannot be called 'a,b'"),
        (spec_type(" a"), "cannot be called ' a'"),
        (spec_type(""), "cannot be called ''"),
        (spec_type(factory=None), "no factory"),
        (Repeat(), "takes a SpecType, not Repeat"),
    ],
)
def test_unusable_offer_is_reported_and_skipped(
    register: Register, offer: object, reason: str
) -> None:
    register(offering(spec_type("fine"), offer), "bad")
    register(offering(spec_type("other")), "good")
    assert {*registry.spec_types()} == {"draft-mtp", "mtp", "other"}
    assert reason in registry.broken_plugins()["bad"]


def test_offer_that_raises_does_not_hide_the_others(
    register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    class Plugin:
        @hookimpl
        def mtp_register_spec_types(self) -> None:
            raise RuntimeError("boom")

    register(Plugin(), "loud")
    register(offering(spec_type()), "good")
    with caplog.at_level(logging.WARNING):
        assert "repeat" in registry.spec_types()
        assert "repeat" in registry.spec_types()
    assert registry.broken_plugins() == {"loud": "RuntimeError: boom"}
    assert len(caplog.records) == 1, "reported once"
    assert "loud" in caplog.text and registry.BLOCK_VARIABLE in caplog.text
    with pytest.raises(SpecTypeError, match="broken: loud"):
        registry.resolve("lost")


# ---- loading ------------------------------------------------------------------------------------


def test_good_plugin_is_found_and_a_broken_one_skipped(
    entry_points: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    entry_points(good=GOOD, bad="import no_such_module_at_all")
    with caplog.at_level(logging.WARNING):
        assert registry.resolve("good").name == "good"
    assert registry.plugin_manager().get_plugin("bad") is None
    assert "no_such_module_at_all" in registry.broken_plugins()["bad"]
    (message,) = caplog.messages
    assert message.startswith("llama-mtp skips the plugin bad (ModuleNotFoundError")


def test_blocked_plugin_is_not_even_imported(
    entry_points: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_points(good=GOOD, bad="raise RuntimeError('imported')")
    monkeypatch.setenv(registry.BLOCK_VARIABLE, "bad, draft-mtp")
    assert {*registry.spec_types()} == {"good"}
    assert registry.broken_plugins() == {}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("mtp_register_spec_types", "mtp_register_spectypes", "mtp_register_spectypes"),
        ("(register)", "(regster)", "regster"),
        ("@hookimpl", "", "mtp_register_spec_types lacks the @hookimpl marker"),
    ],
    ids=["hook misspelt", "argument misspelt", "marker missing"],
)
def test_misspelt_plugin_is_reported_and_leaves_no_trace(
    entry_points: Callable[..., None], old: str, new: str, reason: str
) -> None:
    entry_points(typo=GOOD.replace(old, new), good=GOOD)
    assert {*registry.spec_types()} == {"draft-mtp", "mtp", "good"}
    assert reason in registry.broken_plugins()["typo"]
    assert registry.plugin_manager().get_plugin("typo") is None
    registry.check_pending()


def test_two_plugins_of_one_name(entry_points: Callable[..., None]) -> None:
    entry_points(**{"draft-mtp": GOOD})
    assert {*registry.spec_types()} == {"draft-mtp", "mtp"}
    assert "already loaded" in registry.broken_plugins()["draft-mtp"]


def test_check_pending_sees_plugins_registered_by_hand(
    register: Register,
) -> None:
    register(SimpleNamespace(mtp_round_finishd=hookimpl(lambda verdict: None)), "typo")
    with pytest.raises(pluggy.PluginValidationError, match="mtp_round_finishd"):
        registry.check_pending()


def test_nothing_is_loaded_on_import() -> None:
    code = (
        "import sys, llama_mtp.registry as r; assert r._manager is None; "
        "assert 'llama_mtp.drafts.mtp' not in sys.modules; "
        "assert 'llama_mtp._native' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hooks_folder_refuses_to_be_a_second_copy(tmp_path: Path) -> None:
    (folder,) = hooks.__path__
    copy = tmp_path / "hooks"
    copy.mkdir()
    (copy / "__init__.py").write_bytes((Path(folder) / "__init__.py").read_bytes())
    command = [sys.executable, "-c", "import hooks"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode and "import it as that" in result.stderr
