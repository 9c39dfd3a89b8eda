"""A file is opened once: whoever needs what its header says is handed the object."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LlamaFactory, ModelFactory
from models.families import FAMILIES
from models.families.common import Files

from llama_mtp import Llama
from llama_mtp.errors import ModelFileError
from llama_mtp.gguf import header
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import decode, entry, metadata_of
from llama_mtp.gguf.model import Gguf
from llama_mtp.gguf.write import stored, write_gguf
from llama_mtp.heads.check import check_head
from llama_mtp.heads.graft import graft
from llama_mtp.heads.narrow import narrow
from llama_mtp.heads.split import split, strip
from llama_mtp.measure.inspect import inspect_file

TOKENS = "tokenizer.ggml.tokens"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each file was parsed, by the file's name."""
    count: Counter[str] = Counter()
    parse = header._Scanner.header

    def counted(scanner: Any) -> header.Header:
        count[scanner.path.name] += 1
        return parse(scanner)

    monkeypatch.setattr(header._Scanner, "header", counted)
    return count


def narrow_head(path: Path, out: Path) -> Path:
    return narrow(path, out, n_tokens=400, texts=[]).path


@pytest.mark.parametrize("head", ["own file", "narrow", "in the model"])
def test_a_load_parses_each_header_once(
    model: ModelFactory, ours: LlamaFactory, tmp_path: Path, parsed: Counter[str], head: str
) -> None:
    m = model("qwen35")
    own = {"own file": split(m.path, tmp_path)[1], "narrow": narrow_head(m.path, tmp_path / "n")}
    parsed.clear()
    options = {"spec_draft_model": str(own[head])} if head in own else {}
    assert ours(m, **options).spec_type == "draft-mtp"
    assert parsed == {m.path.name: 1} | ({own[head].name: 1} if head in own else {})


def test_so_does_a_load_whose_head_reads_the_targets_cache(
    tmp_path: Path, parsed: Counter[str], ours: LlamaFactory
) -> None:
    files = FAMILIES["gemma4-assistant"].build(tmp_path, 1, 1)
    assert files.draft is not None
    llm = ours(Files(files.path), spec_draft_model=str(files.draft))
    assert llm.spec_type == "draft-mtp"
    assert parsed == {files.path.name: 1, files.draft.name: 1}


def test_the_tools_parse_each_header_once(
    model: ModelFactory, tmp_path: Path, parsed: Counter[str]
) -> None:
    """What they write is read back, once as well."""
    whole = model("mimo2").path
    trunk, head = split(whole, tmp_path)
    assert parsed.pop(whole.name) == 1
    assert list(parsed.values()) == [1, 1]
    parsed.clear()
    inspect_file(trunk, draft_model=head, probe=False)
    assert parsed == {trunk.name: 1, head.name: 1}
    for tool in (strip, narrow_head):
        parsed.clear()
        tool(whole, tmp_path / "out.gguf", **({"force": True} if tool is strip else {}))
        assert parsed.pop(whole.name) == 1
        assert sum(parsed.values()) == 1
        (tmp_path / "out.gguf").unlink()
    parsed.clear()
    graft(trunk, head, tmp_path / "joined.gguf")
    assert (parsed.pop(trunk.name), parsed.pop(head.name)) == (1, 1)
    assert sum(parsed.values()) == 1


def test_a_file_that_was_opened_is_not_opened_again(
    model: ModelFactory, tmp_path: Path, parsed: Counter[str]
) -> None:
    whole = Gguf.open(model("hy_v3").path)
    assert Gguf.open(whole) is whole
    assert check_head(whole).file is whole
    inspect_file(whole, probe=False)
    split(whole, tmp_path)
    narrow(whole, tmp_path / "narrow.gguf", n_tokens=400, texts=[])
    assert parsed[whole.path.name] == 1


# --- a second file with the same vocabulary -------------------------------------------------------


def with_tokens(path: Path, out: Path, change: Callable[[list[str]], list[str]]) -> Path:
    model = read_header(path)
    metadata = metadata_of(model)
    metadata[TOKENS] = entry(TOKENS, change(decode(TOKENS, metadata[TOKENS])))
    write_gguf(out, metadata, [stored(model, tensor) for tensor in model.tensors.values()])
    return out


@pytest.mark.parametrize("change", ["none", "one letter", "one more", "one twice"])
def test_it_is_read_as_by_itself(model: ModelFactory, tmp_path: Path, change: str) -> None:
    whole = model("qwen35").path
    changes: dict[str, Callable[[list[str]], list[str]]] = {
        "none": lambda tokens: tokens,
        "one letter": lambda tokens: [*tokens[:-1], tokens[-1][:-1] + "\u00e4"],
        "one more": lambda tokens: [*tokens, "more"],
        "one twice": lambda tokens: [*tokens[:-1], tokens[0]],
    }
    other = with_tokens(whole, tmp_path / "other.gguf", changes[change])
    for first, second in ((whole, other), (other, whole), (other, other)):
        assert read_header(second, like=read_header(first)) == read_header(second)
    assert read_header(other).repeats_token == (change == "one twice")


def test_the_same_list_is_not_walked_again(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Gguf.open(model("qwen35").path)
    monkeypatch.setattr(header._Scanner, "texts", None)
    monkeypatch.setattr(header._Scanner, "skip_texts", None)
    assert Gguf.open(whole.path, like=whole) == whole


def test_it_may_be_cut_anywhere(model: ModelFactory, tmp_path: Path) -> None:
    whole = Gguf.open(model("qwen35").path)
    content, path = whole.path.read_bytes(), tmp_path / "cut.gguf"
    start, end = whole.entries[TOKENS]
    for size in (*range(start, end + 2, 97), end):
        path.write_bytes(content[:size])
        with pytest.raises(ModelFileError):
            Gguf.open(path, like=whole)


def test_the_first_file_may_be_gone(model: ModelFactory, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model("qwen35").path.read_bytes())
    first = Gguf.open(path)
    moved = path.rename(tmp_path / "moved.gguf")
    assert Gguf.open(moved, like=first).tensors == first.tensors


def test_a_token_twice_is_refused_in_both_files(model: ModelFactory, tmp_path: Path) -> None:
    whole = model("qwen35").path
    twice = with_tokens(whole, tmp_path / "twice.gguf", lambda tokens: [*tokens[:-1], tokens[0]])
    for path in (twice, split(twice, tmp_path)[1]):
        with pytest.raises(ModelFileError, match=r"a token twice .*llama\.cpp aborts on"):
            Llama(str(path), spec_type="draft-mtp")
    sound = check_head(whole)
    with pytest.raises(ModelFileError, match="a token twice"):
        check_head(split(twice, tmp_path, force=True)[1], target=sound)


def test_tokens_are_compared_up_to_their_first_zero_byte(tmp_path: Path) -> None:
    def written(*tokens: bytes) -> Path:
        texts = b"".join(struct.pack("<Q", len(token)) + token for token in tokens)
        key = struct.pack("<Q", len(TOKENS)) + TOKENS.encode()
        raw = key + struct.pack("<IIQ", 9, 8, len(tokens)) + texts
        path = tmp_path / "tokens.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + raw)
        return path

    for tokens, twice in (
        ((b"a", b"b", b"a"), True),
        ((b"a\0b", b"a"), True),
        ((b"\0a", b"\0b", b"", b""), False),  # empty ones get a name of their own
        ((b"a" * 300_000, b"b", b"a" * 300_000), True),  # longer than what is read at a time
        ((b"a" * 300_000, b"a" * 300_001), False),
        (tuple(b"%d" % i for i in range(99_999)), False),
        ((*(b"%d" % i for i in range(99_999)), b"77"), True),
    ):
        assert read_header(written(*tokens)).repeats_token == twice
