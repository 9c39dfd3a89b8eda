"""Look for a file that makes a reader crash, hang, grow, or raise anything but its own errors.

    python tests/hostile/fuzz.py --minutes 60 [--seed N] [--target header] [--keep FOLDER]
    python tests/hostile/fuzz.py --seed N --target shards --only CASE

Cases are sound files with a few lies in them. A reader runs in a process of its own, which is
killed when it hangs and started anew when it dies. Every offending file is made smaller, as long as
it offends in the same way, and kept.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

import models

from hostile import raw, readers

HANG = 30.0  # wall seconds, on a machine that may be busy; the limit of processor time is shorter
EDGES = sorted(
    {
        max(0, 2**power + delta)
        for power in (0, 3, 5, 7, 8, 15, 16, 20, 30, 31, 32, 33, 40, 47, 61, 62, 63)
        for delta in (-1, 0, 1)
    }
    | {2**64 - 1, 2**64 - 8, 2**64 - 31, 2**64 - 32, 2**64 - 33, 2**63 - 32}
)
GIGABYTES = (2**28, 2**30, 2**31, 5 * 2**30, 2**40)
ARCHITECTURES = ("qwen35", "mimo2", "llama", "glm4", "nemotron_h_moe", "novel", "", "x" * 300)
ODD = (
    b"",
    b"\xff\xfe\x80",
    b"\x00",
    b"a\x00b",
    b"\xed\xa0\x80",
    "ß\u2028".encode(),
    b"\n",
    b"x" * 64,
)


# ---- lies ---------------------------------------------------------------------------------------

Lie = Callable[[random.Random, raw.Gguf], None]


def edge(rng: random.Random) -> int:
    return rng.choice(EDGES) if rng.random() < 0.8 else rng.getrandbits(rng.choice((8, 16, 32, 64)))


def payload(rng: random.Random, depth: int = 0) -> tuple[int, raw.Pieces]:
    """A metadata value of any type, true or false about its own length."""
    choice = rng.randrange(9)
    if choice == 0:
        return raw.STRING, [raw.u64(edge(rng)), rng.randbytes(rng.randrange(9))]
    if choice == 1:
        size = rng.choice(GIGABYTES)
        return raw.STRING, [raw.u64(size), size]
    if choice == 2:
        kind = rng.choice((*raw.PACKED, raw.STRING, raw.ARRAY, 13, edge(rng)))
        return raw.ARRAY, [raw.u32(kind), raw.u64(edge(rng)), rng.randbytes(rng.randrange(40))]
    if choice == 3:  # an array that is there: of zeros, so strings are empty
        count = rng.choice((0, 1, 10**5, 3 * 10**6, 3 * 10**7, 10**9))
        return raw.ARRAY, [raw.u32(rng.choice((raw.STRING, 4, 7, 12))), raw.u64(count), 8 * count]
    if choice == 4:  # long strings
        length = rng.choice((100, 4088, 70_000, 2**20, 2**27))
        count = rng.choice((1, 30, 500))
        pieces: raw.Pieces = [raw.u32(raw.STRING), raw.u64(count)]
        return raw.ARRAY, pieces + [raw.u64(length), length] * count
    if choice == 5 and depth < 3:
        kind, inner = payload(rng, depth + 1)
        return raw.ARRAY, [raw.u32(kind), raw.u64(rng.choice((1, 2, edge(rng)))), *inner]
    if choice == 6:
        return edge(rng) & 0xFFFFFFFF, [rng.randbytes(8)]
    if choice == 7:
        text = rng.choice((*ODD, b"\xff" * 2**20, "\U0001f600".encode() * 2**18))
        return raw.STRING, [raw.string(text)]
    kind = rng.choice(tuple(raw.PACKED))
    size = len(raw.scalar("", kind, 0).payload[0])  # type: ignore[arg-type]
    return kind, [(edge(rng) & (256**size - 1)).to_bytes(size, "little")]


def lie_about_counts(rng: random.Random, file: raw.Gguf) -> None:
    if rng.random() < 0.5:
        file.n_keys = rng.choice((edge(rng), len(file.keys) + rng.choice((-1, 1))))
    else:
        file.n_tensors = rng.choice((edge(rng), len(file.tensors) + rng.choice((-1, 1))))


def lie_in_a_value(rng: random.Random, file: raw.Gguf) -> None:
    key = rng.choice(file.keys)
    key.kind, key.payload = payload(rng)


def lie_in_a_number(rng: random.Random, file: raw.Gguf) -> None:
    key = rng.choice([key for key in file.keys if key.kind in (2, 4, 5)] or file.keys)
    key.payload = [raw.u32(edge(rng))]


def lie_in_a_name(rng: random.Random, file: raw.Gguf) -> None:
    thing: raw.Key | raw.Tensor = rng.choice([*file.keys, *file.tensors])
    others = [other.name for other in (*file.keys, *file.tensors)]
    thing.name = rng.choice((*ODD, b"n" * 70_000, rng.choice(others), rng.randbytes(12)))


def lie_in_a_type(rng: random.Random, file: raw.Gguf) -> None:
    thing: raw.Key | raw.Tensor = rng.choice([*file.keys, *file.tensors])
    thing.kind = rng.choice((rng.randrange(48), edge(rng)))


def lie_about_shape(rng: random.Random, file: raw.Gguf) -> None:
    if not file.tensors:
        return
    tensor = rng.choice(file.tensors)
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.3:
            tensor.dims = [edge(rng) for _ in range(rng.randrange(6))]
        elif tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 32, 256, edge(rng)))
    if rng.random() < 0.2:
        tensor.n_dims = edge(rng)


def lie_about_place(rng: random.Random, file: raw.Gguf) -> None:
    if not file.tensors:
        return
    tensor = rng.choice(file.tensors)
    tensor.offset = rng.choice((0, 32, 64, 128 * rng.randrange(20), edge(rng)))
    if rng.random() < 0.3:
        tensor.size = rng.choice((0, 1, 31, 4096, 2**31))


def lie_about_alignment(rng: random.Random, file: raw.Gguf) -> None:
    kind, content = payload(rng) if rng.random() < 0.5 else (4, [raw.u32(edge(rng))])
    file.keys.insert(0, raw.Key(b"general.alignment", kind, content))


def drop_or_repeat(rng: random.Random, file: raw.Gguf) -> None:
    things: list[Any] = file.keys if rng.random() < 0.5 else file.tensors
    if things:
        at = rng.randrange(len(things))
        things[at:at] = [things[at]] if rng.random() < 0.5 else []
        if rng.random() < 0.5:
            del things[at]


def say_very_much(rng: random.Random, file: raw.Gguf) -> None:
    count = rng.choice((1000, 20_000, 120_000))
    if rng.random() < 0.5:
        name = rng.choice((b"k", b"\xff" * 20, b"tokenizer." * 9))
        file.keys += [raw.Key(name + b"%d" % i, 0, [b"\0"]) for i in range(count)]
    else:
        dims = rng.choice(([], [0], [1], [2**62, 2, 0]))
        file.tensors += [raw.Tensor(b"t%d" % i, dims, size=0) for i in range(count)]
    if rng.random() < 0.3:
        file.keys += [raw.Key(b"s%d" % i, 8, [raw.string(b"\xff" * 2**19)]) for i in range(40)]


def other_start(rng: random.Random, file: raw.Gguf) -> None:
    file.magic = rng.choice((b"GGUF", b"GGUF", b"GGML", b"", b"FUGG"))
    file.version = rng.choice((1, 2, 3, 4, 3 << 24, edge(rng)))


LIES: tuple[Lie, ...] = (
    *(lie_about_counts, lie_in_a_value, lie_in_a_value, lie_in_a_number, lie_in_a_name),
    *(lie_in_a_type, lie_about_shape, lie_about_shape, lie_about_place, lie_about_alignment),
    *(drop_or_repeat, other_start),
)


def some_model(rng: random.Random) -> raw.Gguf:
    return raw.model(rng.choice(ARCHITECTURES), rng.randrange(4), rng.choice((0, 1, 1, 2, 3)))


def tell_lies(rng: random.Random, file: raw.Gguf) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(LIES)(rng, file)
    if rng.random() < 0.01:  # costly to write, so seldom
        say_very_much(rng, file)


def damage(rng: random.Random, pieces: raw.Pieces) -> raw.Pieces:
    """Now and then, cut the file or change bytes without regard to what they mean."""
    if rng.random() < 0.7 or raw.size_of(pieces) > 2**20:
        return pieces
    content = bytearray(b"".join(bytes(p) if isinstance(p, int) else p for p in pieces))
    if rng.random() < 0.5:
        del content[rng.randrange(len(content) + 1) :]
    for _ in range(rng.choice((0, 1, 1, 4, 30))):
        if content:
            at = rng.randrange(len(content))
            content[at] = rng.choice((0, 255, rng.getrandbits(8), content[at] ^ 1 << at % 8))
    return [bytes(content)]


# ---- cases: each writes into an empty folder and returns the path to read -----------------------


def one_file(rng: random.Random, folder: Path) -> Path:
    file = some_model(rng)
    tell_lies(rng, file)
    return raw.write(folder / "m.gguf", damage(rng, file.pieces()))


def shards(rng: random.Random, folder: Path) -> Path:
    """Parts of a split model, some of which are missing, wrong, or name each other."""
    n_parts = rng.choice((2, 2, 3, 5, 40))
    prefix = rng.choice(("m", "m", "a b", "ß", "x\ny", "%s%d", "-00001-of-00002", "\udcff\udcfe"))
    parts = raw.split(raw.model("mimo2", 2, 3), n_parts)
    paths = [folder / raw.part_name(prefix, i, n_parts) for i in range(n_parts)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        tell_lies(rng, rng.choice(parts))
    for _ in range(rng.choice((0, 0, 1, 2))):
        key = rng.choice(rng.choice(parts).keys[-3:])
        number = rng.choice((0, 1, n_parts - 1, n_parts, n_parts + 1, 4095, 65535, edge(rng)))
        kind = rng.choice((2, 2, 4, 5, 10, 11))
        key.kind, key.payload = kind, [raw.u64(number)[: 8 if kind > 9 else 2 if kind == 2 else 4]]
    for path, part in zip(paths, parts, strict=True):
        raw.write(path, part.pieces())
    for _ in range(rng.choice((0, 0, 1, 2))):
        path, other = rng.choice(paths), rng.choice(paths)
        path.unlink(missing_ok=True)
        kind = rng.randrange(5)
        if kind == 0:
            path.symlink_to(other.name)  # perhaps itself
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.mkdir()
            break
        elif kind == 3:
            path.symlink_to("/dev/zero")
    return rng.choice((paths[0], paths[0], paths[0], paths[-1], folder / "absent.gguf"))


def base_and_head(rng: random.Random, folder: Path) -> Path:
    """Two files of one model, one of which lies."""
    for name, n_heads in (("base", 0), ("head", 1)):
        file = _sound(n_heads)
        if rng.random() < 0.6:
            tell_lies(rng, file)
        pieces = file.pieces()
        if raw.size_of(pieces) > 2**23:  # it would be copied
            pieces = _sound(n_heads).pieces()
        raw.write(folder / f"{name}.gguf", damage(rng, pieces))
    return folder


def _sound(n_heads: int) -> raw.Gguf:
    if n_heads not in _SOUND:
        with tempfile.TemporaryDirectory() as folder:
            built = models.build(
                Path(folder) / "m.gguf", "qwen35", head="hidden" if n_heads else None, n_trunk=2
            )
            _SOUND[n_heads] = raw.parse(built.path.read_bytes())
    return copy.deepcopy(_SOUND[n_heads])


_SOUND: dict[int, raw.Gguf] = {}


def checkpoint(rng: random.Random, folder: Path) -> Path:
    """A shard of safetensors with an index, with lies in the JSON of either."""
    header: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [2, 4], "data_offsets": [32 * i, 32 * i + 32]}
        for i, name in enumerate("abc")
    }
    index: dict[str, Any] = {"weight_map": dict.fromkeys("abc", "model.safetensors")}
    numbers = (*EDGES, -1, -(2**63), 0.5, 1e308, 10**400)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = [header, index, *header.values(), *index.values()]
        place = rng.choice([place for place in places if isinstance(place, dict)])
        key = rng.choice([*place, "__metadata__", ""])
        value: Any = rng.choice(
            (
                *(rng.choice(numbers), None, True, "", "F8_E4M3", "BF16", "F64", "\ud800"),
                *([], {}, [[]], {"a": "../m.safetensors"}, {"a": "/etc/passwd"}, {"a": 7}),
            )
        )
        if key in ("shape", "data_offsets") and rng.random() < 0.7:
            value = [rng.choice(numbers) for _ in range(rng.randrange(4))]
        place[key] = value
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"null", b"{}", b"", b"\xff"))
    length = edge(rng) if rng.random() < 0.1 else len(text)
    pieces: raw.Pieces = [raw.u64(length), text, rng.choice((96, 96, 0, 95, 2**33))]
    raw.write(folder / "model.safetensors", damage(rng, pieces))
    if rng.random() < 0.7:
        content = damage(rng, [json.dumps(index).encode()])
        raw.write(folder / "model.safetensors.index.json", content)
    return folder


CASES: dict[str, Callable[[random.Random, Path], Path]] = {
    "header": one_file,
    "inspect": one_file,
    "shards": shards,
    "report": one_file,
    "graft": base_and_head,
    "safetensors": checkpoint,
}


# ---- running ------------------------------------------------------------------------------------


class Reader:
    """A reader in a process of its own, which may die."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(Path(readers.__file__)), self.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, path: Path) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(str(path)), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], HANG)
        line = self.process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if not ready:
            self.process.kill()
        status = self.process.wait()
        self.process = self.start()
        return {"outcome": f"died with {status}" if ready else "hung", "seconds": 0, "megabytes": 0}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def offence(answer: dict[str, Any], target: str = "header") -> str | None:
    """What is wrong with the answer of a reader; None for nothing."""
    seconds, megabytes = readers.limits(target)
    if answer["outcome"] not in ("read", "refused"):
        return str(answer["outcome"])
    if answer["seconds"] > seconds:
        return "slow"
    return "large" if answer["megabytes"] > megabytes else None


def minimise(reader: Reader, path: Path, what: str, attempts: int = 300) -> None:
    """Cut pieces out of the file at `path` as long as it offends in the same way."""
    if not path.is_file() or path.stat().st_size > 2**22:
        return
    content, step = path.read_bytes(), path.stat().st_size // 2
    while step and attempts:
        at = 0
        while at < len(content) and attempts:
            attempts -= 1
            shorter = content[:at] + content[at + step :]
            path.write_bytes(shorter)
            if offence(reader.read(path), reader.target) == what:
                content = shorter
            else:
                at += step
        step //= 2
    path.write_bytes(content)


def main(
    minutes: Annotated[float, typer.Option(help="How long to look.")] = 60,
    seed: Annotated[int, typer.Option(help="Where the random numbers start.")] = 0,
    target: Annotated[str, typer.Option(help=f"One of: all, {', '.join(CASES)}.")] = "all",
    keep: Annotated[Path, typer.Option(help="Where offending files go.")] = Path("offending"),
    only: Annotated[int, typer.Option(help="Run this case of one target again.")] = -1,
) -> None:
    """Read hostile files until the time is over; the exit status says whether any offended."""
    targets = [*CASES] if target == "all" else [target]
    running = {name: Reader(name) for name in targets}
    outcomes: Counter[str] = Counter()
    offences: Counter[str] = Counter()
    worst = {"seconds": 0.0, "megabytes": 0.0}
    start, case, said = time.monotonic(), max(only, 0), 0.0
    work = Path(tempfile.mkdtemp(prefix="hostile-"))
    while (spent := time.monotonic() - start) < 60 * minutes:
        name = targets[case % len(targets)]
        folder = work / "case"
        folder.mkdir()
        path = CASES[name](random.Random(f"{seed} {case}"), folder)
        answer = running[name].read(path)
        outcomes[f"{name}: {answer['outcome']}"] += 1
        worst = {k: max(v, answer[k]) for k, v in worst.items()}
        if what := offence(answer, name):
            signature = f"{name}: {what}"
            offences[signature] += 1
            if offences[signature] <= 3:
                print(f"case {case} of seed {seed}, {signature}: {answer.get('message', '')!a}")
                if len([*folder.iterdir()]) == 1:
                    minimise(running[name], path, what)
                kept = keep / f"{name}-{seed}-{case}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept, symlinks=True, ignore=_only_small)
        shutil.rmtree(folder)
        case += 1
        if only >= 0:
            break
        if spent - said > 60:
            said = spent
            _say(case, spent, outcomes, offences, worst)
    _say(case, time.monotonic() - start, outcomes, offences, worst)
    for reader in running.values():
        reader.close()
    shutil.rmtree(work)
    raise typer.Exit(1 if offences else 0)


def _only_small(folder: str, names: list[str]) -> list[str]:
    """Which files are not worth keeping: the seed and the case make them again."""
    paths = {name: Path(folder) / name for name in names}
    return [
        n for n, p in paths.items() if p.is_fifo() or (p.is_file() and p.stat().st_size > 2**22)
    ]


def _say(
    case: int,
    seconds: float,
    outcomes: Counter[str],
    offences: Counter[str],
    worst: dict[str, float],
) -> None:
    print(
        f"{case} cases in {seconds / 60:.1f} min, {case / seconds * 60:.0f} a minute; "
        f"at most {worst['seconds']:.2f} s and {worst['megabytes']:.0f} MB; "
        f"{dict(outcomes)}; offences {dict(offences)}",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
