"""The rooms of the package: which may import which, and how long a file may be.

Imports are read with `ast`, those inside functions as well. Imports for type checkers alone do not
count: they make no circle at run time.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room is a top-level module or package of llama_mtp. An import goes to the same room or to one
# that stands further up in this list.
ROOMS = [
    "_version",
    "errors",
    "hooks",
    "host",
    "depth",
    "gguf",
    "heads",
    "registry",
    "settings",
    "engine",
    "drafts",
    "text",
    "completion",
    "llama",
    "install",
    "measure",
    "demo",
    "commands",
    "__main__",
    "__init__",
]

# Room -> rooms that it must not import, wherever they stand in the list.
NEVER = {
    "engine": {"settings", "heads", "gguf", "measure", "commands"},
    "gguf": {"llama", "engine", "measure"},
    "heads": {"llama", "engine", "measure"},
}

# Room -> the other rooms that may import it.
ONLY_FOR = {"measure": {"commands"}, "demo": {"commands"}, "commands": {"__main__"}}

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "examples",
    "hooks",
    "native",
    "plugin",
    "pyproject.toml",
    "tests",
}

CODE = {".py", ".c", ".cpp", ".h", ".hpp", ".sh"}
FOR_TYPES = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
SOURCE_LINES, TEST_LINES, README_LINES = 500, 700, 150


@dataclass(frozen=True)
class Import:
    """One import: `target` is a module of the package, or the full name of a foreign one."""

    path: str
    line: int
    module: str
    target: str
    for_types: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.module} imports {self.target}"


class House:
    """The source tree below `root`, as the rules see it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, *folders: str) -> Iterator[Path]:
        for folder in folders:
            yield from sorted(f for f in (self.root / folder).rglob("*") if f.suffix in CODE)

    def say(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Dotted name -> file, of the package and of its part `hooks`, which has its own folder."""
        found = {}
        for name, folder in [
            ("llama_mtp", self.root / "plugin/llama_mtp"),
            ("llama_mtp.hooks", self.root / "hooks"),
        ]:
            for path in sorted(folder.rglob("*.py")):
                parts = [name, *path.relative_to(folder).with_suffix("").parts]
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {m: ast.parse(p.read_text("utf-8"), str(p)) for m, p in self.modules.items()}

    @cached_property
    def all_imports(self) -> list[Import]:
        return [i for m, tree in self.trees.items() for i in self._imports(m, tree, False)]

    @property
    def imports(self) -> list[Import]:
        return [i for i in self.all_imports if not i.for_types]

    def _imports(self, module: str, node: ast.AST, for_types: bool) -> Iterator[Import]:
        path = self.modules[module]
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in dict.fromkeys(self.targets(module, node)):
                yield Import(self.say(path), node.lineno, module, target, for_types)
        if isinstance(node, ast.If) and ast.unparse(node.test) in FOR_TYPES:
            for child in node.body:
                yield from self._imports(module, child, True)
            for child in node.orelse:
                yield from self._imports(module, child, for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from self._imports(module, child, for_types)

    def targets(self, module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        base = node.module or ""
        if node.level:
            up = node.level - (self.modules[module].name == "__init__.py")
            above = module.split(".")[: len(module.split(".")) - up]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in self.modules else base

    def said_in(self, module: str) -> str:
        return self.say(self.modules[module])

    def nodes(self, *but: str) -> Iterator[tuple[str, ast.AST]]:
        """(module, node) of everything in the package except for the modules `but`."""
        for module, tree in self.trees.items():
            if module not in but:
                yield from ((module, node) for node in ast.walk(tree))


def room(module: str) -> str | None:
    """Return the room of a module of the package; None for a foreign one."""
    first, *rest = module.split(".")
    if first != "llama_mtp":
        return None
    return rest[0] if rest else "__init__"


RULES: dict[str, Callable[[House], Iterable[str]]] = {}


def rule(function: Callable[[House], Iterable[str]]) -> Callable[[House], Iterable[str]]:
    RULES[function.__name__] = function
    return function


def circles(arrows: Mapping[Import, tuple[str, str]]) -> Iterator[str]:
    """Yield every import that is a part of a circle; `arrows` says from where to where it leads."""
    nexts: dict[str, set[str]] = {}
    for a, b in arrows.values():
        nexts.setdefault(a, set()).add(b)
    reached = {}
    for start in nexts:
        seen: set[str] = set()
        left = list(nexts[start])
        while left:
            if (name := left.pop()) not in seen:
                seen.add(name)
                left += nexts.get(name, ())
        reached[start] = seen
    for i, (a, b) in arrows.items():
        if a in reached.get(b, ()):
            yield f"{i}, and {b} leads back to {a}"


@rule
def no_circle_of_modules(house: House) -> Iterable[str]:
    return circles({i: (i.module, i.target) for i in house.imports})


@rule
def no_circle_of_rooms(house: House) -> Iterable[str]:
    arrows = {i: (room(i.module), room(i.target)) for i in house.imports}
    return circles({i: (a, b) for i, (a, b) in arrows.items() if a and b and a != b})


@rule
def at_most_20_rooms_that_are_in_the_list(house: House) -> Iterable[str]:
    rooms = {room(module) for module in house.modules}
    if len(rooms) > 20:
        yield f"{house.said_in('llama_mtp')}:1: the package has {len(rooms)} rooms, at most 20 fit"
    for module in house.modules:
        if room(module) not in ROOMS:
            yield f"{house.said_in(module)}:1: {room(module)} is not in the list of rooms"


@rule
def no_import_goes_to_a_higher_room(house: House) -> Iterable[str]:
    height = {name: i for i, name in enumerate(ROOMS)}
    for i in house.imports:
        a, b = room(i.module), room(i.target)
        if a in height and b in height and height[b] > height[a]:
            yield f"{i}: {b} stands above {a} in the list of rooms"


@rule
def no_room_imports_what_it_must_never(house: House) -> Iterable[str]:
    for i in house.imports:
        if room(i.target) in NEVER.get(room(i.module) or "", ()):
            yield f"{i}: {room(i.module)}/ must never import {room(i.target)}"


@rule
def measure_demo_and_commands_are_imported_by_nobody_else(house: House) -> Iterable[str]:
    for i in house.imports:
        a, b = room(i.module), room(i.target) or ""
        if a != b and b in ONLY_FOR and a not in ONLY_FOR[b]:
            yield f"{i}: only {', '.join(ONLY_FOR[b])} may import {b}/"


@rule
def completion_does_not_know_llama(house: House) -> Iterable[str]:
    for i in house.all_imports:
        if room(i.module) == "completion" and room(i.target) == "llama":
            yield f"{i}: completion is a part of Llama, not even for types may it import llama"


@rule
def depth_imports_numpy_and_the_standard_library(house: House) -> Iterable[str]:
    allowed = {"numpy", *sys.stdlib_module_names}
    for i in house.imports:
        own = room(i.target) == "depth"
        if room(i.module) == "depth" and not own and i.target.split(".")[0] not in allowed:
            yield f"{i}: depth/ imports numpy and the standard library alone"


@rule
def gguf_knows_no_architecture(house: House) -> Iterable[str]:
    table = house.trees.get("llama_mtp.heads.architectures", ast.Module([], []))
    names = {
        key.value
        for node in ast.walk(table)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    for module, node in house.nodes():
        known = isinstance(node, ast.Constant) and node.value in names
        if room(module) == "gguf" and known:
            where = f"{house.said_in(module)}:{node.lineno}"
            yield f"{where}: gguf/ knows no architecture, but says {node.value!r}"


def sayings(house: House, word: str, *but: str) -> Iterator[str]:
    """Yield where modules other than `but` import, name, or spell out as a module the `word`."""
    for module, node in house.nodes(*but):
        said: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            said = [part for t in house.targets(module, node) for part in t.split(".")]
            said += [alias.name for alias in node.names]
        elif isinstance(node, ast.Name):
            said = [node.id]
        elif isinstance(node, ast.Attribute):
            said = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = node.value.split(".") if node.value.replace(".", "").isidentifier() else []
        if word in said:
            yield f"{house.said_in(module)}:{node.lineno}: says {word}"


@rule
def only_host_says_llama_cpp(house: House) -> Iterable[str]:
    for text in sayings(house, "llama_cpp", "llama_mtp.host"):
        yield f"{text}; the one door to the host is host.py"


@rule
def only_engine_native_says_native(house: House) -> Iterable[str]:
    for text in sayings(house, "_native", "llama_mtp.engine.native"):
        yield f"{text}; the one door to the compiled module is engine/native.py"


@rule
def nobody_reaches_through_host_into_the_functions_of_the_host(house: House) -> Iterable[str]:
    fields = {"llama_state", "llama_state_size"}  # of the stock class's LlamaState
    for module, node in house.nodes("llama_mtp.host"):
        said = ""
        if isinstance(node, ast.ImportFrom) and any(
            room(t) == "host" for t in house.targets(module, node)
        ):
            said = next((a.name for a in node.names if a.name == "C"), "")
        elif isinstance(node, ast.Attribute) and node.attr not in fields:
            said = node.attr if node.attr.startswith(("llama_", "ggml_", "mtmd_")) else ""
        if said:
            where = f"{house.said_in(module)}:{node.lineno}"
            yield f"{where}: {said} belongs to the host's C functions, which host.py alone calls"


@rule
def no_test_file_imports_another(house: House) -> Iterable[str]:
    for path in sorted((house.root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[-1].startswith("test_"):
                    where = f"{house.say(path)}:{node.lineno}"
                    yield f"{where}: imports {name}; what tests share goes to a helper module"


def too_long(house: House, files: Iterable[Path], limit: int) -> Iterator[str]:
    for path in files:
        if (lines := len(path.read_text("utf-8").splitlines())) > limit:
            yield f"{house.say(path)}:{lines}: {lines} lines are more than {limit}"


@rule
def no_source_is_longer_than_500_lines(house: House) -> Iterable[str]:
    files = house.files("plugin", "hooks", "native", "examples")
    tests = house.root / "native/tests"
    return too_long(house, [f for f in files if tests not in f.parents], SOURCE_LINES)


@rule
def no_test_file_is_longer_than_700_lines(house: House) -> Iterable[str]:
    return too_long(house, house.files("tests", "native/tests"), TEST_LINES)


@rule
def the_readme_has_at_most_150_lines(house: House) -> Iterable[str]:
    return too_long(house, [house.root / "README.md"], README_LINES)


@rule
def the_top_level_is_fixed(house: House) -> Iterable[str]:
    ignored = [line.strip("/") for line in (house.root / ".gitignore").read_text().split()]
    entries = {e.name for e in house.root.iterdir() if e.name != ".git"}
    for name in sorted(entries - TOP_LEVEL):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
            yield f"{name}:1: is not an entry of the top level"
    for name in sorted(TOP_LEVEL - entries):
        yield f"{name}:1: is missing from the top level"


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


@pytest.mark.parametrize("name", RULES)
def test_the_house_keeps(name: str, house: House) -> None:
    problems = list(RULES[name](house))
    assert not problems, "\n".join(["", *problems])


# A house that keeps all the rules, with whatever looks like a violation and is none.
SMALL = {
    "plugin/llama_mtp/__init__.py": "from .errors import Wrong\n",
    "plugin/llama_mtp/errors.py": "",
    "plugin/llama_mtp/host.py": "import llama_cpp\nfrom llama_cpp import llama_cpp as C\n"
    "C.llama_decode()\n",
    "plugin/llama_mtp/depth/__init__.py": "",
    "plugin/llama_mtp/depth/costs.py": "import math\nimport numpy.typing\n",
    "plugin/llama_mtp/depth/policy.py": "from . import costs\nfrom .costs import mean\n",
    "plugin/llama_mtp/engine/__init__.py": "",
    "plugin/llama_mtp/engine/native.py": "from .._native import ffi\n",
    "plugin/llama_mtp/engine/session.py": "from .. import host\nfrom .native import ffi\n"
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..llama import Llama\n",
    "plugin/llama_mtp/gguf/__init__.py": "",
    "plugin/llama_mtp/gguf/header.py": '"""Reads no qwen35."""\n',
    "plugin/llama_mtp/heads/__init__.py": "",
    "plugin/llama_mtp/heads/architectures.py": 'ARCHITECTURES = {"qwen35": 1}\n',
    "plugin/llama_mtp/completion.py": "",
    "plugin/llama_mtp/llama.py": '"""``llama_cpp.Llama`` that drafts."""\n'
    "from .engine import session\nstate.llama_state\n",
    "plugin/llama_mtp/measure/__init__.py": "",
    "plugin/llama_mtp/measure/trial.py": "from ..llama import Llama\n",
    "plugin/llama_mtp/commands/__init__.py": "",
    "plugin/llama_mtp/commands/main.py": "def run():\n    from ..measure import trial\n",
    "plugin/llama_mtp/__main__.py": "from .commands.main import run\n",
    "hooks/__init__.py": "",
    "hooks/specs.py": "from . import hookspec\n",
    "native/src/session.cpp": "//\n" * 500,
    "native/tests/test_a.cpp": "//\n" * 700,
    "tests/test_a.py": "import test.support\n" + "#\n" * 699,
    "examples/a.py": "",
    "README.md": "\n" * 150,
    ".gitignore": "build/\n*.pyc\n",
    "build/x": "",
    ".ci/run": "",
    "CHANGELOG.md": "",
    "CONTRIBUTING.md": "",
    "LICENSE": "",
    "pyproject.toml": "",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name, text in SMALL.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", RULES)
def test_a_small_house_keeps(name: str, small: Path) -> None:
    assert list(RULES[name](House(small))) == []


# Rule -> (a file, its text, where the rule says what is wrong: lines of that file, or file:line).
P = "plugin/llama_mtp/"
VIOLATIONS: dict[str, list[tuple[str, str, list[int | str]]]] = {
    "no_circle_of_modules": [
        (
            P + "depth/costs.py",
            "\ndef late():\n    from .policy import x\n",
            [3, P + "depth/policy.py:1", P + "depth/policy.py:2"],
        ),
    ],
    "no_circle_of_rooms": [
        (P + "engine/stats.py", "import llama_mtp.llama\n", [1, P + "llama.py:2"]),
        (P + "depth/rule.py", "from llama_mtp.llama import x\n", []),  # up, but no circle
    ],
    "at_most_20_rooms_that_are_in_the_list": [(P + "attic/box.py", "", [1])],
    "no_import_goes_to_a_higher_room": [
        (P + "errors.py", "import os\nfrom . import host\n", [2]),
        ("hooks/records.py", "from ..llama import x\n", [1]),
    ],
    "no_room_imports_what_it_must_never": [
        (f"{P}{a}/new.py", f"\nfrom ..{b} import x\n", [2])
        for a, never in NEVER.items()
        for b in sorted(never)
    ],
    "measure_demo_and_commands_are_imported_by_nobody_else": [
        (P + "install.py", f"from . import x\nfrom .{b} import trial\n", [2]) for b in ONLY_FOR
    ],
    "completion_does_not_know_llama": [
        (P + "completion.py", "if TYPE_CHECKING:\n    from .llama import Llama\n", [2]),
    ],
    "depth_imports_numpy_and_the_standard_library": [
        (P + "depth/rule.py", "import numpy\nimport scipy.stats\n", [2]),
        (P + "depth/rule.py", "from ..errors import x\n", [1]),
    ],
    "gguf_knows_no_architecture": [(P + "gguf/model.py", 'a = 1\nb = a == "qwen35"\n', [2])],
    "only_host_says_llama_cpp": [
        (P + "llama.py", f"\n{text}\n", [2])
        for text in (
            "import llama_cpp",
            "from llama_cpp.llama_chat_format import x",
            "from .host import llama_cpp",
            "host.llama_cpp.x()",
            'import_module("llama_cpp.llama")',
        )
    ],
    "only_engine_native_says_native": [
        (P + "engine/session.py", "from .._native import lib\n", [1]),
    ],
    "nobody_reaches_through_host_into_the_functions_of_the_host": [
        (P + "llama.py", f"from . import host\n{text}\n", [2])
        for text in ("from .host import C", "host.C.llama_n_ctx(1)", "f = lib.ggml_dev_count")
    ],
    "no_source_is_longer_than_500_lines": [
        (name, "\n" * 501, [501])
        for name in (P + "llama.py", "hooks/specs.py", "native/src/session.cpp")
    ],
    "no_test_file_imports_another": [
        ("tests/engine/test_b.py", "import models\nfrom test_a import x\n", [2]),
        ("tests/bench/figures/b.py", "def f():\n    import test_a as a\n", [2]),
    ],
    "no_test_file_is_longer_than_700_lines": [
        (name, "\n" * 701, [701]) for name in ("tests/engine/test_b.py", "native/tests/test_a.cpp")
    ],
    "the_readme_has_at_most_150_lines": [("README.md", "\n" * 151, [151])],
    "the_top_level_is_fixed": [("notes.txt", "", [1])],
}


@pytest.mark.parametrize(
    ("name", "path", "text", "where"),
    [(name, *case) for name, cases in VIOLATIONS.items() for case in cases],
)
def test_a_violation_is_found(
    name: str, path: str, text: str, where: list[int | str], small: Path
) -> None:
    write(small / path, text)
    found = [problem.split(": ")[0] for problem in RULES[name](House(small))]
    assert sorted(found) == [f"{path}:{at}" if isinstance(at, int) else at for at in where]


def test_a_missing_entry_and_too_many_rooms_are_found(small: Path) -> None:
    (small / "LICENSE").unlink()
    (problem,) = RULES["the_top_level_is_fixed"](House(small))
    assert problem == "LICENSE:1: is missing from the top level"
    for i in range(21):
        write(small / f"{P}room{i}.py", "")
    problem = next(iter(RULES["at_most_20_rooms_that_are_in_the_list"](House(small))))
    assert problem.startswith(P + "__init__.py:1: the package has 3")


def test_every_rule_has_a_violation() -> None:
    assert all(any(where for _, _, where in VIOLATIONS[name]) for name in RULES)
