"""A head that drafts for less: in a file of its own, with the frequent part of the vocabulary only.

A draft step reads the whole output matrix, which with a large vocabulary is most of what it reads,
and nearly all drafts that are right are frequent tokens (FR-Spec, arXiv 2502.14856). What the head
lacks it cannot propose; the text does not change.
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType, TokenType

from ..errors import ModelFileError
from ..gguf.header import Header, TensorInfo, read_header
from ..gguf.metadata import decode, elements_type, entry
from ..gguf.write import CHUNK, Chunk, Progress, TensorSource, check_destination, stored, write_gguf
from ..measure.draft_cost import OWN_OUTPUT, output_matrix
from .architectures import ARCHITECTURES
from .narrow_vocabulary import STAND_INS, TOKENS
from .split import block_of, blocks_of, head_metadata, head_tensors, stem_of

_TOKENIZER = "tokenizer.ggml."
_BY_TOKEN = ("token_embd.weight", "output.weight", "nextn.embed_tokens.weight", OWN_OUTPUT)
_LEFT_OUT = ("tokenizer.chat_template", "tokenizer.huggingface", f"{_TOKENIZER}suppress_tokens")
_MOST_TEXT = 4 << 20  # bytes that are counted ...
_MOST_FILE = 1 << 19  # ... of one file at most: the rest of a long one is like its beginning
_SHARE, _FEWEST = 8, 8192  # unless told otherwise: one token of so many, and no fewer than that
_HELD_OUT = 8  # of so many texts one is not counted, to see what the choice is worth
_KEPT_TYPES = {int(t) for t in TokenType} - {int(TokenType.NORMAL), int(TokenType.UNUSED)}


@dataclass(frozen=True)
class NarrowReport:
    """What :func:`narrow` wrote.

    Attributes:
        path: the head's file.
        n_tokens, n_vocab: tokens of the head, and of the model.
        coverage: share of the tokens in texts that were not counted which the head has; None
            without texts.
        output, output_before: bytes of the output matrix, which every draft step reads.
    """

    path: Path
    n_tokens: int
    n_vocab: int
    coverage: float | None
    output: int
    output_before: int


def narrow(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    n_tokens: int | None = None,
    texts: Sequence[str | os.PathLike[str]] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> NarrowReport:
    """Write a model's head into a file of its own that has ``n_tokens`` of the vocabulary.

    Half of the tokens are the most frequent ones in ``texts``, the others the lowest numbers: those
    that a tokenizer merged first. Control tokens and single characters are always among them.

    Args:
        file: the model, of a split one the first part; or a head in a file of its own.
        out: the file to write; default: ``mtp-NAME-narrow.gguf`` beside ``file``.
        n_tokens: how many tokens to keep; default: an eighth of them, and 8192 at least.
        texts: files and folders like what will be written; default: the Python standard library.
        force: overwrite.
        progress: called as data is written.

    Raises:
        ModelFileError: the file is no GGUF, is damaged, or has no head that can be narrowed.
        FileWriteError: the file cannot be written.
    """
    header = read_header(file)
    blocks = blocks_of(header)
    metadata = head_metadata(header, blocks)
    tokens = _tokens_of(header, metadata)
    known = ARCHITECTURES.get(blocks.architecture)
    if known is not None and known.shares_kv:
        raise ModelFileError(
            f"{header.path} is a {blocks.architecture} head, which has its own way to read less. "
            "Use it as it is."
        )
    if not blocks.n_heads:
        raise ModelFileError(f"{header.path} has no NextN head. Name the file that has it.")
    own = (t for t in header.tensors.values() if block_of(t.name)[1] == OWN_OUTPUT)
    matrix = next(own, None) or output_matrix(header)
    if matrix is None:
        raise ModelFileError(f"{header.path} has no output matrix. Name the file of the model.")
    if n_tokens is None:
        n_tokens = usual_size(len(tokens))
    if not 0 < n_tokens < len(tokens):
        raise ModelFileError(
            f"{header.path} has {len(tokens)} tokens, and {n_tokens} of them were asked for. "
            "Ask for fewer with --tokens."
        )
    name = stem_of(header.path).removeprefix("mtp-")
    out = header.path.with_name(f"mtp-{name}-narrow.gguf") if out is None else Path(out)
    check_destination(out, header.parts, force=force)

    counted, held_out = count(header.path, _texts(texts))
    kept = choose(tokens, _always(header, metadata, tokens), counted, n_tokens)
    stand_ins = stand_ins_of(tokens, kept)
    tensors = [_part(header, t, kept, len(tokens)) for t in head_tensors(header, blocks)]
    write_gguf(
        out,
        _metadata(header, metadata, kept, stand_ins),
        tensors,
        checked=[t.name for t in tensors],
        progress=progress,
    )
    has = set(kept)
    total = held_out.total()
    before = stored(header, matrix).n_bytes
    return NarrowReport(
        path=out,
        n_tokens=len(kept),
        n_vocab=len(tokens),
        coverage=sum(n for t, n in held_out.items() if t in has) / total if total else None,
        output=before // matrix.shape[1] * len(kept),
        output_before=before,
    )


def usual_size(n_vocab: int) -> int:
    """How many tokens of a vocabulary a head keeps unless it is told otherwise."""
    return min(max(n_vocab // _SHARE, _FEWEST), n_vocab)


# --- which tokens ---------------------------------------------------------------------------------


def count(model: Path, texts: Iterable[str]) -> tuple[Counter[int], Counter[int]]:
    """Count tokens: of most texts, and of the others, by the model's own tokenizer."""
    from ..host import tokenizer

    counts: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    with closing(tokenizer(str(model))) as vocabulary:
        for i, text in enumerate(texts):
            found = vocabulary.tokenize(text.encode(), False, False)
            counts[i % _HELD_OUT == _HELD_OUT - 1].update(found)
    return counts


def choose(
    tokens: Sequence[str], always: set[int], counted: Mapping[int, int], n_tokens: int
) -> list[int]:
    """Return the tokens to keep in their order: those of ``always`` first, then by frequency."""
    kept = set(sorted(always)[:n_tokens])
    frequent = sorted(counted, key=lambda t: (-counted[t], t))
    room = (n_tokens - len(kept)) // 2
    kept.update(islice((t for t in frequent if t not in kept), room))
    kept.update(islice((t for t in range(len(tokens)) if t not in kept), n_tokens - len(kept)))
    return sorted(kept)


def stand_ins_of(tokens: Sequence[str], kept: Sequence[int]) -> list[int]:
    """Return what the head reads for each of the model's tokens.

    For one that it lacks that is the longest end of its text that it has: what comes next depends
    on the end most.
    """
    place = {tokens[token]: i for i, token in enumerate(kept)}
    ends = ([text[i:] for i in range(len(text))] for text in tokens)
    return [next((place[end] for end in those if end in place), 0) for those in ends]


def _always(header: Header, metadata: Mapping[str, bytes], tokens: Sequence[str]) -> set[int]:
    """Tokens that are not text, those that the metadata names, and single characters."""
    key = f"{_TOKENIZER}token_type"
    types = decode(key, metadata[key]) if key in metadata else []
    always = {i for i, kind in enumerate(types) if kind in _KEPT_TYPES}
    always |= {i for i, text in enumerate(tokens[: 1 << 12]) if len(text) == 1}
    named = (header.metadata[key] for key in _special(header))
    return always | {n for n in named if isinstance(n, int) and 0 <= n < len(tokens)}


def _texts(paths: Sequence[str | os.PathLike[str]] | None) -> Iterator[str]:
    """Read files, and what is text in folders, up to some megabytes."""
    left = _MOST_TEXT
    for path in _library() if paths is None else _files(paths):
        with path.open("rb") as file:
            data = file.read(min(_MOST_FILE, left))
        if b"\0" in data:
            continue
        left -= len(data)
        yield data.decode("utf-8", "ignore")
        if not left:
            return


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise ModelFileError(f"There is no file or folder {path}. Name one that is there.")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (p for p in found if p.is_file())


def _library() -> Iterator[Path]:
    """The standard library's modules: Python, and English about it, on every machine."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        if not {"test", "tests", "site-packages", "idlelib"} & set(path.parts):
            yield path


# --- the file -------------------------------------------------------------------------------------


def _tokens_of(header: Header, metadata: Mapping[str, bytes]) -> list[str]:
    key = f"{_TOKENIZER}tokens"
    raw = metadata.get(key)
    if raw is None or TOKENS in header.metadata:
        cause = "lists no tokens" if raw is None else "is a narrow head already"
        raise ModelFileError(f"{header.path} {cause}. Name the file of the whole model.")
    tokens: list[str] = decode(key, raw)
    return tokens


def _special(header: Header) -> list[str]:
    """The keys that name a token by its number."""
    return [k for k in header.metadata if k.startswith(_TOKENIZER) and k.endswith("_token_id")]


def _metadata(
    header: Header, metadata: dict[str, bytes], kept: Sequence[int], stand_ins: Sequence[int]
) -> dict[str, bytes]:
    """The model's metadata with lists by token cut, and numbers of tokens changed."""
    cut = {k: raw for k, raw in metadata.items() if not k.startswith(_LEFT_OUT)}
    for key in (f"{_TOKENIZER}{name}" for name in ("tokens", "scores", "token_type")):
        if key in cut:
            values, kind = decode(key, cut[key]), elements_type(key, cut[key])
            cut[key] = entry(key, [values[token] for token in kept], kind)
    merges = f"{_TOKENIZER}merges"
    if merges in cut:
        cut[merges] = entry(merges, [], GGUFValueType.STRING)  # the host wants the list, even empty
    for key in _special(header):
        value = header.metadata[key]
        if isinstance(value, int) and 0 <= value < len(stand_ins):
            cut[key] = entry(key, stand_ins[value], header.kinds[key])
    size = f"{header.metadata.get('general.architecture')}.vocab_size"
    if size in cut:
        cut[size] = entry(size, len(kept), header.kinds[size])
    cut[TOKENS] = entry(TOKENS, list(kept), GGUFValueType.INT32)
    cut[STAND_INS] = entry(STAND_INS, list(stand_ins), GGUFValueType.INT32)
    return cut


def _part(header: Header, tensor: TensorInfo, kept: Sequence[int], n_vocab: int) -> TensorSource:
    """Return a tensor as it is, or the rows of the kept tokens where it has one for each token."""
    whole = stored(header, tensor)
    block, name = block_of(tensor.name)
    if name not in _BY_TOKEN:
        if n_vocab in tensor.shape and block < 0:
            raise ModelFileError(
                f"{header.path} has a tensor {tensor.name} with a value for each token, which this "
                "release does not know. Look for a newer llama-mtp."
            )
        return whole
    if len(tensor.shape) != 2 or tensor.shape[1] < n_vocab:
        raise ModelFileError(
            f"{header.path} has {n_vocab} tokens, and {tensor.name} has the shape {tensor.shape}. "
            "Convert or download it again."
        )
    n_row = whole.n_bytes // tensor.shape[1]
    return TensorSource(
        name=tensor.name,
        shape=(tensor.shape[0], len(kept)),
        type=tensor.type,
        n_bytes=n_row * len(kept),
        chunks=partial(_rows, whole, n_row, kept),
    )


def _rows(whole: TensorSource, n_row: int, kept: Sequence[int]) -> Iterator[Chunk]:
    """Stream some rows of a matrix, in ascending order."""
    assert whole.path is not None
    wanted, n_block = np.asarray(kept), max(1, CHUNK // n_row)
    with whole.path.open("rb") as file:
        for start in range(0, kept[-1] + 1, n_block):
            inside = wanted[(wanted >= start) & (wanted < start + n_block)] - start
            if not len(inside):
                continue
            file.seek(whole.offset + start * n_row)
            n_bytes = (int(inside[-1]) + 1) * n_row
            data = np.frombuffer(file.read(n_bytes), dtype=np.uint8)
            if len(data) < n_bytes:
                raise ModelFileError(f"{whole.path} ended while it was read. Download it again.")
            yield data.reshape(-1, n_row)[inside].tobytes()
