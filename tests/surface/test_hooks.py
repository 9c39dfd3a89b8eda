"""The hooks and the registry: loading, spec types, and what happens to a broken plugin."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pluggy
import pytest
from conftest import LlamaFactory, ModelFactory

from llama_mtp import hooks, registry
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
from llama_mtp.measure.identity import text

SPECS = [
    name
    for name, member in vars(specs).items()
    if inspect.isfunction(member) and hasattr(member, f"{hooks.NAMESPACE}_spec")
]
SETTINGS = SpecSettings("draft-mtp", n_max=3, p_min=0.0, n_ctx=64, n_vocab=32)


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
def register() -> Callable[[object, str], None]:
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


def test_mtp_register_spec_types(register: Callable[[object, str], None]) -> None:
    offer = spec_type(aliases=("again",))
    register(offering(offer), "mine")
    assert registry.spec_types()["repeat"] is registry.resolve("again") is offer
    assert offer.factory is not None
    request = DraftRequest(np.array([1, 2], np.int32), n_max=2)
    assert offer.factory(SETTINGS).draft(request) == Draft([2, 2])


def test_mtp_session_opened(register: Callable[[object, str], None]) -> None:
    seen: list[SpecSettings] = []

    class Plugin:
        @hookimpl
        def mtp_session_opened(self, settings: SpecSettings) -> None:
            seen.append(settings)

    register(Plugin(), "first")
    register(Plugin(), "second")
    registry.plugin_manager().hook.mtp_session_opened(settings=SETTINGS)
    assert seen == [SETTINGS, SETTINGS]


def test_mtp_choose_depth(register: Callable[[object, str], None]) -> None:
    class Plugin:
        def __init__(self, answer: int | None) -> None:
            self.answer = answer

        @hookimpl
        def mtp_choose_depth(self, request: DraftRequest) -> int | None:
            return self.answer

    ask = registry.plugin_manager().hook.mtp_choose_depth
    request = DraftRequest(np.array([1], np.int32), n_max=3)
    assert ask(request=request) is None, "the built-in policy decides"
    register(Plugin(2), "first")
    register(Plugin(None), "has no opinion")
    assert ask(request=request) == 2
    register(Plugin(0), "last registered is asked first")
    assert ask(request=request) == 0


def test_a_plugin_that_chooses_the_depth_has_the_last_word(
    register: Callable[[object, str], None], model: ModelFactory, ours: LlamaFactory
) -> None:
    """Also where the built-in policy would not draft, as with models this small."""
    drafted: list[int] = []

    class Plugin:
        @hookimpl
        def mtp_choose_depth(self, request: DraftRequest) -> int:
            return 2

        @hookimpl
        def mtp_round_finished(self, verdict: Verdict) -> None:
            drafted.append(verdict.n_drafted)

    register(Plugin(), "two")
    m = model("hy_v3")
    text(ours(m, spec_adaptive=True), m.text(10), 400)
    assert len(drafted) > 100
    assert set(drafted) == {2}


def test_mtp_round_finished(register: Callable[[object, str], None]) -> None:
    seen: list[Verdict] = []

    class Plugin:
        @hookimpl
        def mtp_round_finished(self, verdict: Verdict) -> None:
            seen.append(verdict)

    register(Plugin(), "observer")
    verdict = Verdict(n_drafted=3, n_accepted=2, n_emitted=3, target_ns=10, draft_ns=5)
    registry.plugin_manager().hook.mtp_round_finished(verdict=verdict)
    assert seen == [verdict]


def test_mtp_session_closed(register: Callable[[object, str], None]) -> None:
    seen: list[str] = []

    class Plugin:
        @hookimpl
        def mtp_session_closed(self, settings: SpecSettings) -> None:
            seen.append(settings.spec_type)

    register(Plugin(), "observer")
    registry.plugin_manager().hook.mtp_session_closed(settings=SETTINGS)
    assert seen == ["draft-mtp"]


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
    register: Callable[[object, str], None], offer: object, reason: str
) -> None:
    register(offering(spec_type("fine"), offer), "bad")
    register(offering(spec_type("other")), "good")
    assert {*registry.spec_types()} == {"draft-mtp", "mtp", "other"}
    assert reason in registry.broken_plugins()["bad"]


def test_offer_that_raises_does_not_hide_the_others(
    register: Callable[[object, str], None], caplog: pytest.LogCaptureFixture
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
    register: Callable[[object, str], None],
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
