"""What ``llama-mtp inspect`` promises: the truth about a file, before it is loaded."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
from conftest import ModelFactory
from models import large
from models.families import FAMILIES
from models.families.common import Files
from models.files import TRUNK, write_header
from typer.testing import CliRunner

from llama_mtp import Llama, host
from llama_mtp.commands import main as cli
from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.header import TensorInfo
from llama_mtp.heads import split as splitting
from llama_mtp.heads.architectures import ARCHITECTURES, NOT_EXECUTABLE
from llama_mtp.measure import child
from llama_mtp.measure.inspect import Inspection, Quantisation, _quantisation, inspect_file
from llama_mtp.measure.probe_host import ask_host

LOAD: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "use_mmap": False}
ROUNDING = 2**16  # the host prints hundredths of a MiB, and there are several buffers


class AllSizes(host.BufferSizes):
    """As the host's own report, and of the weights too."""

    _LINE = re.compile(r"(\S+) +(KV|RS|state|compute|output|model) +buffer size = +([0-9.]+) MiB")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return ``family(arch, n_heads)``: the files of a constructed model."""
    built: dict[tuple[str, int], Files] = {}

    def get(arch: str, n_heads: int) -> Files:
        key = arch, n_heads
        if key not in built:
            folder = tmp_path_factory.mktemp(f"{arch}-{n_heads}")
            built[key] = FAMILIES[arch].build(folder, n_heads, 1)
        return built[key]

    return get


def loaded(files: Files, n_ctx: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What MTP adds to a real load, by the forecast's parts, in the host's words."""
    with AllSizes() as sizes:
        host.StockLlama(str(files.path), n_ctx=n_ctx, **LOAD).close()
    plain = sizes.bytes
    monkeypatch.setattr(host, "BufferSizes", AllSizes)
    own = {} if files.draft is None else {"spec_draft_model": str(files.draft)}
    with Llama(str(files.path), spec_type="draft-mtp", n_ctx=n_ctx, **own, **LOAD) as llm:
        assert llm.spec_type == "draft-mtp"
        with_mtp = llm.spec_memory()
    monkeypatch.undo()

    def held(context: str, *parts: str) -> int:
        return sum(with_mtp.get(f"{context} {part}", 0) for part in parts)

    def before(*parts: str) -> int:
        return sum(plain.get(part, 0) for part in parts)

    memory = ("KV", "RS", "state")
    return {
        "head weights": held("target", "model") + held("draft", "model") - before("model"),
        "draft KV": held("draft", *memory),
        "snapshots": held("target", *memory) - before(*memory),
        "target compute": held("target", "compute") - before("compute"),
        "draft compute": held("draft", "compute"),
        "output": held("target", "output") + held("draft", "output") - before("output"),
    }


# --- the forecast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [512, 4096])
@pytest.mark.parametrize("arch", FAMILIES)
def test_the_forecast_is_what_a_load_then_reports(
    family: Any, arch: str, n_ctx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = family(arch, FAMILIES[arch].max_heads)
    truth = loaded(files, n_ctx, monkeypatch)
    asked = inspect_file(files.path, draft_model=files.draft, n_ctx=n_ctx)
    assert asked.host_runs, asked.reason
    assert asked.host == host.version()
    assert asked.forecast is not None
    assert asked.forecast.source == "host"
    assert asked.forecast.complete
    parts = asked.forecast.parts
    assert {part: parts[part] for part in truth} == {
        part: pytest.approx(size, rel=0.05, abs=ROUNDING) for part, size in truth.items()
    }
    # And by the header alone, where it tells.
    alone = inspect_file(files.path, draft_model=files.draft, n_ctx=n_ctx, probe=False).forecast
    assert alone is not None
    assert alone.source == "header"
    assert not alone.complete
    assert alone.target_compute is None
    assert alone.draft_compute is None
    assert alone.head_weights >= asked.forecast.head_weights - ROUNDING
    known = {part: size for part, size in alone.parts.items() if size is not None}
    del known["head weights"]  # stock loads of some architectures leave out but a part
    assert {part: known[part] for part in truth if part in known} == {
        part: pytest.approx(truth[part], rel=0.05, abs=ROUNDING) for part in truth if part in known
    }


def test_the_total_is_the_sum_of_the_parts(model: ModelFactory) -> None:
    found = inspect_file(model("qwen35").path, n_ctx=1024, probe=False)
    assert found.forecast is not None
    told = found.forecast.told(
        {"plain RS": 10, "target RS": 40, "plain compute": 9, "target compute": 7, "draft KV": 3}
        | {"plain unused": 100, "target unused": 20}
    )
    assert (told.snapshots, told.target_compute, told.draft_kv, told.output) == (30, -2, 3, 0)
    assert told.copies == 4 * 10
    assert told.total == 80 + 30 - 2 + 3 + told.rows + 40


@pytest.mark.parametrize("arch", ["qwen35", "hy_v3"])
def test_state_copies_are_what_an_object_then_keeps(model: ModelFactory, arch: str) -> None:
    m = model(arch)
    found = inspect_file(m.path, n_ctx=1024).forecast
    assert found is not None
    with Llama(str(m.path), spec_type="draft-mtp", n_ctx=1024, **LOAD) as llm:
        text = m.text(400)
        for n in range(60, 400, 60):  # a conversation of more turns than copies are kept
            next(llm.generate(text[:n], temp=0.0))
        kept = llm.spec_memory().get("checkpoints", 0)
    assert found.copies == pytest.approx(kept, rel=0.05, abs=2**12)
    assert (kept > 0) == (arch == "qwen35")


def test_more_depth_costs_snapshots_and_more_context_costs_cache(model: ModelFactory) -> None:
    path = model("qwen35").path

    def cost(n_ctx: int, depth: int) -> tuple[int, int]:
        found = inspect_file(path, n_ctx=n_ctx, depth=depth).forecast
        assert found is not None
        assert found.snapshots is not None
        assert found.draft_kv is not None
        return found.snapshots, found.draft_kv

    small, deep, wide = cost(1024, 1), cost(1024, 5), cost(4096, 1)
    assert deep[0] == pytest.approx(5 * small[0], rel=0.25)  # rounded to hundredths of a MiB
    assert deep[1] == small[1]
    assert wide == (small[0], 4 * small[1])


CHILD = """
import resource, sys
from llama_mtp.measure import probe_host as probe
probe._answer(sys.argv[1], 512, 3, {"use_mmap": False})
with open("/proc/self/io") as io:
    print(next(int(line.split()[1]) for line in io if line.startswith("rchar")))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
def test_asking_the_host_reads_no_weights(model: ModelFactory, big: Path) -> None:
    def cost(path: Path) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True
        )
        return [int(line) for line in done.stdout.split()]

    weights = 3 * large.N_VOCAB * models.N_EMBD * 4
    for much, little in zip(cost(big), cost(model("qwen35").path), strict=True):
        assert much - little < weights  # the child makes two objects: each reads the header


# --- what is in the file --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large.write(tmp_path_factory.mktemp("large") / "large.gguf", model("qwen35"))


def test_the_header_of_a_large_vocabulary_takes_less_than_300_ms(big: Path) -> None:
    times = []
    for _ in range(3):
        start = time.process_time()
        found = inspect_file(big, probe=False)
        times.append(time.process_time() - start)
    assert found.verdict == "run"
    assert found.n_vocab == large.N_VOCAB
    assert min(times) < 0.3


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_says_what_a_good_file_holds(model: ModelFactory, arch: str) -> None:
    m = model(arch)
    found = inspect_file(m.path, probe=False)
    assert (found.architecture, found.name) == (arch, f"constructed {arch}")
    assert (found.n_layer_trunk, found.n_heads) == (4 if arch == "qwen35" else 2, 1)
    assert (found.n_embd, found.n_vocab) == (models.N_EMBD, models.N_VOCAB)
    assert found.missing == ()
    assert f"blk.{found.n_layer_trunk}.nextn.eh_proj.weight" in found.present
    assert found.rollback == ARCHITECTURES[arch].rollback
    assert not found.shares_kv
    assert (found.verdict, found.reason) == ("run", "")
    assert found.next_command == f"llama-mtp doctor {m.path}"
    assert (found.host, found.host_runs) == ("", None)


def test_says_what_head_and_trunk_are_stored_in(model: ModelFactory, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(model("hy_v3").path)
    path = copy(reader, tmp_path / "mixed.gguf", lambda n: np.float16 if "blk.2." in n else None)
    found = inspect_file(path, probe=False)
    sizes = {"F16": 0, "F32": 0}
    for tensor in reader.tensors:
        kind = "F16" if tensor.name.startswith("blk.2.") else "F32"
        sizes[kind] += tensor.n_elements * (2 if kind == "F16" else 4)
    assert found.head == Quantisation({"F16": sizes["F16"]})
    assert found.trunk == Quantisation({"F32": sizes["F32"]})
    assert (found.head.main, found.trunk.main) == ("F16", "F32")


def test_the_main_type_is_that_of_most_bytes() -> None:
    kinds = [(gguf.GGMLQuantizationType.Q4_K, 4096), (gguf.GGMLQuantizationType.F32, 256), (99, 1)]
    found = _quantisation(TensorInfo(str(kind), (n,), int(kind), 0) for kind, n in kinds)
    assert found.bytes_by_type == {"Q4_K": 4096 // 256 * 144, "F32": 1024, "type 99": 0}
    assert found.main == "Q4_K"


def test_the_types_have_the_names_that_gguf_gives_them() -> None:
    for kind in gguf.GGMLQuantizationType:
        found = _quantisation([TensorInfo("x", (256,), int(kind), 0)])
        assert found.main == kind.name


def test_reads_split_files_as_one(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("qwen35").path
    copy(gguf.GGUFReader(whole), tmp_path / "m.gguf", split_max_tensors=20)
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert others
    found, expected = inspect_file(first), inspect_file(whole)
    assert found.n_parts == 1 + len(others)
    assert found.host_runs
    for name in ("present", "missing", "head", "trunk", "forecast", "verdict", "n_heads"):
        assert getattr(found, name) == getattr(expected, name), name
    with pytest.raises(ModelFileError, match="not the first part"):
        inspect_file(others[0])


def copy(
    reader: gguf.GGUFReader, path: Path, dtype: Any = lambda name: None, **options: Any
) -> Path:
    """Write a GGUF again, with other types or in parts."""
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = value.types[1] if len(value.types) > 1 else None
            writer.add_key_value(key, value.contents(), value.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data, dtype=dtype(tensor.name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- verdicts -------------------------------------------------------------------------------------


def test_without_a_head_says_what_to_graft(model: ModelFactory) -> None:
    path = model("qwen35", head=None).path
    found = inspect_file(path)
    assert "no NextN head" in found.reason
    assert found.verdict == "graft"
    assert found.next_command == f"llama-mtp graft {path} HEAD.gguf -o JOINED.gguf"
    assert found.forecast is None
    assert found.host_runs is None  # there is nothing to ask


def test_names_what_was_dropped(model: ModelFactory) -> None:
    path = model("mimo2", drop_head_tensors=True).path
    found = inspect_file(path)
    assert found.present == ()
    assert "blk.2.nextn.eh_proj.weight" in found.missing
    assert found.verdict == "graft"
    assert found.next_command == f"llama-mtp graft {path} HEAD.gguf -o JOINED.gguf"


def test_a_head_alone_wants_its_model(model: ModelFactory, tmp_path: Path) -> None:
    trunk, head = splitting.split(model("qwen35").path, tmp_path)
    alone = inspect_file(head)
    assert alone.verdict == "graft"
    assert alone.next_command == f"llama-mtp graft BASE.gguf {head} -o JOINED.gguf"
    assert inspect_file(trunk).verdict == "graft"
    pair = inspect_file(trunk, draft_model=head)
    assert (pair.verdict, pair.host_runs) == ("run", True)
    assert pair.next_command == f"llama-mtp doctor {trunk} --draft-model {head}"


def test_a_head_of_another_model_is_not_for_this_one(model: ModelFactory, tmp_path: Path) -> None:
    _, head = splitting.split(model("qwen35").path, tmp_path)
    found = inspect_file(model("hy_v3", head=None).path, draft_model=head)
    assert found.verdict == "find"
    assert "belongs to a qwen35 model" in found.reason


def test_an_assistant_wants_its_target(family: Any) -> None:
    files = family("gemma4-assistant", FAMILIES["gemma4-assistant"].max_heads)
    found = inspect_file(files.draft)
    assert found.shares_kv
    assert found.verdict == "pair"
    assert found.next_command == f"llama-mtp inspect TARGET.gguf --draft-model {files.draft}"
    target = inspect_file(files.path)
    assert target.verdict == "pair"
    assert target.next_command == (f"llama-mtp inspect {files.path} --draft-model ASSISTANT.gguf")


@pytest.mark.parametrize("arch", [*NOT_EXECUTABLE, "llama"])
def test_without_a_graph_there_is_nothing_to_do(tmp_path: Path, arch: str) -> None:
    heads = {} if arch == "llama" else {"n_heads": 1, "n_layers": 3}
    found = inspect_file(write_header(tmp_path / "m.gguf", arch, TRUNK, **heads))
    assert found.verdict == "none"
    assert found.next_command == "llama-mtp plugins"
    assert found.forecast is None


def test_a_file_with_spaces_can_be_typed(model: ModelFactory, tmp_path: Path) -> None:
    path = tmp_path / "my model.gguf"
    path.symlink_to(model("qwen35").path)
    assert inspect_file(path, probe=False).next_command == f"llama-mtp doctor '{path}'"


# --- a host that refuses, dies or is silent -------------------------------------------------------


def patched(path: Path, small: models.Model, key: str, value: int) -> Path:
    """Copy a model with another number under ``key``."""
    data = bytearray(small.path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(data)
    return path


def test_what_the_host_says_last_is_the_reason(model: ModelFactory, tmp_path: Path) -> None:
    path = patched(tmp_path / "m.gguf", model("qwen35"), "qwen35.full_attention_interval", 1)
    found = inspect_file(path)
    assert found.host_runs is False
    assert "check_tensor_dims: tensor 'blk.0.attn_qkv.weight' has wrong shape" in found.reason
    assert found.verdict == "find"
    assert found.forecast is None


DYING = """
import os, sys
sys.stderr.write("load: fine\\n/build/src/x.cpp:12: GGML_ASSERT(n == 1) failed\\n  #1 a frame\\n")
sys.stderr.flush()
os.abort()
"""


def test_a_host_that_dies_leaves_us_alive(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ask = child.ask
    monkeypatch.setattr(child, "ask", lambda module, *args, **kw: ask("dying", *args, **kw))
    found = inspect_file(model("qwen35").path)
    assert found.host_runs is False
    assert "died of SIGABRT, last words: x.cpp:12: GGML_ASSERT(n == 1) failed." in found.reason
    assert found.verdict == "find"


def test_a_host_that_is_silent_is_not_waited_for(big: Path) -> None:
    start = time.perf_counter()
    answer = ask_host(big, n_ctx=512, depth=3, timeout=0.1)
    assert "gave no answer in 0.1 s" in answer.reason
    assert time.perf_counter() - start < 5


def test_what_the_user_has_set_for_other_runs_is_no_part_of_the_question(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_SPEC_TYPE", "none")
    monkeypatch.setenv("LLAMA_ARG_SPEC_DRAFT_P_MIN", "60")
    assert ask_host(model("qwen35").path, n_ctx=512, depth=3).reason == ""


# --- the command ----------------------------------------------------------------------------------


def run(*args: object) -> Any:
    return CliRunner().invoke(cli.app, ["inspect", *map(str, args)])


def test_json_says_the_same_as_the_function(model: ModelFactory) -> None:
    path = model("qwen35").path
    done = run(path, "--json", "--no-probe", "--n-ctx", 1000, "--depth", 2)
    assert done.exit_code == 0
    found: Inspection = inspect_file(path, n_ctx=1000, depth=2, probe=False)
    assert json.loads(done.stdout) == json.loads(json.dumps(found.to_dict()))
    assert json.loads(done.stdout)["forecast"]["parts"]["draft KV"] == 1024 * 64 * 2 * 2


def test_prints_parts_verdict_and_the_next_command(model: ModelFactory) -> None:
    path = model("hy_v3").path
    done = run(path)
    assert done.exit_code == 0, done.output
    for text in (
        str(path),
        "hy_v3",
        "2 layers, 1 NextN head",
        "mainly F32",
        "draft KV",
        "in all",
        "runs",
    ):
        assert text in done.output
    assert host.version() in done.output
    assert done.output.rstrip().endswith(f"Next: llama-mtp doctor {path}")


def test_what_a_file_calls_itself_does_not_steer_the_terminal(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen35")
    writer.add_name("a\x1b[2Jb\x07[red]c[/]")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    done = run(tmp_path / "m.gguf")
    assert done.exit_code == 1
    assert "\x1b" not in done.output
    assert "\x07" not in done.output
    assert "[2Jb" in done.output
    assert "[red]c[/]" in done.output


def test_without_the_host_says_so(model: ModelFactory) -> None:
    done = run(model("hy_v3").path, "--no-probe")
    assert "by the header alone" in done.output
    assert "only the host knows" in done.output
    assert "at least" in done.output


def test_a_file_without_a_head_ends_with_status_1(model: ModelFactory) -> None:
    path = model("qwen35", head=None).path
    done = run(path)
    assert done.exit_code == 1
    assert "no NextN head" in done.output
    assert f"Next: llama-mtp graft {path} HEAD.gguf -o JOINED.gguf" in done.output
