"""Whether a head that reads its target's KV cache would find cells of the size that it reads.

A Gemma 4 assistant has queries of its own and the keys and values of the target's last two layers
that have any, one of which slides. The host takes their sizes from the assistant's file: larger
ones abort the process, smaller ones draft from the wrong numbers.
"""

from __future__ import annotations

import re

from ..gguf.model import Gguf

_KEY_NORM = re.compile(r"blk\.(\d+)\.attn_k_norm\.weight")
_QUERY_NORM = re.compile(r"blk\.(\d+)\.attn_q_norm\.weight")


def foreign_cells(model: Gguf, draft: Gguf) -> str:
    """Return why the cells of a model are not those of the head; empty if they are."""
    n_heads = draft.number("attention.head_count_kv")  # None for a list, and then the width decides
    there = {_cell(model, il, width) for il, width in _widths(model, _KEY_NORM)[-2:]}
    for il, width in _widths(draft, _QUERY_NORM):
        if not any(w == width and (n == n_heads or None in (n, n_heads)) for w, n in there):
            found = " and ".join(_shown(n, w) for w, n in there) or "none"
            return (
                f"layer {il} of the head reads {_shown(n_heads, width)} of a token, and the last "
                f"layers of the model have {found}. Pass the head that was made for this model."
            )
    return ""


def _shown(n_heads: int | None, width: int) -> str:
    return f"{'' if n_heads is None else f'{n_heads} '}keys of {width} numbers"


def _widths(file: Gguf, norm: re.Pattern[str]) -> list[tuple[int, int]]:
    """Layers that have this norm, in order, and the width of a head in them."""
    found = []
    for name, tensor in file.tensors.items():
        if (match := norm.fullmatch(name)) and tensor.shape and tensor.shape[0]:
            found.append((int(match[1]), tensor.shape[0]))
    return sorted(found)


def _cell(model: Gguf, il: int, width: int) -> tuple[int, int | None]:
    """Width of a key in a layer, and how many there are; None where they are fused with others."""
    keys = model.tensors.get(f"blk.{il}.attn_k.weight")
    return width, keys.shape[1] // width if keys is not None and len(keys.shape) > 1 else None
