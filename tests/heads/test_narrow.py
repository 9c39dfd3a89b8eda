"""``llama-mtp narrow``: a head that has the frequent part of the vocabulary only."""

from __future__ import annotations

import shlex
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import models
import numpy as np
import pytest
from conftest import COMMON, LlamaFactory, ModelFactory, StockFactory
from hypothesis import given
from hypothesis import strategies as st
from models.cases import OPTIONS
from models.drafts import PROMPT, drafted, text
from models.families import FAMILIES
from models.files import contents
from typer.testing import CliRunner

from llama_mtp import Llama
from llama_mtp.commands import main as cli
from llama_mtp.errors import FileWriteError, ModelFileError, NativeError, SpecTypeError
from llama_mtp.gguf.model import Gguf
from llama_mtp.heads import narrow as tool
from llama_mtp.heads.graft import graft
from llama_mtp.heads.narrow import choose, count, narrow, stand_ins_of
from llama_mtp.heads.narrow_vocabulary import KEPT, STAND_INS, vocabulary_of
from llama_mtp.heads.split import split
from llama_mtp.measure.inspect import inspect_file

N_KEPT = 400  # of 510: 259 are bytes and control tokens
ARCHITECTURES = sorted(set(FAMILIES) - {"gemma4-assistant"})


def values(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_family_drafts_as_before_from_the_words_that_are_left(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without words that the text has not: the draft is the whole head's, wherever it has it."""
    n_heads = FAMILIES[arch].max_heads
    whole = FAMILIES[arch].build(tmp_path, n_heads, 1).path
    with closing(llama_cpp.Llama(str(whole), **OPTIONS)) as stock:
        expected = text(stock)
    tokens, drafts = drafted(whole)
    assert tokens == expected
    words = set(range(models.FIRST_WORD, models.N_VOCAB)) - {*tokens, *PROMPT}
    left_out = set(sorted(words)[::2])
    kept = [token for token in range(models.N_VOCAB) if token not in left_out]
    monkeypatch.setattr(tool, "choose", lambda *_: kept)
    head = narrow(whole, n_tokens=len(kept), texts=[]).path
    assert vocabulary_of(Gguf.open(head)).tokens.tolist() == kept
    again, fewer = drafted(whole, spec_draft_model=str(head))
    assert again == tokens
    both = fewer.keys() & drafts.keys()
    had = {k for k in both if drafts[k] not in left_out}
    assert had and all(fewer[k] == drafts[k] for k in had)
    assert not {*fewer.values()} & left_out


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_a_narrow_head_drafts_what_it_has_whatever_it_reads(
    model: ModelFactory, tmp_path: Path, arch: str
) -> None:
    """A head that reads the hidden row alone: it proposes the same word wherever it has it."""
    whole = model(arch, head="hidden").path
    path = narrow(whole, tmp_path / "head.gguf", n_tokens=N_KEPT, texts=[]).path
    kept = set(vocabulary_of(Gguf.open(path)).tokens.tolist())
    tokens, drafts = drafted(whole)
    again, fewer = drafted(whole, spec_draft_model=str(path))
    assert again == tokens
    both = fewer.keys() & drafts.keys()
    had = {k for k in both if drafts[k] in kept}
    assert had and both - had
    assert all(fewer[k] == drafts[k] for k in had)
    assert all(fewer[k] in kept for k in fewer)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_the_text_is_that_of_stock(
    model: ModelFactory,
    stock: StockFactory,
    ours: LlamaFactory,
    tmp_path: Path,
    depth: int,
    temp: float,
) -> None:
    m = model("qwen35")
    path = narrow(m.path, tmp_path / "head.gguf", n_tokens=N_KEPT, texts=[]).path
    fast = ours(m, spec_draft_model=str(path), spec_draft_n_max=depth)
    prompt = m.text(30)
    emitted = []
    for llama in (fast, stock(m)):
        llama.set_seed(3)
        emitted.append(list(islice(llama.generate(prompt, temp=temp), 150)))
    assert emitted[0] == emitted[1]
    assert fast.spec_stats.num_accepted_tokens > 0


def test_the_file_has_the_rows_of_its_tokens(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("hy_v3", n_heads=2).path
    out = tmp_path / "head.gguf"
    report = narrow(whole, out, n_tokens=N_KEPT, texts=[])
    kept = vocabulary_of(Gguf.open(out)).tokens
    assert (report.path, report.n_tokens, report.n_vocab) == (out, N_KEPT, models.N_VOCAB)
    assert report.coverage is None
    assert report.output_before * N_KEPT == report.output * models.N_VOCAB
    before = {t.name: t.data for t in gguf.GGUFReader(whole).tensors}
    after = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    assert not any(name.startswith("blk.0.") for name in after)
    cut = 0
    for name, data in after.items():
        rows = data.shape[0] == N_KEPT and before[name].shape[0] == models.N_VOCAB
        np.testing.assert_array_equal(data, before[name][kept] if rows else before[name])
        cut += rows
    assert cut == 4  # the table, the output, and a table for each head
    old, new = values(whole), values(out)
    for key in ("tokens", "scores", "token_type"):
        key = f"tokenizer.ggml.{key}"
        assert new[key] == [old[key][t] for t in kept]
    assert new["tokenizer.ggml.eos_token_id"] == old["tokenizer.ggml.eos_token_id"] == models.EOS
    assert "tokenizer.chat_template" not in new
    assert new[KEPT] == kept.tolist() and len(new[STAND_INS]) == models.N_VOCAB


def test_a_head_in_a_file_of_its_own_can_be_narrowed(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("mimo2").path
    first = narrow(whole, tmp_path / "a.gguf", n_tokens=N_KEPT, texts=[]).path
    _, alone = split(whole, tmp_path)
    second = narrow(alone, tmp_path / "b.gguf", n_tokens=N_KEPT, texts=[]).path
    assert contents(first) == contents(second)


def test_the_words_of_the_texts_are_kept(model: ModelFactory, tmp_path: Path) -> None:
    """They would be left out by their numbers; of eight texts the last says what that is worth."""
    whole = model("hy_v3").path
    rare = values(whole)["tokenizer.ggml.tokens"][-20:]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("\n".join(rare))
    (folder / "picture.bin").write_bytes(b"\0\1")
    report = narrow(whole, tmp_path / "head.gguf", n_tokens=350, texts=[folder])
    assert report.coverage == 1.0
    assert set(rare) < set(values(report.path)["tokenizer.ggml.tokens"])
    without = narrow(whole, tmp_path / "other.gguf", n_tokens=350, texts=[])
    assert not set(rare) & set(values(without.path)["tokenizer.ggml.tokens"])


def test_the_standard_library_is_counted_where_no_text_is_given(
    model: ModelFactory, tmp_path: Path
) -> None:
    report = narrow(model("hy_v3").path, tmp_path / "head.gguf", n_tokens=300)
    assert report.coverage is not None and 0.5 < report.coverage < 1.0


@given(st.data())
def test_what_is_kept_is_wanted_first(data: Any) -> None:
    n = data.draw(st.integers(2, 60))
    ids = st.integers(0, n - 1)
    tokens = [f"w{i}" for i in range(n)]
    always, counted = data.draw(st.sets(ids)), data.draw(st.dictionaries(ids, st.integers(1, 9)))
    n_tokens = data.draw(st.integers(1, n - 1))
    kept = choose(tokens, always, counted, n_tokens)
    assert kept == sorted(set(kept)) and len(kept) == n_tokens
    assert always <= set(kept) or set(kept) < always
    taken = [counted[t] for t in kept if t in counted and t not in always]
    room = (n_tokens - len(always)) // 2
    left = [counted[t] for t in counted if t not in kept]
    assert not left or (len(taken) >= room and (room < 1 or sorted(taken)[-room] >= max(left)))


@given(st.lists(st.text("ab ", min_size=1, max_size=5), min_size=2, unique=True), st.data())
def test_the_longest_known_end_stands_in(tokens: list[str], data: Any) -> None:
    places = st.integers(0, len(tokens) - 1)
    kept = sorted(data.draw(st.sets(places, min_size=1)))
    texts = [tokens[t] for t in kept]
    for token, stand_in in zip(tokens, stand_ins_of(tokens, kept), strict=True):
        ends = [text for text in texts if token.endswith(text)]
        assert texts[stand_in] == max(ends, key=len) if ends else stand_in == 0


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_narrowed_is_refused_and_leaves_nothing(
    model: ModelFactory, tmp_path: Path
) -> None:
    out = tmp_path / "head.gguf"
    whole = model("hy_v3").path
    with pytest.raises(ModelFileError, match="510 tokens, and 510 of them"):
        narrow(whole, out, n_tokens=models.N_VOCAB, texts=[])
    with pytest.raises(ModelFileError, match="no NextN head"):
        narrow(model("hy_v3", head=None).path, out, n_tokens=N_KEPT, texts=[])
    with pytest.raises(ModelFileError, match="There is no file or folder"):
        narrow(whole, out, n_tokens=N_KEPT, texts=[tmp_path / "nothing"])
    with pytest.raises(FileWriteError, match="one of the inputs"):
        narrow(whole, whole, n_tokens=N_KEPT, texts=[], force=True)
    assert not list(tmp_path.iterdir())
    narrow(whole, out, n_tokens=N_KEPT, texts=[])
    with pytest.raises(ModelFileError, match="a narrow head already"):
        narrow(out, tmp_path / "again.gguf", n_tokens=300, texts=[])
    with pytest.raises(FileWriteError, match="exists"):
        narrow(whole, out, n_tokens=N_KEPT, texts=[])
    with pytest.raises(ModelFileError, match="tokens"):  # no base has so few
        graft(model("hy_v3", head=None).path, out, tmp_path / "joined.gguf")
    assert list(tmp_path.iterdir()) == [out]


def test_an_assistant_is_refused(tmp_path: Path) -> None:
    assistant = FAMILIES["gemma4-assistant"].build(tmp_path, 1, 1).draft
    assert assistant is not None
    with pytest.raises(ModelFileError, match="its own way to read less"):
        narrow(assistant, tmp_path / "head.gguf", n_tokens=N_KEPT, texts=[])


@pytest.mark.parametrize("key", [KEPT, STAND_INS])
def test_a_damaged_list_is_refused(model: ModelFactory, tmp_path: Path, key: str) -> None:
    m = model("hy_v3")
    path = narrow(m.path, tmp_path / "head.gguf", n_tokens=N_KEPT, texts=[]).path
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 16  # the list's first number
    data[at : at + 4] = (7).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises((SpecTypeError, NativeError), match=r"differ at token 0|stand for itself"):
        Llama(str(m.path), spec_draft_model=str(path), **COMMON)

    path.write_bytes(bytes(data).replace(key.encode(), key[:-1].encode() + b"x"))
    with pytest.raises(ModelFileError, match="without the list"):
        Llama(str(m.path), spec_draft_model=str(path), **COMMON)


def test_the_head_of_another_vocabulary_is_refused(model: ModelFactory, tmp_path: Path) -> None:
    path = narrow(model("hy_v3").path, tmp_path / "head.gguf", n_tokens=N_KEPT, texts=[]).path
    data = path.read_bytes()
    word, other = ((2).to_bytes(8, "little") + text for text in (b"bo", b"bw"))
    assert data.count(word) == 1
    path.write_bytes(data.replace(word, other))
    with pytest.raises(SpecTypeError, match=r"differ at token \d+ \('bo' and 'bw'\)"):
        Llama(str(model("hy_v3").path), spec_draft_model=str(path), **COMMON)


# --- the command ----------------------------------------------------------------------------------


def test_inspect_gives_the_command_which_says_what_it_kept(
    model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "a model.gguf"
    whole.write_bytes(model("qwen35").path.read_bytes())
    before = inspect_file(whole, probe=False)
    assert before.cheaper_command == ""  # so few tokens are kept anyway
    monkeypatch.setattr(tool, "_FEWEST", 64)
    command = shlex.split(inspect_file(whole, probe=False).cheaper_command)
    assert command == ["llama-mtp", "narrow", str(whole)]
    (tmp_path / "text.txt").write_text("a be ca " * 50)
    options = ["--tokens", "300", "--text", str(tmp_path / "text.txt")]
    done = CliRunner().invoke(cli.app, command[1:] + options)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    head = tmp_path / "mtp-a model-narrow.gguf"
    assert "300 of 510 tokens" in said and f"--draft-model '{head}'" in said
    after = inspect_file(whole, draft_model=head)
    assert after.cheaper_command == ""
    assert after.verdict == "run" and before.reads is not None and after.reads is not None
    assert after.reads.token == before.reads.token
    assert before.reads.step - after.reads.step == before.reads.output * 210 // 510
    assert after.forecast is not None and after.forecast.source == "host"


def test_tokens_are_counted_by_the_models_own_tokenizer(model: ModelFactory) -> None:
    m = model("hy_v3")
    with closing(llama_cpp.Llama(str(m.path), vocab_only=True, verbose=False)) as stock:
        expected = Counter(stock.tokenize(b"abebi", add_bos=False))
    counted, held_out = count(m.path, ["abebi"] * 9)
    assert counted == Counter({t: 8 * n for t, n in expected.items()})
    assert held_out == expected
