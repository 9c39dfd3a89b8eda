"""The header scanner and the head check, on valid, truncated and damaged files."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.files import BLOCK, HEAD, TRUNK, with_head, write_header

from llama_mtp.errors import ModelFileError
from llama_mtp.gguf.header import ArrayInfo, read_header
from llama_mtp.gguf.model import Gguf
from llama_mtp.gguf.types import BLOCKS
from llama_mtp.heads.architectures import ARCHITECTURES, NOT_EXECUTABLE, rollback_of
from llama_mtp.heads.check import HeadReport, check_head


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("header") / "small.gguf"
    return write_header(path, tensors=with_head(2), n_layers=3, n_heads=1).read_bytes()


# ---- reading ------------------------------------------------------------------------------------


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", tensors=with_head(2), n_layers=3, n_heads=1)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert header.file_size == path.stat().st_size
    assert header.metadata["general.name"] == "Ein Name: ß"
    assert header.metadata["general.flag"] is True
    assert header.metadata["general.double"] == 0.25
    assert header.metadata["qwen35.nextn_predict_layers"] == 1
    assert header.metadata["tokenizer.ggml.tokens"] == ArrayInfo(type=8, count=4)
    assert header.metadata["tokenizer.ggml.scores"] == ArrayInfo(type=6, count=2)
    assert [*header.tensors] == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(tensor.shape)
        assert ours.type == tensor.tensor_type
        assert ours.n_bytes == tensor.n_bytes
        assert header.data_offsets[0] + ours.offset == tensor.data_offset


def test_block_sizes_agree_with_the_gguf_package() -> None:
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    theirs.pop(9, None)  # Q8_1: the package has the size of an older block than ggml's
    assert {kind: BLOCKS[kind] for kind in theirs} == theirs


def test_version_2_reads_the_same(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "v2.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + small[8:])
    read = read_header(path)
    path.write_bytes(small)
    assert read == read_header(path)


def test_split_file_lists_the_tensors_of_all_parts(tmp_path: Path) -> None:
    names = with_head(2)
    first = write_header(
        tmp_path / "m-00001-of-00002.gguf",
        tensors=names[:5],
        n_layers=3,
        n_heads=1,
        split=(0, 2, len(names)),
    )
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf cannot be read"):
        read_header(first)
    second = write_header(
        tmp_path / "m-00002-of-00002.gguf", tensors=names[5:], split=(1, 2, len(names))
    )
    header = read_header(first)
    assert tuple(header.tensors) == names
    assert {tensor.part for tensor in header.tensors.values()} == {0, 1}
    assert header.parts == (first, second)
    assert check_head(first).executable
    with pytest.raises(ModelFileError, match="not the first part"):
        read_header(second)
    other_name = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelFileError, match="Rename the parts back"):
        read_header(other_name)


# ---- refusing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "which do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "which do not fit"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(20), "truncated or damaged"),
    ],
)
def test_refuses_what_is_not_a_sound_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_header(path)


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="cannot be read: it is a folder"):
        read_header(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small)
    check_head(path)
    for size in reversed(range(len(small))):
        os.truncate(path, size)
        with pytest.raises(ModelFileError):
            check_head(path)


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_raises_nothing_else(tmp_path: Path, small: bytes, data: st.DataObject) -> None:
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        report = check_head(path)
    except ModelFileError:
        return
    assert report.executable == (not report.reason) == (not report.remedy)


def test_a_flipped_bit_in_any_byte_of_the_header_is_survived(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "flipped.gguf"
    path.write_bytes(small)
    end = read_header(path).data_offsets[0]
    with path.open("r+b", buffering=0) as file:
        for position in range(end):
            file.seek(position)
            file.write(bytes([small[position] ^ 1 << position % 8]))
            with contextlib.suppress(ModelFileError):
                assert isinstance(check_head(path), HeadReport)
            file.seek(position)
            file.write(small[position : position + 1])


def test_a_large_vocabulary_is_counted(tmp_path: Path) -> None:
    """248k tokens and as many merges, scores and types."""
    n = 248_320
    strings = b"".join(
        struct.pack("<Q", 6 + i % 9) + b"%06d" % i + b"x" * (i % 9) for i in range(n)
    )

    def key(name: str) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode()

    entries = [
        key("general.architecture") + struct.pack("<I", 8) + key("qwen35"),
        key("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, n) + strings,
        key("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, n) + strings,
        key("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, n) + bytes(4 * n),
        key("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, n) + bytes(4 * n),
        key("qwen35.block_count") + struct.pack("<II", 4, 7),
    ]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))
    model = Gguf.open(path)
    assert check_head(model).n_layer_trunk == 7
    assert model.n_tokens == n
    assert model.metadata["tokenizer.ggml.merges"] == ArrayInfo(8, n)


# ---- the head -----------------------------------------------------------------------------------


def test_executable_head(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", tensors=with_head(2), n_layers=3, n_heads=1)
    assert check_head(path) == HeadReport(
        architecture="qwen35",
        n_layer_trunk=2,
        n_heads=1,
        n_embd=8,
        n_ctx_train=64,
        missing=(),
        executable=True,
        reason="",
        remedy="",
        rollback="snapshots",
        gathers=False,
        mrope=True,
        chained=False,
        shares_kv=False,
        untested=False,
        narrow=False,
        file=Gguf.open(path),
    )


def test_chained_heads_are_counted(tmp_path: Path) -> None:
    tensors = with_head(2, 3, 4, extra=("ffn_gate.weight", "ffn_up.weight"))
    path = write_header(tmp_path / "m.gguf", "step35", tensors, n_layers=5, n_heads=3)
    report = check_head(path)
    assert report.executable
    assert (report.n_layer_trunk, report.n_heads) == (2, 3)


def obstacle(path: Path) -> str:
    report = check_head(path)
    assert not report.executable
    assert report.reason.endswith(".") and report.remedy.endswith(".")
    return report.reason


def test_no_head(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", "llama")
    assert "no llama.nextn_predict_layers" in obstacle(path)


def test_declared_head_whose_tensors_were_dropped(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", tensors=TRUNK, n_layers=3, n_heads=1)
    assert "blk.2.nextn.eh_proj.weight" in obstacle(path)
    assert set(check_head(path).missing) == {
        *(f"blk.2.{name}" for name in HEAD),
        "blk.2.attn_*.weight",
        "blk.2.ffn_*.weight",
    }


@pytest.mark.parametrize("dropped", [*HEAD, "attn_q.weight", "ffn_down.weight"])
def test_head_with_one_tensor_missing(tmp_path: Path, dropped: str) -> None:
    tensors = tuple(name for name in with_head(2) if name != f"blk.2.{dropped}")
    path = write_header(tmp_path / "m.gguf", tensors=tensors, n_layers=3, n_heads=1)
    assert "lacks blk.2." in obstacle(path)


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.requires])
def test_tensors_that_one_architecture_requires(tmp_path: Path, name: str) -> None:
    path = write_header(tmp_path / "m.gguf", name, with_head(2), n_layers=3, n_heads=1)
    assert "lacks blk.2." in obstacle(path)
    extra = tuple(r for r in ARCHITECTURES[name].requires if r not in BLOCK)
    whole = with_head(2, extra=extra)
    assert check_head(write_header(path, name, whole, n_layers=3, n_heads=1)).executable


@pytest.mark.parametrize("name", NOT_EXECUTABLE)
def test_declared_but_no_graph(tmp_path: Path, name: str) -> None:
    path = write_header(tmp_path / "m.gguf", name, with_head(2), n_layers=3, n_heads=1)
    assert obstacle(path) == NOT_EXECUTABLE[name] + "."


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", "novel", with_head(2), n_layers=3, n_heads=1)
    assert "architecture novel" in obstacle(path)


def test_a_head_that_shares_the_cache_is_told_to_be_one(tmp_path: Path) -> None:
    path = write_header(tmp_path / "g.gguf", "gemma4-assistant", TRUNK, n_layers=2, n_heads=2)
    assert "head without the model" in obstacle(path)
    assert "gemma4 model, and pass this file as spec_draft_model" in check_head(path).remedy


def test_second_head_where_one_is_executed(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", tensors=with_head(2, 3), n_layers=4, n_heads=2)
    assert "executes one" in obstacle(path)


def test_head_without_its_model(tmp_path: Path) -> None:
    tensors = with_head(2)[len(TRUNK) :]
    path = write_header(tmp_path / "m.gguf", tensors=tensors, n_layers=3, n_heads=1)
    assert "without the model" in obstacle(path)


@pytest.mark.parametrize(("n_layers", "n_heads"), [(2, 3), (513, 1)])
def test_layer_counts_that_abort_the_host(tmp_path: Path, n_layers: int, n_heads: int) -> None:
    path = write_header(tmp_path / "m.gguf", n_layers=n_layers, n_heads=n_heads)
    with pytest.raises(ModelFileError, match="aborts on"):
        check_head(path)


def test_rollback_of_trunks_without_a_head() -> None:
    assert rollback_of("llama") == "attention"
    assert rollback_of("lfm2") == "snapshots"
    assert rollback_of("mamba2") == rollback_of("qwen3next") == "checkpoint"
    assert not ARCHITECTURES.keys() & NOT_EXECUTABLE.keys()
