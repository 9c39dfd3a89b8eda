"""The command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest
from conftest import ModelFactory
from typer.testing import CliRunner

import llama_mtp
from llama_mtp.commands import main as cli
from llama_mtp.commands.demo import verdict
from llama_mtp.commands.run import end_at_module
from llama_mtp.demo import model as demo_model
from llama_mtp.errors import LlamaMtpError

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sysconfig.get_path("scripts"), "llama-mtp"))
SHOW = """
import json, os, sys
import llama_cpp
keys = "LLAMA_ARG_SPEC_TYPE", "LLAMA_ARG_SPEC_DRAFT_N_MAX"
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__,
    "class": llama_cpp.Llama.__module__, "env": [os.environ.get(key) for key in keys],
}))
"""


def command(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "folder" / "show.py"
    file.parent.mkdir()
    file.write_text(SHOW)
    return file


# --- run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["s.py"], ["s.py"]),
        (["--spec-type", "x", "s.py", "-m"], ["--spec-type", "x", "s.py", "-m"]),
        (["-m", "mod", "--help"], ["-m", "mod", "--", "--help"]),
        (["-mmod", "--help"], ["-mmod", "--", "--help"]),
        (["--spec-type", "x", "-mmod"], ["--spec-type", "x", "-mmod", "--"]),
        (["--spec-type=x", "-m", "mod", "-x"], ["--spec-type=x", "-m", "mod", "--", "-x"]),
        (["--", "-mmod"], ["--", "-mmod"]),
        (["-", "-mmod"], ["-", "-mmod"]),
        (["-m"], ["-m", "--"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_our_options_end_at_a_module(args: list[str], expected: list[str]) -> None:
    assert end_at_module(args) == expected


def test_run_script_sees_what_python_would_show_it(script: Path) -> None:
    relative = str(script.relative_to(script.parents[1]))
    args = ("--spec-type", "none", "--spec-draft-n-max", "2", relative, "--spec-type", "y", "-x")
    done = command("run", *args, cwd=script.parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "argv": [relative, "--spec-type", "y", "-x"],
        "path": str(script.parent.resolve()),
        "name": "__main__",
        "class": "llama_mtp.llama",
        "env": ["none", "2"],
    }


@pytest.mark.parametrize("module", [("-m", "show"), ("-mshow",)])
def test_run_module_sees_what_python_would_show_it(script: Path, module: tuple[str, ...]) -> None:
    done = command("run", "--spec-type", "none", *module, "--help", "-m", "--", cwd=script.parent)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["argv"] == [str(script), "--help", "-m", "--"]
    assert seen["env"] == ["none", None]
    assert seen["path"] == str(script.parent)
    assert seen["class"] == "llama_mtp.llama"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise EOFError('no more')", 1, "EOFError: no more"),
        ("raise ValueError('bad')", 1, "ValueError: bad"),
        ("import llama_cpp; llama_cpp.Llama('missing.gguf')", 1, "missing.gguf"),
    ],
)
def test_run_leaves_exits_and_exceptions_to_the_script(
    tmp_path: Path, body: str, code: int, says: str
) -> None:
    file = tmp_path / "script.py"
    file.write_text(body)
    done = command("run", str(file), cwd=tmp_path)
    assert done.returncode == code
    assert says in done.stderr


def test_run_names_what_is_missing(tmp_path: Path) -> None:
    absent = ("--spec-draft-model", "absent.gguf", "show.py")
    for args in ((), ("absent.py",), (".",), absent):
        done = command("run", *args, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_run_refuses_a_spec_type_that_nobody_offers(script: Path, tmp_path: Path) -> None:
    done = command("run", "--spec-type", "draft-mpt", str(script), cwd=tmp_path)
    assert done.returncode == 1
    assert "There is no spec type 'draft-mpt'" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_hands_on_the_file_of_the_head(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mtp-x.gguf").touch()
    script.write_text("import os; print(os.environ['LLAMA_ARG_SPEC_DRAFT_MODEL'])")
    done = command("run", "--spec-draft-model", "mtp-x.gguf", str(script), cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path.resolve() / "mtp-x.gguf"), done.stderr


# --- install --------------------------------------------------------------------------------------


@pytest.fixture
def stock() -> Iterator[type]:
    yield llama_cpp.llama.Llama
    llama_mtp.uninstall()


def test_install_twice_is_install_once_and_uninstall_restores(stock: type) -> None:
    llama_mtp.install()
    llama_mtp.install()
    assert llama_cpp.Llama is llama_cpp.llama.Llama is llama_mtp.Llama
    llama_mtp.uninstall()
    assert llama_cpp.Llama is llama_cpp.llama.Llama is stock
    llama_mtp.uninstall()
    assert llama_cpp.Llama is stock


# --- the other commands ---------------------------------------------------------------------------


def test_help_lists_the_commands() -> None:
    text = CliRunner().invoke(cli.app, ["--help"]).output
    names = "run|demo|bench|graft|split|narrow|strip|inspect|plugins|doctor"
    assert re.findall(r"^│ (\w+) ", text, re.MULTILINE) == names.split("|")


def test_help_loads_neither_the_host_nor_numpy() -> None:
    code = (
        "import sys; from llama_mtp.commands.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('llama_cpp', 'numpy', 'gguf', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_can_be_run_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_mtp", "plugins"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == command("plugins", cwd=tmp_path).stdout


def test_plugins_and_doctor_know_the_built_in_type(tmp_path: Path) -> None:
    for name in ("plugins", "doctor"):
        done = command(name, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "draft-mtp" in done.stdout


def test_inspect_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "not.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(64))
    done = command("inspect", str(file), cwd=tmp_path)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_about_any_name_is_one_sentence(tmp_path: Path) -> None:
    """Also where the name looks like markup, or would steer the terminal."""
    name = "[model] [/x]\x1b[2J.gguf"
    done = command("inspect", name, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: [model] [/x]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


# --- demo -----------------------------------------------------------------------------------------


def test_demo_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlamaMtpError, match=r"pip install 'llama-mtp\[demo\]'"):
        demo_model.base_model()


def test_demo_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_MTP_CACHE", str(tmp_path))
    assert demo_model.cache_dir() == tmp_path


@pytest.mark.parametrize(
    ("ratio", "tokens_a_round", "gave_up", "rates", "says"),
    [
        (0.98, 1.0, True, (50.0, 40.0), "fell to 0"),
        (1.3, 1.4, True, (50.0, 40.0), "fell to 0"),
        (1.0, 1.4, False, (50.0, 40.0), "does not pay"),
        (1.7, 1.4, False, (50.0, 40.0), "too busy"),
        (1.2, 1.4, False, (50.0, 60.0), "no gain"),
        (1.2, 1.4, False, (50.0, 40.0), "1.20 times"),
    ],
)
def test_demo_claims_no_gain_that_is_not_there(
    ratio: float, tokens_a_round: float, gave_up: bool, rates: tuple[float, float], says: str
) -> None:
    assert says in verdict(ratio, tokens_a_round, gave_up, *rates)


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ((sys.executable, "basic.py"), "spec_type: draft-mtp"),
        ((sys.executable, "chat_stream.py"), "mean acceptance length"),
        ((sys.executable, "unedited_script.py"), "class llama_cpp.llama.Llama"),
        ((COMMAND, "run", "unedited_script.py"), "class llama_mtp.llama.Llama"),
    ],
)
def test_examples_run_as_they_stand(
    model: ModelFactory, before: tuple[str, ...], says: str
) -> None:
    done = subprocess.run(
        [*before, model("mimo2").path],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


# --- what is said before anything is loaded -------------------------------------------------------


def test_importing_the_package_loads_neither_the_host_nor_the_engine() -> None:
    code = "import llama_mtp, sys; print([m for m in ('llama_mtp._native',) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bench_of_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    done = command("bench", "cut.gguf", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: cut.gguf is truncated or damaged" in done.stderr
    assert "Traceback" not in done.stderr
