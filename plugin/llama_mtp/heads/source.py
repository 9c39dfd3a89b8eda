"""A NextN head on its way into a file, wherever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..gguf.write import TensorSource


@dataclass(frozen=True)
class HeadSource:
    """A NextN head.

    Attributes:
        architecture: the architecture of the models that it fits; empty if its file does not say.
        n_heads: number of NextN blocks.
        n_embd: width of the hidden rows; 0 if its file does not say.
        tensors: named as in a joined file, with the block index *relative* to the first NextN
            block: ``blk.0.nextn.eh_proj.weight``, ``blk.0.attn_q.weight``, ``blk.1....``; only
            what the joined file gains. Tensors without ``blk.`` keep their names.
        origin: the name of the file or folder, to be recorded in the joined file.
        files: what it is read from.
        metadata: key to entry (see `gguf.metadata`), as the joined file of this head would have it.
            Where it has ``tokenizer.ggml.tokens`` and ``tokenizer.ggml.merges`` they must be those
            of the base. ``{arch}.*`` keys give the head's own values: a per-layer array has either
            `n_blocks` or `n_heads` entries, and the last `n_heads` are the head's.
        n_blocks: blocks of the model that it comes from; 0 if its file does not say.
        n_vocab: tokens in the vocabulary of a head whose metadata does not list them; 0 if unknown.
    """

    architecture: str
    n_heads: int
    n_embd: int
    tensors: tuple[TensorSource, ...]
    origin: str
    files: tuple[Path, ...]
    metadata: Mapping[str, bytes] = field(default_factory=dict)
    n_blocks: int = 0
    n_vocab: int = 0
