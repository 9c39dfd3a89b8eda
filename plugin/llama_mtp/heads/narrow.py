"""A head that drafts for less: in a file of its own, with the frequent part of the vocabulary only.

A draft step reads the whole output matrix, which with a large vocabulary is most of what it reads,
and nearly all drafts that are right are frequent tokens (FR-Spec, arXiv 2502.14856). What the head
lacks it cannot propose; the text does not change.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import ModelFileError
from ..gguf.header import TOKENS, TensorInfo
from ..gguf.metadata import elements_type, entry
from ..gguf.model import Gguf, StrPath, block_of
from ..gguf.types import ValueType
from ..gguf.write import CHUNK, Chunk, Progress, TensorSource, check_destination, stored, write_gguf
from .architectures import ARCHITECTURES, OWN_OUTPUT
from .narrow_vocabulary import KEPT, STAND_INS
from .split import head_file_tensors, head_metadata, stem_of

_TOKENIZER = "tokenizer.ggml."
_BY_TOKEN = ("token_embd.weight", "output.weight", "nextn.embed_tokens.weight", OWN_OUTPUT)
_LEFT_OUT = ("tokenizer.chat_template", "tokenizer.huggingface", f"{_TOKENIZER}suppress_tokens")
_MOST_TEXT = 4 << 20  # bytes that are counted ...
_MOST_FILE = 1 << 19  # ... of one file at most: the rest of a long one is like its beginning
_SHARE, _FEWEST = 8, 8192  # unless told otherwise: one token of so many, and no fewer than that
_HELD_OUT = 8  # of so many texts one is not counted, to see what the choice is worth
_KEPT_TYPES = {2, 3, 4, 6}  # gguf.TokenType: UNKNOWN, CONTROL, USER_DEFINED, BYTE


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
    file: Gguf | StrPath,
    out: StrPath | None = None,
    *,
    n_tokens: int | None = None,
    texts: Sequence[StrPath] | None = None,
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
    model = Gguf.open(file)
    matrix = _output_matrix(model)
    if not model.n_tokens or KEPT in model.metadata:
        cause = "is a narrow head already" if model.n_tokens else "lists no tokens"
        raise ModelFileError(f"{model.path} {cause}. Name the file of the whole model.")
    tokens: list[str] = model.array(TOKENS)
    if n_tokens is None:
        n_tokens = usual_size(len(tokens))
    if not 0 < n_tokens < len(tokens):
        raise ModelFileError(
            f"{model.path} has {len(tokens)} tokens, and {n_tokens} of them were asked for. "
            "Ask for fewer with --tokens."
        )
    name = stem_of(model.path).removeprefix("mtp-")
    out = model.path.with_name(f"mtp-{name}-narrow.gguf") if out is None else Path(out)
    check_destination(out, model.parts, force=force)

    counted, held_out = count(model.path, _texts(texts))
    kept = choose(tokens, _always(model, tokens), counted, n_tokens)
    tensors = [_part(model, t, kept) for t in head_file_tensors(model)]
    metadata = _metadata(model, kept, stand_ins_of(tokens, kept))
    write_gguf(out, metadata, tensors, checked=[t.name for t in tensors], progress=progress)
    has = set(kept)
    total = held_out.total()
    before = stored(model, matrix).n_bytes
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


def _always(model: Gguf, tokens: Sequence[str]) -> set[int]:
    """Tokens that are not text, those that the metadata names, and single characters."""
    types = model.array(f"{_TOKENIZER}token_type")
    always = {i for i, kind in enumerate(types) if kind in _KEPT_TYPES}
    always |= {i for i, text in enumerate(tokens[: 1 << 12]) if len(text) == 1}
    return always | set(_special(model).values())


def _texts(paths: Sequence[StrPath] | None) -> Iterator[str]:
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


def _files(paths: Sequence[StrPath]) -> Iterator[Path]:
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


def _output_matrix(model: Gguf) -> TensorInfo:
    """Return the matrix that the head reads; ModelFileError where there is none to narrow."""
    known = ARCHITECTURES.get(model.architecture)
    if known is not None and known.shares_kv:
        raise ModelFileError(
            f"{model.path} is a {model.architecture} head, which has its own way to read less. "
            "Use it as it is."
        )
    if not model.heads:
        raise ModelFileError(f"{model.path} has no NextN head. Name the file that has it.")
    own = (t for t in model.head_tensors if block_of(t.name)[1] == OWN_OUTPUT)
    matrix = next(own, None) or model.output
    if matrix is None:
        raise ModelFileError(f"{model.path} has no output matrix. Name the file of the model.")
    return matrix


def _special(model: Gguf) -> dict[str, int]:
    """The keys that name a token by its number, and that number."""
    named = (k for k in model.metadata if k.startswith(_TOKENIZER) and k.endswith("_token_id"))
    values = {key: model.metadata[key] for key in named}
    return {k: v for k, v in values.items() if isinstance(v, int) and 0 <= v < model.n_tokens}


def _metadata(model: Gguf, kept: Sequence[int], stand_ins: Sequence[int]) -> dict[str, bytes]:
    """The model's metadata with lists by token cut, and numbers of tokens changed."""
    cut = {k: raw for k, raw in head_metadata(model).items() if not k.startswith(_LEFT_OUT)}
    for key in (f"{_TOKENIZER}{name}" for name in ("tokens", "scores", "token_type")):
        if key in cut:
            values, kind = model.array(key), elements_type(key, cut[key])
            cut[key] = entry(key, [values[token] for token in kept], kind)
    merges = f"{_TOKENIZER}merges"
    if merges in cut:
        cut[merges] = entry(merges, [], ValueType.STRING)  # the host wants the list, even empty
    numbers = {key: stand_ins[token] for key, token in _special(model).items()}
    size = f"{model.architecture}.vocab_size"
    if size in cut:
        numbers[size] = len(kept)
    cut |= {key: entry(key, number, model.kinds[key]) for key, number in numbers.items()}
    cut[KEPT] = entry(KEPT, list(kept), ValueType.INT32)
    cut[STAND_INS] = entry(STAND_INS, list(stand_ins), ValueType.INT32)
    return cut


def _part(model: Gguf, tensor: TensorInfo, kept: Sequence[int]) -> TensorSource:
    """Return a tensor as it is, or the rows of the kept tokens where it has one for each token."""
    whole, n_vocab = stored(model, tensor), model.n_tokens
    block, name = block_of(tensor.name)
    if name not in _BY_TOKEN:
        if n_vocab in tensor.shape and block < 0:
            raise ModelFileError(
                f"{model.path} has a tensor {tensor.name} with a value for each token, which this "
                "release does not know. Look for a newer llama-mtp."
            )
        return whole
    if len(tensor.shape) != 2 or tensor.shape[1] < n_vocab:
        raise ModelFileError(
            f"{model.path} has {n_vocab} tokens, and {tensor.name} has the shape {tensor.shape}. "
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
