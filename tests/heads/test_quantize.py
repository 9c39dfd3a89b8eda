"""Storing a head in another type: the host's own quantisation, in rows, and only of matrices."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import models
import numpy as np
import numpy.typing as npt
import pytest
from conftest import COMMON, ModelFactory, StockFactory
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from models.families import FAMILIES

from llama_mtp import Llama
from llama_mtp.errors import ModelFileError
from llama_mtp.gguf import quantize as tool
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import metadata_of
from llama_mtp.gguf.quantize import TYPES, requantize, rows_of
from llama_mtp.gguf.types import BLOCKS
from llama_mtp.gguf.write import TensorSource, stored, write_gguf
from llama_mtp.heads.graft import graft
from llama_mtp.heads.split import strip
from llama_mtp.measure.identity import fresh_text, text

Floats = npt.NDArray[np.float32]
K_QUANTS = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")


def source(
    values: npt.NDArray[Any], kind: int = 0, name: str = "blk.0.ffn_up.weight", piece: int = 1000
) -> TensorSource:
    """A tensor of float32 values stored as ``kind``, streamed in pieces that fit no row."""
    data = values if kind in (0, 1) else quantize(values, GGMLQuantizationType(kind))
    raw = data.tobytes()

    def chunks() -> Iterator[bytes]:
        for at in range(0, len(raw), piece):
            yield raw[at : at + piece]

    return TensorSource(name, values.shape[::-1], kind, len(raw), chunks)


def data(tensor: TensorSource) -> bytes:
    whole = b"".join(tensor.chunks())
    assert len(whole) == tensor.n_bytes
    return whole


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_bytes_are_those_of_the_gguf_package(name: str) -> None:
    values = normal(48, 512)
    values[0] = 0  # a block without a largest value
    values[1, 3] = 6e4
    kind = GGMLQuantizationType[name]
    expected = values.astype(np.float16) if name == "F16" else quantize(values, kind)
    made = requantize(source(values), kind)
    assert (made.type, made.shape) == (kind, (512, 48))
    assert data(made) == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "most"),
    # Root of the mean squared error of normal values; bits per weight 6.6, 5.5, 4.5, 3.4, 2.6.
    [("Q6_K", 0.022), ("Q5_K", 0.042), ("Q4_K", 0.085), ("Q3_K", 0.18), ("Q2_K", 0.36)],
)
def test_k_quants_err_as_much_as_their_bits_allow(name: str, most: float) -> None:
    values = normal(64, 1024)
    kind = GGMLQuantizationType[name]
    made = requantize(source(values), kind)
    block, size = BLOCKS[kind]
    assert made.n_bytes == values.size // block * size
    read = dequantize(np.frombuffer(data(made), np.uint8).reshape(64, -1), kind)
    error = float(np.sqrt(np.mean((read - values) ** 2)))
    assert most / 2 < error < most


@pytest.mark.parametrize("kind", [1, 30, 8, 2], ids=["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_sources_are_read_back_first(kind: int) -> None:
    values = normal(16, 256)
    given = source(values.astype(np.float16) if kind == 1 else values, kind)
    stored_as = GGMLQuantizationType(kind)
    raw = np.frombuffer(data(given), np.uint8).reshape(16, -1)
    read = raw.view(np.float16).astype(np.float32) if kind == 1 else dequantize(raw, stored_as)
    assert np.array_equal(np.concatenate(list(rows_of(given))), read)
    assert data(requantize(given, 0)) == read.astype(np.float32).tobytes()


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(37, 256)
    whole = [data(requantize(source(values), kind)) for kind in TYPES.values()]
    for piece, chunk in ((1, 1), (999, 3 * 1024), (10**6, 5 * 1024 + 7)):
        monkeypatch.setattr(tool, "CHUNK", chunk)
        pieces = [source(values, piece=piece) for _ in TYPES]
        made = map(requantize, pieces, TYPES.values())
        assert [data(tensor) for tensor in made] == whole


def test_experts_are_quantised_as_one_matrix_each() -> None:
    values = normal(3, 8, 256)
    made = requantize(source(values), TYPES["Q4_K"])
    apart = [requantize(source(v), TYPES["Q4_K"]) for v in values]
    assert made.shape == (256, 8, 3)
    assert data(made) == b"".join(map(data, apart))


# --- what is quantised ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.nextn.shared_head_norm.weight", (4, 256)),
        ("blk.0.ffn_gate_inp.weight", (4, 256)),
        ("blk.0.ffn_gate_inp_shexp.weight", (256,)),
        ("blk.0.ssm_conv1d.weight", (256, 4)),
        ("blk.0.exp_probs_b.bias", (256,)),
        ("blk.0.hc_attn_fn.weight", (24, 1024)),
    ],
)
def test_norms_routers_and_the_like_stay(name: str, shape: tuple[int, ...]) -> None:
    tensor = source(normal(*shape), name=name)
    assert requantize(tensor, TYPES["Q4_0"]) is tensor


def test_the_same_type_is_left_alone() -> None:
    tensor = source(normal(4, 256), TYPES["Q8_0"])
    assert requantize(tensor, TYPES["Q8_0"]) is tensor


@pytest.mark.parametrize(
    ("wanted", "row", "found"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q8_0"),
        ("Q2_K", 128, "Q8_0"),
        ("Q4_0", 64, "Q4_0"),
        ("Q4_0", 80, "F16"),
        ("Q8_0", 33, "F16"),
        ("BF16", 33, "BF16"),
    ],
)
def test_rows_that_do_not_divide_fall_back(wanted: str, row: int, found: str) -> None:
    assert requantize(source(normal(2, row)), TYPES[wanted]).type == TYPES[found]


def test_fallbacks_are_said(model: ModelFactory, tmp_path: Path) -> None:
    m = model("qwen35")
    trunk = strip(m.path, tmp_path / "trunk.gguf")
    report = graft(trunk, m.path, tmp_path / "joined.gguf", type="Q4_K")
    assert list(report.head_types) == ["Q8_0"]  # the rows of the tests' models have 64 values
    n = report.head_types["Q8_0"]
    assert report.notes == (
        f"{n} of the head's matrices are stored as Q8_0: their rows are no multiple of a block of "
        "Q4_K.",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = normal(4, 256)
    values[3, 7] = value
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_up\.weight has values that are not"):
        data(requantize(source(values), TYPES["Q4_K"]))


def test_values_beyond_f16_are_refused_for_f16_only() -> None:
    values = normal(4, 256)
    values[0, 0] = 7e4
    with pytest.raises(ModelFileError, match=r"range of F16\. Use BF16"):
        data(requantize(source(values), TYPES["F16"]))
    data(requantize(source(values), TYPES["BF16"]))


def test_types_that_cannot_be_read_are_refused() -> None:
    # I32 has no reading as floats; 99 is no type.
    for kind, cause in ((26, "cannot be read as numbers"), (99, "unknown ggml type 99")):
        tensor = TensorSource("blk.0.x.weight", (32, 2), kind, 256, lambda: iter([bytes(256)]))
        with pytest.raises(ModelFileError, match=cause):
            data(requantize(tensor, 0))


def test_an_unknown_type_is_named_with_the_known_ones(model: ModelFactory, tmp_path: Path) -> None:
    m = model("qwen35")
    with pytest.raises(ValueError, match=r"'Q9'; use one of F32, F16, BF16, .*Q2_K"):
        graft(strip(m.path, tmp_path / "t.gguf"), m.path, tmp_path / "joined.gguf", type="Q9")


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["qwen35", "mimo2"])
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_the_text_is_the_trunks_whatever_the_heads_type(
    model: ModelFactory, stock: StockFactory, tmp_path: Path, arch: str, name: str
) -> None:
    m = model(arch)
    trunk = strip(m.path, tmp_path / "trunk.gguf")
    joined = graft(trunk, m.path, tmp_path / "joined.gguf", type=name).path
    before, after = read_header(m.path), read_header(joined)
    n_trunk = before.metadata[f"{arch}.block_count"]
    assert isinstance(n_trunk, int)
    own = f"blk.{n_trunk - 1}."
    for tensor in after.tensors.values():
        matrix = tensor.name.startswith(own) and len(tensor.shape) > 1
        assert tensor.type == (TYPES[name] if matrix else before.tensors[tensor.name].type)
    prompt = m.text(9)
    with Llama(str(joined), **COMMON, spec_type="draft-mtp", spec_adaptive=False) as fast:
        emitted = text(fast, prompt, 100, temp=0.0)
        assert emitted == fresh_text(stock(m), prompt, 100, temp=0.0)
        # The words of the head's own embeddings are so far apart that no type mistakes one.
        expected = models.expected_acceptance(m, prompt, emitted, 3)
        assert fast.spec_stats.last.num_accepted_tokens == expected.accepted > 20


@pytest.mark.parametrize("arch", sorted(FAMILIES.keys() - {"gemma4-assistant"}))
def test_every_familys_head_runs_in_another_type(tmp_path: Path, arch: str) -> None:
    """No graph asks for a type that the choice of matrices takes from it."""
    whole = FAMILIES[arch].build(tmp_path, 1, 1).path
    trunk = strip(whole, tmp_path / "trunk.gguf")
    report = graft(trunk, whole, tmp_path / "joined.gguf", type="Q8_0")
    assert set(report.head_types) <= {"Q8_0", "F16"}
    with Llama(str(report.path), **COMMON, spec_type="draft-mtp") as llama:
        tokens = list(islice(llama.generate([300, 17, 401, 256, 333], temp=0.0), 20))
        assert len(tokens) == 20
        assert llama.spec_stats.num_picks > 0


def test_memory_stays_small_whatever_the_size(model: ModelFactory, tmp_path: Path) -> None:
    """128 MB of head in F32 come out as Q4_0, and 128 MB of trunk go through, in 64 MB."""
    m = model("qwen35")
    whole = read_header(m.path)
    shape, n_bytes = (2**13, 2**12), 2**27
    zeros = bytes(2**23)
    big = [
        TensorSource(f"blk.{block}.big.weight", shape, 0, n_bytes, lambda: iter([zeros] * 16))
        for block in (3, 4)
    ]
    tensors = [stored(whole, tensor) for tensor in whole.tensors.values()]
    head = tmp_path / "head.gguf"
    write_gguf(head, metadata_of(whole), [*tensors, *big])
    trunk = strip(head, tmp_path / "trunk.gguf")
    Llama  # noqa: B018  # the host's library is loaded by now
    tracemalloc.start()
    try:
        graft(trunk, head, tmp_path / "joined.gguf", type="Q4_0")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for path in (head, trunk, tmp_path / "joined.gguf"):
        path.unlink()
    assert peak < 64e6


def test_quantiser_of_a_host_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_mtp import host
    from llama_mtp.errors import HostVersionError

    tool._host_quantizer.cache_clear()
    monkeypatch.setitem(host._MANGLED, "ggml_quantize_chunk", ())
    monkeypatch.setattr(host.C, "_lib", object())
    with pytest.raises(HostVersionError, match="no ggml_quantize_chunk"):
        data(requantize(source(normal(2, 32)), TYPES["Q8_0"]))
