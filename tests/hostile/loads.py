"""Look for a file that `Llama(path, spec_type="auto")` does not survive.

    python tests/hostile/loads.py ARCHITECTURE... [--share 0.2] [--cases N] [--seed N]

One lie at a time is told about each key and each tensor of a constructed model; with ``--cases``
several at random after that. Each file is loaded in a fork. What ends the process is printed with
the host's last words: the package has to refuse such a file before the host reads it, as far as its
header tells.
"""

from __future__ import annotations

import copy
import os
import random
import re
import resource
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

os.environ["GGML_NO_BACKTRACE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import llama_cpp  # noqa: F401  the forks share it
import models
from models import families
from models.families import not_executable

from hostile import raw
from llama_mtp.gguf.types import BLOCKS

NUMBERS = (0, 1, 2, 3, 7, 31, 33, 512, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
# Keys that the host reads where they are there, and that the constructed models do not have.
EXTRA = (
    *("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"),
    *("nextn_predict_layers", "leading_dense_block_count", "embedding_length_out", "vocab_size"),
    *("attention.sliding_window", "full_attention_interval", "attention.shared_kv_layers"),
    *("rope.dimension_count", "attention.key_length", "attention.value_length", "pooling_type"),
    *("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"),
    *(
        "expert_feed_forward_length",
        "expert_shared_count",
        "expert_gating_func",
        "attention.causal",
    ),
    *("attention.head_count", "attention.head_count_kv", "feed_forward_length"),
    *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
    "ssm.group_count",
)

Case = tuple[str, raw.Gguf]


def single_lies(arch: str, sound: raw.Gguf) -> Iterator[Case]:
    for i, key in enumerate(sound.keys):
        name = key.name.decode()
        yield f"{name} left out", _with_key(sound, i, None)
        for kind, payload in (
            (4, raw.u32(1)),
            (6, raw.u32(0x7FC00000)),
            (7, b"\1"),
            (raw.STRING, raw.string(b"")),
            (raw.STRING, raw.string(b"x" * 200)),
            (raw.ARRAY, raw.u32(4) + raw.u64(0)),
            (raw.ARRAY, raw.u32(4) + raw.u64(2) + bytes(8)),
            (raw.ARRAY, raw.u32(5) + raw.u64(512) + bytes(4 * 512)),
            (raw.ARRAY, raw.u32(raw.STRING) + raw.u64(3) + raw.string(b"a") * 3),
        ):
            what = f"{name} = type {kind} {payload[:20].hex()}"
            yield what, _with_key(sound, i, raw.Key(key.name, kind, [payload]))
        if key.kind in (4, 5):
            for value in NUMBERS:
                new = raw.Key(key.name, key.kind, [raw.u32(value)])
                yield f"{name} = {value}", _with_key(sound, i, new)
        if key.kind == 6:
            for value in (0, 0x7F800000, 0xFF800000, 0x80000000, 0x7F7FFFFF):
                new = raw.Key(key.name, 6, [raw.u32(value)])
                yield f"{name} = float {value:x}", _with_key(sound, i, new)
    there = {key.name.decode() for key in sound.keys}
    for name in EXTRA:
        for value in NUMBERS:
            if f"{arch}.{name}" not in there:
                file = copy.copy(sound)
                file.keys = [*sound.keys, raw.number(f"{arch}.{name}", value)]
                yield f"{arch}.{name} = {value}, added", file
    for i, tensor in enumerate(sound.tensors):
        name = tensor.name.decode()
        for what, change in (
            ("left out", {"name": b"else"}),
            ("empty", {"dims": [0, *tensor.dims[1:]]}),
            ("transposed", {"dims": tensor.dims[::-1]}),
            *((f"type {kind}", {"kind": kind}) for kind in (1, 2, 9, 15, 24, 25, 26, 27, 28, 40)),
        ):
            yield f"{name} {what}", _with_tensor(sound, i, change)


def _with_key(sound: raw.Gguf, at: int, key: raw.Key | None) -> raw.Gguf:
    file = copy.copy(sound)
    file.keys = [*sound.keys[:at], *([key] if key else []), *sound.keys[at + 1 :]]
    return file


def _with_tensor(sound: raw.Gguf, at: int, change: dict[str, object]) -> raw.Gguf:
    """Change a tensor, and let all data be zeros in their new places."""
    file = copy.copy(sound)
    file.tail = []
    file.tensors = []
    for i, tensor in enumerate(sound.tensors):
        new = copy.copy(tensor)
        if i == at:
            for name, value in change.items():
                setattr(new, name, value)
        elements, size = BLOCKS[new.kind]
        n = 1
        for dim in new.dims:
            n *= dim
        new.offset, new.size = None, n // elements * size
        file.tensors.append(new)
    return file


def several_lies(rng: random.Random, arch: str, sound: raw.Gguf, n: int) -> Iterator[Case]:
    for _ in range(n):
        file, told = copy.deepcopy(sound), []
        for _ in range(rng.choice((2, 2, 3, 4))):
            key = rng.choice(file.keys)
            if key.kind not in (4, 5):
                continue
            old = int.from_bytes(key.payload[0][:4], "little")  # type: ignore[index]
            value = rng.choice((*NUMBERS, old + 1, old - 1, old * 2, old // 2))
            key.payload = [raw.u32(value)]
            told.append(f"{key.name.decode()} = {value}")
        yield ", ".join(told), file


def load(path: Path) -> tuple[str, str]:
    """Load a file in a fork: ``lives``, ``raises`` or what killed it, and the last words."""
    with tempfile.TemporaryFile() as words:
        child = os.fork()
        if child == 0:
            status = 2
            try:
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
                resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                from llama_mtp import Llama

                Llama(str(path), n_ctx=64, n_batch=32, n_ubatch=32, n_threads=1, verbose=True)
                status = 0
            except Exception as error:
                print(f"raised {type(error).__name__}: {error}", flush=True)
                status = 1
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        words.seek(0)
        text = words.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        aborts = re.findall(
            r"^.*(?:GGML_ASSERT|GGML_ABORT|\.cpp:\d+:|\.c:\d+:|\.h:\d+).*$", text, re.M
        )
        last = aborts[-1] if aborts else "\n".join(text.splitlines()[-1:])
        return signal.Signals(os.WTERMSIG(status)).name, last[-160:]
    kind = {0: "lives", 1: "raises"}.get(os.waitstatus_to_exitcode(status), "fails")
    return kind, text.splitlines()[-1] if kind == "raises" and text else ""


def _build(arch: str, folder: Path) -> Path:
    if arch in models.ARCHITECTURES:
        return models.build(folder / f"{arch}.gguf", arch).path
    return {**families.FAMILIES, **not_executable.FAMILIES}[arch].build(folder, 1, 1).path


def main(
    architectures: list[str],
    cases: Annotated[int, typer.Option(help="Files with several lies.")] = 0,
    share: Annotated[float, typer.Option(help="Of the single lies, how many are told.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Where the random numbers start.")] = 0,
) -> None:
    """Tell lies about constructed models of these architectures; the status says who died."""
    died: dict[tuple[str, str], list[str]] = defaultdict(list)
    count: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory() as folder:
        for arch in architectures:
            sound = raw.parse(_build(arch, Path(folder)).read_bytes())
            path = Path(folder) / "lie.gguf"
            rng = random.Random(seed)
            some = (lie for lie in single_lies(arch, sound) if rng.random() < share)
            for what, file in (*some, *several_lies(rng, arch, sound, cases)):
                raw.write(path, file.pieces())
                how, words = load(path)
                count[how] += 1
                if how not in ("lives", "raises"):
                    died[how, words].append(f"{arch}: {what}")
    print(dict(count))
    for (how, words), whats in sorted(died.items()):
        print(f"\n{how}: {words}\n  " + "\n  ".join(whats[:12]) + f"\n  ({len(whats)} in all)")
    raise typer.Exit(1 if died else 0)


if __name__ == "__main__":
    typer.run(main)
