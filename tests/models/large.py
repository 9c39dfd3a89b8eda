"""A model with a vocabulary of today's size whose weights are a hole in the file.

The header is real and the host accepts it; the tensors take no disk and read as zeros.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

import models

N_VOCAB = 248_320


def write(path: Path, small: models.Model, n_vocab: int = N_VOCAB) -> Path:
    """Write ``small`` to ``path`` again with ``n_vocab`` tokens and as many merges."""
    reader = gguf.GGUFReader(small.path)
    writer = gguf.GGUFWriter(path, small.arch)
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (*lists, "general.architecture"):
            sub_type = value.types[1] if len(value.types) > 1 else None
            writer.add_key_value(key, value.contents(), value.types[0], sub_type)
    tokens, scores, kinds = (reader.fields[key].contents() for key in lists)
    more = n_vocab - len(tokens)
    writer.add_token_list([*tokens, *(f"token-{i}" for i in range(more))])
    writer.add_token_scores([*scores, *([-1e6] * more)])
    writer.add_token_types([*kinds, *([int(gguf.TokenType.NORMAL)] * more)])
    writer.add_token_merges([f"to ken-{i}" for i in range(n_vocab)])
    size = 0
    for tensor in reader.tensors:
        shape = [n_vocab if n == models.N_VOCAB else int(n) for n in reversed(tensor.shape)]
        n_bytes = 4 * int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes)
        size += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        header = -(-file.seek(0, 2) // 32) * 32
        file.truncate(header + size)
    return path
