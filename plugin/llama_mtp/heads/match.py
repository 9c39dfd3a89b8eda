"""Whether a head was made for a trunk: architecture, widths, and every token of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelFileError
from ..gguf.header import Header
from ..gguf.metadata import decode
from ..gguf.write import HeadSource
from .split import Blocks, block_of, integer

# Numbers that shape the head's block: a head that says another one is another model's.
_SHAPING = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.kv_lora_rank",
    "attention.q_lora_rank",
    "attention.value_length",
    "expert_count",
    "rope.dimension_count",
)


def check_match(
    base: Header, blocks: Blocks, metadata: Mapping[str, bytes], head: HeadSource
) -> list[str]:
    """Raise unless the head was made for this trunk; return what could not be checked.

    Args:
        base: the trunk's file.
        blocks: which of its blocks are the trunk's.
        metadata: the trunk's metadata, key to entry.
        head: the head.

    Raises:
        ModelFileError: it was made for another model; the message says what differs.
    """
    arch = blocks.architecture
    if head.architecture and head.architecture != arch:
        raise ModelFileError(
            f"{head.origin} is a head for {head.architecture}, and {base.path} is {arch}. "
            "Take a head of the same model."
        )
    n_embd = integer(base, f"{arch}.embedding_length")
    if head.n_embd and head.n_embd != n_embd:
        raise ModelFileError(
            f"{head.origin} is a head for hidden rows of {head.n_embd} floats, and those of "
            f"{base.path} have {n_embd}. Take a head of the same model."
        )
    count = f"{arch}.block_count"
    if count in head.metadata:
        n_trunk = decode(count, head.metadata[count]) - head.n_heads
        if n_trunk != blocks.n_trunk:
            raise ModelFileError(
                f"{head.origin} is a head for a trunk of {n_trunk} blocks, and {base.path} has "
                f"{blocks.n_trunk}. Take a head of the same model."
            )
    for key in (f"{arch}.{name}" for name in _SHAPING):
        ours, theirs = metadata.get(key), head.metadata.get(key)
        if ours is None or theirs is None:
            continue
        pair = decode(key, ours), decode(key, theirs)
        if pair[0] != pair[1] and not any(isinstance(value, list) for value in pair):
            raise ModelFileError(
                f"{head.origin} has {key} = {pair[1]}, and {base.path} has {pair[0]}. "
                "Take a head of the same model."
            )
    notes = _check_vocabulary(base, metadata, head)
    embedding = base.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[-1] if embedding is not None else 0
    for tensor in head.tensors:
        expected = _expected_shape(block_of(tensor.name)[1], n_embd, n_vocab)
        if expected and tensor.shape != expected:
            raise ModelFileError(
                f"{head.origin} has tensor {tensor.name} of shape {list(tensor.shape)}, and "
                f"{base.path} needs {list(expected)}. Take a head of the same model."
            )
    return notes


def _expected_shape(name: str, n_embd: int, n_vocab: int) -> tuple[int, ...] | None:
    """The shape that follows from the trunk alone, ggml order; None where none does."""
    shapes: dict[str, tuple[int, ...]] = {
        "nextn.eh_proj.weight": (2 * n_embd, n_embd),
        "nextn.enorm.weight": (n_embd,),
        "nextn.hnorm.weight": (n_embd,),
        "nextn.shared_head_norm.weight": (n_embd,),
        "attn_norm.weight": (n_embd,),
    }
    if n_vocab:
        shapes["nextn.embed_tokens.weight"] = (n_embd, n_vocab)
        shapes["nextn.shared_head_head.weight"] = (n_embd, n_vocab)
    return shapes.get(name)


def _check_vocabulary(base: Header, metadata: Mapping[str, bytes], head: HeadSource) -> list[str]:
    key = "tokenizer.ggml.tokens"
    ours = metadata.get(key)
    if ours is None:
        raise ModelFileError(f"{base.path} has no vocabulary. Convert the model again.")
    theirs = head.metadata.get(key)
    if theirs is None:
        n_tokens = len(_list(key, ours, str(base.path)))
        if head.n_vocab and head.n_vocab != n_tokens:
            raise ModelFileError(
                f"{head.origin} is a head for {head.n_vocab} tokens, and {base.path} has "
                f"{n_tokens}. Take a head of the same model."
            )
        return [
            f"{head.origin} lists no vocabulary: "
            + ("only its size was compared." if head.n_vocab else "it could not be compared.")
        ]
    _check_texts(key, "tokens", ours, theirs, base, head)
    key = "tokenizer.ggml.merges"
    if key in metadata and key in head.metadata:
        _check_texts(key, "merges", metadata[key], head.metadata[key], base, head)
    return []


def _check_texts(
    key: str, what: str, ours: bytes, theirs: bytes, base: Header, head: HeadSource
) -> None:
    if ours == theirs:
        return
    a, b = _list(key, ours, str(base.path)), _list(key, theirs, head.origin)
    if a == b:
        return
    if len(a) != len(b):
        difference = f"it has {len(b)} {what}, not {len(a)}"
    else:
        at = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
        difference = f"number {at} of its {what} is {b[at]!r}, not {a[at]!r}"
    raise ModelFileError(
        f"{head.origin} was made for another vocabulary than that of {base.path}: {difference}. "
        "Take a head of the same model."
    )


def _list(key: str, raw: bytes, origin: str) -> list[Any]:
    values = decode(key, raw)
    if not isinstance(values, list):
        raise ModelFileError(f"{origin} has a {key} that is no list. Convert the model again.")
    return values
