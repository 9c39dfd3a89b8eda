"""Whether a head was made for a trunk: architecture, widths, and every token of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelFileError
from ..gguf.header import TOKENS
from ..gguf.metadata import decode
from ..gguf.model import Gguf, block_of
from .architectures import OWN_OUTPUT
from .source import HeadSource

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
_MERGES = "tokenizer.ggml.merges"


def check_match(base: Gguf, metadata: Mapping[str, bytes], head: HeadSource) -> list[str]:
    """Raise unless the head was made for this trunk; return what could not be checked.

    Args:
        base: the trunk's file.
        metadata: the trunk's metadata, key to entry.
        head: the head.

    Raises:
        ModelFileError: it was made for another model; the message says what differs.
    """
    arch = base.architecture
    if head.architecture and head.architecture != arch:
        raise _other(f"{head.origin} is a head for {head.architecture}, and {base.path} is {arch}")
    n_embd = base.number("embedding_length") or 0
    if head.n_embd and head.n_embd != n_embd:
        raise _other(
            f"{head.origin} is a head for hidden rows of {head.n_embd} floats, and those of "
            f"{base.path} have {n_embd}"
        )
    n_trunk = head.n_blocks - head.n_heads
    if head.n_blocks and n_trunk != base.heads.start:
        raise _other(
            f"{head.origin} is a head for a trunk of {n_trunk} blocks, and {base.path} has "
            f"{base.heads.start}"
        )
    for key in (f"{arch}.{name}" for name in _SHAPING):
        if key not in metadata or key not in head.metadata:
            continue
        ours, theirs = decode(key, metadata[key]), decode(key, head.metadata[key])
        if ours != theirs and not isinstance(ours, list) and not isinstance(theirs, list):
            raise _other(f"{head.origin} has {key} = {theirs}, and {base.path} has {ours}")
    notes = _check_vocabulary(base, metadata, head)
    n_vocab = base.shape("token_embd.weight")[-1]
    shapes = {
        "nextn.eh_proj.weight": (2 * n_embd, n_embd),
        "nextn.enorm.weight": (n_embd,),
        "nextn.hnorm.weight": (n_embd,),
        "nextn.shared_head_norm.weight": (n_embd,),
        "attn_norm.weight": (n_embd,),
    }
    if n_vocab:
        shapes["nextn.embed_tokens.weight"] = shapes[OWN_OUTPUT] = (n_embd, n_vocab)
    for tensor in head.tensors:
        expected = shapes.get(block_of(tensor.name)[1], tensor.shape)
        if tensor.shape != expected:
            raise _other(
                f"{head.origin} has tensor {tensor.name} of shape {list(tensor.shape)}, and "
                f"{base.path} needs {list(expected)}"
            )
    return notes


def _check_vocabulary(base: Gguf, metadata: Mapping[str, bytes], head: HeadSource) -> list[str]:
    if not base.n_tokens:
        raise ModelFileError(f"{base.path} has no vocabulary. Convert the model again.")
    if TOKENS not in head.metadata:
        if head.n_vocab and head.n_vocab != base.n_tokens:
            raise _other(
                f"{head.origin} is a head for {head.n_vocab} tokens, and {base.path} has "
                f"{base.n_tokens}"
            )
        return [
            f"{head.origin} lists no vocabulary: "
            + ("only its size was compared." if head.n_vocab else "it could not be compared.")
        ]
    for what, key in (("tokens", TOKENS), ("merges", _MERGES)):
        ours, theirs = metadata.get(key), head.metadata.get(key)
        if ours is None or theirs is None or ours == theirs:
            continue
        a, b = _list(key, ours, str(base.path)), _list(key, theirs, head.origin)
        if a == b:
            continue
        if len(a) != len(b):
            difference = f"it has {len(b)} {what}, not {len(a)}"
        else:
            at = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
            difference = f"number {at} of its {what} is {b[at]!r}, not {a[at]!r}"
        raise _other(
            f"{head.origin} was made for another vocabulary than that of {base.path}: {difference}"
        )
    return []


def _list(key: str, raw: bytes, origin: str) -> list[Any]:
    values = decode(key, raw)
    if not isinstance(values, list):
        raise ModelFileError(f"{origin} has a {key} that is no list. Convert the model again.")
    return values


def _other(cause: str) -> ModelFileError:
    return ModelFileError(f"{cause}. Take a head of the same model.")
