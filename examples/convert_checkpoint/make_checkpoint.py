"""Write a small Hugging Face checkpoint to try things on: the head of the demo model, in BF16.

The demo model has the architecture of MiMo 2, so its head is written as MiMo's checkpoints have
theirs: config.json, the vocabulary, and one safetensors file with the tensors of the head.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

# llama.cpp's names to the checkpoint's, below model.mtp.layers.0.
NAMES = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_checkpoint(model: Path, folder: Path) -> Path:
    """Write the head of a `mimo2` GGUF as a checkpoint's folder."""
    reader = GGUFReader(model)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    n_trunk = value("mimo2.block_count") - value("mimo2.nextn_predict_layers")
    folder.mkdir()
    config = {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "num_hidden_layers": n_trunk,
        "hidden_size": value("mimo2.embedding_length"),
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "num_attention_heads": value("mimo2.attention.head_count"),
        "swa_num_key_value_heads": value("mimo2.attention.head_count_kv"),
        "head_dim": value("mimo2.attention.key_length"),
        "v_head_dim": value("mimo2.attention.value_length"),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    vocabulary = {text: i for i, text in enumerate(value("tokenizer.ggml.tokens"))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))

    entries: dict[str, dict[str, Any]] = {}
    blobs: list[bytes] = []
    for tensor in reader.tensors:
        if not tensor.name.startswith(f"blk.{n_trunk}."):
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        start = sum(map(len, blobs))
        blobs.append(quantize(values, GGMLQuantizationType.BF16).tobytes())
        part = tensor.name.removeprefix(f"blk.{n_trunk}.").removesuffix(".weight")
        entries[f"model.mtp.layers.0.{NAMES[part]}.weight"] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [start, start + len(blobs[-1])],
        }
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + b"".join(blobs))
    return folder
