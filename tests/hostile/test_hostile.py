"""Files that lie are answered within a second and 200 MB, without a crash or a strange error.

`hostile/fuzz.py` looks for such files at random; here are the ones worth keeping, built from a
table. Each is read in a process of its own that measures itself.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from conftest import COMMON
from models import families

import llama_mtp
from hostile import fuzz, raw, readers
from hostile.raw import Gguf, Key, Pieces, Tensor
from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.header import ArrayInfo, read_header
from llama_mtp.heads.check import check_head

GIGABYTE = 2**30


@pytest.fixture(scope="module")
def reader() -> Iterator[fuzz.Reader]:
    running = fuzz.Reader("inspect")
    yield running
    running.close()


def answer(reader: fuzz.Reader, path: Path) -> tuple[str, str]:
    """Outcome and message, after the limits were checked."""
    said = reader.read(path)
    assert fuzz.offence(said) is None, said
    return said["outcome"], said["message"]


# ---- one file -----------------------------------------------------------------------------------


def changed(change: Callable[[Gguf], Any]) -> Pieces:
    file = raw.model()
    change(file)
    return file.pieces()


def with_key(name: str, kind: int, *payload: bytes | int, first: bool = False) -> Pieces:
    """The sound model with one more entry, or with another value for one that it has."""
    key = Key(name.encode(), kind, [*payload])

    def change(file: Gguf) -> None:
        file.keys = [k for k in file.keys if k.name != key.name]
        file.keys.insert(0 if first else len(file.keys), key)

    return changed(change)


def with_tensor(at: int = 2, **fields: Any) -> Pieces:
    """The sound model with other fields in one tensor, whose size follows from them."""

    def change(file: Gguf) -> None:
        for name, value in fields.items():
            setattr(file.tensors[at], name, value)

    return changed(change)


def strings(count: int, length: int) -> Pieces:
    body: Pieces = [8 * count] if length == 0 else [raw.u64(length), length] * count
    return [raw.u32(raw.STRING), raw.u64(count), *body]


def nested(depth: int) -> Pieces:
    return [raw.u32(raw.ARRAY) + raw.u64(1)] * depth + [raw.u32(0) + raw.u64(1) + b"\0"]


READ = "^$"  # a file that is unusual and sound: no message
FILES: dict[str, tuple[Pieces, str]] = {
    "sound": (raw.model().pieces(), READ),
    # counts
    "2^63 keys": (changed(lambda f: setattr(f, "n_keys", 2**63)), "do not fit"),
    "2^64-1 tensors": (changed(lambda f: setattr(f, "n_tensors", 2**64 - 1)), "do not fit"),
    "one key too many": (changed(lambda f: setattr(f, "n_keys", len(f.keys) + 1)), "damaged"),
    "one tensor less": (changed(lambda f: setattr(f, "n_tensors", len(f.tensors) - 1)), READ),
    "2^32 keys in a long file": (Gguf(n_keys=2**32, tail=[16 * 2**32]).pieces(), "is empty"),
    "2^36 tensors in a long file": (Gguf(n_tensors=2**36, tail=[2**42]).pieces(), "occurs twice"),
    # strings
    "a string of 2^64-1 bytes": (with_key("s", 8, raw.u64(2**64 - 1)), "truncated or damaged"),
    "a string of 2^63 bytes": (with_key("s", 8, raw.u64(2**63)), "truncated or damaged"),
    "a string of 200 MB": (with_key("s", 8, raw.u64(2 * 10**8), 2 * 10**8), READ),
    "a string of 5 GB": (with_key("s", 8, raw.u64(5 * GIGABYTE), 5 * GIGABYTE), "larger header"),
    "a key of 5 GB": (
        Gguf(n_keys=1, tail=[raw.u64(5 * GIGABYTE), 6 * GIGABYTE]).pieces(),
        "a metadata key has",
    ),
    "an architecture of 1 MB": (
        with_key("general.architecture", 8, raw.string(b"\xff" * 2**20)),
        READ,
    ),
    "a megabyte of bad text twenty times": (
        changed(lambda f: f.keys.extend(raw.text(f"k{i}", b"\xff" * 2**20) for i in range(20))),
        "larger header",
    ),
    "names that are no text": (
        changed(lambda f: f.keys.append(Key(b"\xff\xfe\xed\xa0\x80", 0, [b"\0"]))),
        READ,
    ),
    "two names that are no text and look alike": (
        changed(lambda f: f.keys.extend([Key(b"\xff", 0, [b"\0"]), Key(b"\xfe", 0, [b"\0"])])),
        "occurs twice",
    ),
    # arrays
    "2^61 numbers": (with_key("a", 9, raw.u32(10), raw.u64(2**61)), "do not fit"),
    "2^61 strings": (with_key("a", 9, raw.u32(8), raw.u64(2**61)), "do not fit"),
    "3 million empty strings": (with_key("a", 9, *strings(3_000_000, 0)), READ),
    "30 million empty strings": (with_key("a", 9, *strings(30_000_000, 0)), "larger header"),
    "800 thousand equal tokens": (
        with_key("tokenizer.ggml.tokens", 9, *strings(800_000, 0)),
        READ,  # an empty one gets a name of its own
    ),
    "60 thousand strings of 4 KB": (with_key("a", 9, *strings(60_000, 4088)), READ),
    "500 strings of 1 MB": (with_key("a", 9, *strings(500, 2**20)), "larger header"),
    "a string without end among many": (
        with_key("a", 9, raw.u32(8), raw.u64(3), raw.string(b"a"), raw.u64(2**64 - 9), 64),
        "truncated or damaged",
    ),
    "arrays in arrays": (with_key("a", 9, *nested(1000)), "unknown element type 9"),
    "an array of no type": (with_key("a", 9, raw.u32(13), raw.u64(0)), "unknown element type"),
    "a value of no type": (with_key("a", 2**32 - 1), "unknown type"),
    # very many
    "50 thousand keys": (
        changed(lambda f: f.keys.extend(Key(b"k%d" % i, 0, [b"\0"]) for i in range(50_000))),
        READ,
    ),
    "200 thousand keys": (
        changed(lambda f: f.keys.extend(Key(b"k%d" % i, 0, [b"\0"]) for i in range(200_000))),
        "larger header",
    ),
    "50 thousand tensors": (
        changed(lambda f: f.tensors.extend(Tensor(b"t%d" % i, [0], size=0) for i in range(50_000))),
        READ,
    ),
    # tensors
    "overlapping tensors": (with_tensor(offset=128), "overlaps the one before"),
    "all tensors in one place": (
        changed(lambda f: [setattr(t, "offset", 0) for t in f.tensors]),
        "overlaps the one before",
    ),
    "a gap before a tensor": (with_tensor(offset=288), "wrong offset"),
    "an odd offset": (with_tensor(offset=257), "wrong offset"),
    "an offset of 2^64-32": (with_tensor(offset=2**64 - 32), "wrong offset"),
    "a tensor of no element": (with_tensor(dims=[0, 4], size=0), READ),
    "no element in 2^62 rows": (with_tensor(dims=[0, 2**62], size=0), READ),
    "no element, and a negative dimension": (with_tensor(dims=[0, 2**63], size=0), "impossible"),
    "2^62 x 4 numbers": (with_tensor(dims=[2**62, 4]), "impossible shape"),
    "2^32 x 2^32 numbers": (with_tensor(dims=[2**32, 2**32]), "impossible shape"),
    "2^21 in each dimension": (with_tensor(dims=[2**21] * 3), "impossible shape"),
    "2^61 numbers of 4 bytes": (with_tensor(dims=[2**61]), "truncated"),
    "five dimensions": (with_tensor(dims=[1] * 5), "dimensions, more than 4"),
    "2^32-1 dimensions": (with_tensor(n_dims=2**32 - 1), "dimensions, more than 4"),
    "no dimension": (with_tensor(dims=[], size=4), READ),
    "half a block": (with_tensor(kind=2, dims=[8, 4], size=18), "half a block"),
    "a type that is not known": (with_tensor(kind=999), READ),  # the host will say so
    "two tensors of one name": (with_tensor(name=b"blk.0.attn_norm.weight"), "occurs twice"),
    "a name of 64 bytes": (with_tensor(name=b"n" * 64), "not 63 at most"),
    "a zero in a name": (with_tensor(name=b"blk.2.nextn\0.weight"), READ),
    # alignment
    **{
        f"alignment {value}": (
            with_key("general.alignment", 4, raw.u32(value), first=True),
            "not a power of two",
        )
        for value in (0, 3, 2**32 - 1)
    },
    "alignment 2^31": (with_key("general.alignment", 4, raw.u32(2**31)), "is truncated"),
    "alignment that is text": (with_key("general.alignment", 8, raw.string(b"32")), "power of two"),
    "alignment that is true": (with_key("general.alignment", 7, b"\1"), "no uint32"),
    # split
    "the first of 2^31 parts": (with_key("split.count", 4, raw.u32(2**31)), "not the first part"),
    "split.count -1": (with_key("split.count", 5, raw.u32(2**32 - 1)), READ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lies_is_answered_soon(tmp_path: Path, reader: fuzz.Reader, name: str) -> None:
    pieces, message = FILES[name]
    path = raw.write(tmp_path / "m.gguf", pieces)
    outcome, said = answer(reader, path)
    assert outcome == ("read" if message == READ else "refused")
    assert message == READ or message in said
    assert len(said) < 1000


def test_a_long_string_is_skipped_as_an_array_is(tmp_path: Path) -> None:
    pieces = with_key("s", 8, raw.u64(2**20 + 1), 2**20 + 1)
    header = read_header(raw.write(tmp_path / "m.gguf", pieces))
    assert header.metadata["s"] == ArrayInfo(0, 2**20 + 1)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, reader: fuzz.Reader) -> None:
    pipe, loop = tmp_path / "pipe.gguf", tmp_path / "loop.gguf"
    os.mkfifo(pipe)
    loop.symlink_to(loop.name)
    for path in (pipe, loop, tmp_path, Path("/dev/zero"), Path("/dev/null"), Path("a\0b")):
        outcome, message = answer(reader, path)
        assert outcome == "refused" and "cannot be read" in message


# ---- parts --------------------------------------------------------------------------------------


def write_parts(folder: Path, n_parts: int, prefix: str = "m") -> list[Path]:
    parts = raw.split(raw.model("mimo2", 2, 3), n_parts)
    return [
        raw.write(folder / raw.part_name(prefix, i, n_parts), part.pieces())
        for i, part in enumerate(parts)
    ]


def renumber(path: Path, part_number: int, n_parts: int, kind: int, number: int) -> None:
    """Give a part another number, or one of another type."""
    part = raw.split(raw.model("mimo2", 2, 3), n_parts)[part_number]
    part.keys[-3] = raw.scalar("split.no", kind, number)
    raw.write(path, part.pieces())


@pytest.mark.parametrize("prefix", ["m", "a b", "ß", "x\ny", "%s%d", "-00001-of-00002", "\udcff"])
def test_parts_may_have_any_name(tmp_path: Path, reader: fuzz.Reader, prefix: str) -> None:
    paths = write_parts(tmp_path, 3, prefix)
    assert answer(reader, paths[0]) == ("read", "")
    outcome, message = answer(reader, paths[1])
    assert outcome == "refused" and "not the first part" in message


def test_what_is_said_of_a_name_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 2, "\udcff")
    file = raw.split(raw.model("mimo2", 2, 3), 2)[0]
    set_key(file, raw.number("mimo2.block_count", 513))
    raw.write(paths[0], file.pieces())
    with pytest.raises(ModelFileError) as caught:
        check_head(paths[0])
    assert b"\\udcff-00001-of-00002.gguf declares 513 layers" in str(caught.value).encode()


def test_parts_that_name_each_other(tmp_path: Path, reader: fuzz.Reader) -> None:
    first, second, third = write_parts(tmp_path, 3)
    for target, message in (
        (first, "is not part 2"),
        (third, "is not part 2"),
        (second, "cannot be read"),  # itself
        (Path("/dev/zero"), "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        second.unlink()
        second.symlink_to(target)
        outcome, said = answer(reader, first)
        assert outcome == "refused" and message in said


@pytest.mark.parametrize(("kind", "number"), [(2, 2), (2, 0), (2, 65535), (4, 1)])
def test_a_part_with_a_wrong_number(
    tmp_path: Path, reader: fuzz.Reader, kind: int, number: int
) -> None:
    paths = write_parts(tmp_path, 3)
    renumber(paths[1], 1, 3, kind, number)
    outcome, message = answer(reader, paths[0])
    assert outcome == "refused" and "is not part 2" in message


def test_parts_that_repeat_a_tensor(tmp_path: Path, reader: fuzz.Reader) -> None:
    paths = write_parts(tmp_path, 2)
    parts = raw.split(raw.model("mimo2", 2, 3), 2)
    parts[1].tensors = parts[0].tensors
    raw.write(paths[1], parts[1].pieces())
    outcome, message = answer(reader, paths[0])
    assert outcome == "refused" and "repeats tensor" in message


def test_a_cut_part_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    first, second = write_parts(tmp_path, 2)
    check_head(first)
    content = second.read_bytes()
    for size in range(len(content)):
        second.write_bytes(content[:size])
        with pytest.raises(ModelFileError):
            check_head(first)


def test_a_thousand_parts_share_one_budget(tmp_path: Path, reader: fuzz.Reader) -> None:
    n_parts = 1000
    for part in range(n_parts):
        keys = [raw.scalar("split.no", 2, part), raw.scalar("split.count", 2, n_parts)]
        keys += [raw.number(f"k{i}", i) for i in range(60)]
        raw.write(tmp_path / raw.part_name("m", part, n_parts), Gguf(keys).pieces())
    outcome, message = answer(reader, tmp_path / raw.part_name("m", 0, n_parts))
    assert outcome == "refused" and "larger header" in message


# ---- what libllama would not survive ------------------------------------------------------------

Change = Callable[[Gguf, str], Any]


def value(name: str, number: int) -> Change:
    return lambda file, arch: set_key(file, raw.number(f"{arch}.{name}", number))


def set_key(file: Gguf, key: Key) -> None:
    file.keys = [k for k in file.keys if k.name != key.name] + [key]


def stored_as(name: str, kind: int) -> Change:
    def change(file: Gguf, arch: str) -> None:
        tensor = next(t for t in file.tensors if t.name == name.encode())
        tensor.kind = kind

    return change


def experts(n: int, used: int, groups: int = 0, groups_used: int = 0) -> Change:
    def change(file: Gguf, arch: str) -> None:
        for name, number in (
            ("count", n),
            ("used_count", used),
            ("group_count", groups),
            ("group_used_count", groups_used),
        ):
            set_key(file, raw.number(f"{arch}.expert_{name}", number))

    return change


def repeated_token(file: Gguf, arch: str) -> None:
    tokens = [b"t%d" % i for i in range(models.N_VOCAB - 2)] + [b"t5\0else", b""]
    set_key(file, raw.strings("tokenizer.ggml.tokens", tokens))


ABORTS: dict[str, tuple[str, Change, str]] = {
    "no layer": ("mimo2", value("block_count", 0), "declares 0 layers"),
    "more heads than layers": ("mimo2", value("nextn_predict_layers", 4), "declares 3 layers"),
    "513 layers": ("mimo2", value("block_count", 513), "declares 513 layers"),
    "more experts used than there are": ("mimo2", experts(0, 1), "uses 1 of 0 experts"),
    "no expert used": ("mimo2", experts(4, 0), "uses 0 of 4 experts"),
    "too many experts": ("mimo2", experts(1025, 1), "declares 1025 experts"),
    "groups of no expert": ("mimo2", experts(0, 0, 1), "groups of 0 experts"),
    "as many groups as experts": ("mimo2", experts(4, 2, 4, 2), "4 groups of 4 experts"),
    "groups that do not divide": ("mimo2", experts(4, 2, 3, 1), "3 groups of 4 experts"),
    "all groups used": ("mimo2", experts(4, 2, 2, 2), "2 of 2 groups"),
    "unknown rope scaling": (
        "mimo2",
        lambda file, arch: set_key(file, raw.text(f"{arch}.rope.scaling.type", "spiral")),
        "unknown RoPE scaling",
    ),
    "unknown choice of experts": ("step35", value("expert_gating_func", 5), "unknown function 5"),
    "more rotated than there is": (
        "deepseek2",
        value("attention.key_length_mla", 1),
        "of 1 numbers of a head",
    ),
    "keys of another length": ("deepseek2", value("attention.key_length", 513), "keys of 513"),
    "two latent keys": ("deepseek2", value("attention.head_count_kv", 2), "2 latent keys"),
    "half a head rotated": ("hy_v3", value("rope.dimension_count", 16), "rotates 16 of 32"),
    "attention in every 0th layer": ("qwen35", value("full_attention_interval", 0), "every 0th"),
    "heads of another width": ("qwen35", value("ssm.inner_size", 32), "that make 32"),
    "embeddings in whole numbers": ("mimo2", stored_as("token_embd.weight", 26), "whole numbers"),
    "a token twice": ("mimo2", repeated_token, "a token twice"),
    "keys of the latent and more": ("bailingmoe3", value("attention.key_length", 513), "of 513"),
    "every layer but every one": (
        "cohere2moe",
        value("attention.sliding_window_pattern", 1),
        "no layer that uses it",
    ),
    "other heads in the window": (
        "cohere2moe",
        value("attention.key_length_swa", 7),
        "key_length 7 in the window",
    ),
    "sinks in whole numbers": (
        "deepseek4",
        stored_as("blk.0.attn_sinks.weight", 26),
        "something else than F32",
    ),
    "many keys of one latent": ("deepseek4", value("attention.head_count_kv", 31), "31 keys"),
    "no layer in the window": (
        "mimo2",
        lambda file, arch: set_key(
            file, raw.numbers(f"{arch}.attention.sliding_window_pattern", 7, [False] * 3)
        ),
        "no layer that uses it",
    ),
}


def lying_model(folder: Path, arch: str, change: Change) -> Path:
    if arch in models.ARCHITECTURES:
        sound = models.build(folder / "sound.gguf", arch).path
    else:
        sound = families.FAMILIES[arch].build(folder, 1, 1).path
    file = raw.parse(sound.read_bytes())
    change(file, arch)
    return raw.write(folder / "lie.gguf", file.pieces())


@pytest.mark.parametrize("name", ABORTS)
def test_what_libllama_aborts_on_is_refused_before(tmp_path: Path, name: str) -> None:
    arch, change, message = ABORTS[name]
    path = lying_model(tmp_path, arch, change)
    with pytest.raises(ModelFileError, match=r"which llama\.cpp aborts on") as caught:
        llama_mtp.Llama(str(path), **COMMON)
    assert message in str(caught.value)


def test_libllama_does_abort_on_them(tmp_path: Path) -> None:
    """A rule that the installed host has outgrown would refuse files for nothing."""
    paths = []
    for i, (arch, change, _) in enumerate(ABORTS.values()):
        folder = tmp_path / str(i)
        folder.mkdir()
        paths.append(str(lying_model(folder, arch, change)))
    script = Path(__file__).with_name("load_stock.py")
    child = subprocess.run(
        [sys.executable, str(script), *paths], capture_output=True, text=True, timeout=300
    )
    ends = dict(zip(ABORTS, json.loads(child.stdout), strict=True))
    assert {name: end for name, end in ends.items() if end not in ("SIGABRT", "SIGFPE")} == {}


@pytest.mark.parametrize("arch", sorted({arch for arch, _, _ in ABORTS.values()}))
def test_no_sound_model_is_taken_for_one_of_them(tmp_path: Path, arch: str) -> None:
    assert check_head(lying_model(tmp_path, arch, lambda file, arch: None)).executable


# ---- at random ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", fuzz.CASES)
def test_some_cases_at_random(tmp_path: Path, target: str) -> None:
    running = fuzz.Reader(target)
    for case in range(100):
        folder = tmp_path / str(case)
        folder.mkdir()
        path = fuzz.CASES[target](random.Random(f"test {case}"), folder)
        said = running.read(path)
        assert fuzz.offence(said, target) is None, (case, said)
    running.close()


def test_the_measure_sees_an_offender(tmp_path: Path) -> None:
    """A limit that nothing can exceed would prove nothing."""

    def greedy(path: Path) -> None:
        bytearray(220 * 2**20)[::4096] = b"x" * (220 * 256)

    def slow(path: Path) -> None:
        end = time.process_time() + readers.SECONDS + 0.1
        while time.process_time() < end:
            pass

    def careless(path: Path) -> None:
        raise KeyError("n")

    assert fuzz.offence(readers.attempt(greedy, tmp_path)) == "large"
    assert fuzz.offence(readers.attempt(slow, tmp_path)) == "slow"
    assert (fuzz.offence(readers.attempt(careless, tmp_path)) or "").startswith("KeyError at")
