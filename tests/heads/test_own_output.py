"""``graft --output-type``: a head with an output matrix of its own, smaller than the trunk's."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import gguf
import llama_cpp
import models
import numpy as np
import pytest
from conftest import ModelFactory
from models.cases import OPTIONS
from models.drafts import N_TOKENS, drafted, text
from models.families import FAMILIES
from typer.testing import CliRunner

from llama_mtp.commands import main as cli
from llama_mtp.errors import ModelFileError
from llama_mtp.heads.architectures import ARCHITECTURES, OWN_OUTPUT
from llama_mtp.heads.graft import graft
from llama_mtp.measure.inspect import Inspection, inspect_file

WITH = sorted(name for name, known in ARCHITECTURES.items() if known.own_output)
WITHOUT = sorted(set(ARCHITECTURES) - set(WITH) - {"gemma4-assistant"})  # a file of its own


def own_outputs(path: Path, mode: str = "r") -> list[gguf.ReaderTensor]:
    return [t for t in gguf.GGUFReader(path, mode).tensors if t.name.endswith(OWN_OUTPUT)]


@pytest.mark.parametrize("arch", WITH)
def test_the_head_drafts_from_its_own_matrix_and_the_text_stays(arch: str, tmp_path: Path) -> None:
    """A copy drafts the same. With its rows one place on, every draft is the next token."""
    n_heads = FAMILIES[arch].max_heads
    whole = FAMILIES[arch].build(tmp_path, n_heads, 1).path
    own = tmp_path / "own.gguf"
    graft(whole, whole, own, replace_head=True, output_type="F32")
    assert len(own_outputs(own)) == n_heads
    with closing(llama_cpp.Llama(str(whole), **OPTIONS)) as stock:
        expected = text(stock)
    tokens, drafts = drafted(whole)
    assert tokens == expected and len(drafts) > N_TOKENS // 3
    assert drafted(own) == (tokens, drafts)

    for tensor in own_outputs(own, "r+"):
        tensor.data[:] = np.roll(tensor.data, 1, axis=0)
    tokens, shifted = drafted(own)
    assert tokens == expected
    both = shifted.keys() & drafts.keys()  # what is accepted differs, and so do the rounds
    assert len(both) > N_TOKENS // 4
    assert all(shifted[k] == (drafts[k] + 1) % models.N_VOCAB for k in both)


@pytest.mark.parametrize("arch", WITHOUT)
def test_a_head_that_cannot_have_one_is_refused(arch: str, tmp_path: Path) -> None:
    whole = FAMILIES[arch].build(tmp_path, 1, 1).path
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelFileError, match="has no output matrix of its own"):
        graft(whole, whole, tmp_path / "own.gguf", replace_head=True, output_type="Q8_0")
    assert sorted(tmp_path.iterdir()) == before


def test_one_that_is_there_is_stored_anew(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("hy_v3", n_heads=2).path
    own, smaller = tmp_path / "own.gguf", tmp_path / "smaller.gguf"
    graft(whole, whole, own, replace_head=True, output_type="F32")
    for tensor in own_outputs(own, "r+"):
        tensor.data[:] = 0.5
    report = graft(own, own, smaller, replace_head=True, type="F16", output_type="Q8_0")
    assert report.head_types["Q8_0"] == 2 and set(report.head_types) == {"F16", "Q8_0"}
    assert all(t.tensor_type.name == "Q8_0" for t in own_outputs(smaller))
    for tensor in own_outputs(smaller):  # its own, and not the trunk's
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, 0.5, rtol=0.01)


def test_inspect_tells_what_a_draft_step_reads(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("mimo2").path
    found = inspect_file(whole, probe=False)
    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(whole).tensors}
    head = f"blk.{found.n_layer_trunk}."
    block = sum(size for name, size in sizes.items() if name.startswith(head))
    trunk = sum(sizes.values()) - block - sizes["token_embd.weight"]
    block -= sizes[head + "nextn.embed_tokens.weight"]  # of a table one row is read
    assert found.reads is not None
    assert (found.reads.token, found.reads.output) == (trunk, sizes["output.weight"])
    assert found.reads.step == block + sizes["output.weight"]
    assert not found.reads.own_output

    own = tmp_path / "own.gguf"
    graft(whole, whole, own, replace_head=True, output_type="Q4_0")
    smaller: Inspection = inspect_file(own, probe=False)
    assert smaller.verdict == "run"
    assert smaller.reads is not None and smaller.reads.own_output
    assert smaller.reads.token == trunk
    assert smaller.reads.output == sizes["output.weight"] * 4.5 / 32
    assert smaller.reads.step - smaller.reads.output == block


def test_of_the_experts_a_row_reads_those_it_uses(tmp_path: Path) -> None:
    whole = FAMILIES["qwen35moe"].build(tmp_path, 1, 1).path
    reader = gguf.GGUFReader(whole)
    count, used = (
        int(reader.fields[f"qwen35moe.expert_{key}"].contents()) for key in ("count", "used_count")
    )
    assert used < count
    sizes = {t.name: int(t.n_bytes) for t in reader.tensors}
    found = inspect_file(whole, probe=False)
    head = f"blk.{found.n_layer_trunk}."
    experts = sum(s for n, s in sizes.items() if n.startswith(head) and "_exps." in n)
    rest = sum(s for n, s in sizes.items() if n.startswith(head) and "_exps." not in n)
    assert found.reads is not None
    assert found.reads.step == rest + experts * used // count + found.reads.output


def test_an_unknown_type_is_named_by_its_option(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    done = CliRunner().invoke(cli.app, ["graft", *files, "-o", "c.gguf", "--output-type", "Q9"])
    assert done.exit_code == 2
    assert "--output-type is one of F32" in " ".join(done.output.replace("│", " ").split())
