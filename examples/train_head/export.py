"""Write a head as a small GGUF: its tensors, and what is needed to join it with its base.

python examples/train_head/export.py head.npz smollm2_135m_nextn.gguf
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from common import Base, Floats, base_model, load_base
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from llama_mtp.demo.join import tokens_sha256

PROVENANCE = (
    "NextN (multi-token prediction) head for SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), "
    "trained by examples/train_head of llama-mtp. Its block starts from the base model's last "
    "layer; the only training data is text that the base model generated itself, with the base "
    "model's own hidden states."
)


def write_head(path: Path, head: Mapping[str, Floats], base: Base, *, note: str = "") -> Path:
    """Write ``head`` (part name -> float32 weights): matrices as Q8_0, norms as F32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    writer = GGUFWriter(temporary, "mimo2")
    writer.add_type("adapter")
    writer.add_name("SmolLM2-135M-Instruct NextN head")
    writer.add_license("apache-2.0")
    writer.add_description(" ".join(filter(None, (PROVENANCE, note))))
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_string("llama_mtp.base.name", "SmolLM2-135M-Instruct")
    writer.add_string("llama_mtp.base.tokens_sha256", tokens_sha256(base.tokens))
    writer.add_string("llama_mtp.head.provenance", " ".join(filter(None, (PROVENANCE, note))))
    writer.add_block_count(base.n_layer + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_embedding_length(base.n_embd)
    writer.add_feed_forward_length(base.n_ff)
    writer.add_head_count(base.n_head)
    writer.add_head_count_kv(base.n_head_kv)
    for part, weights in sorted(head.items()):
        name = f"blk.{base.n_layer}.{part}.weight"
        if weights.ndim == 1:
            writer.add_tensor(name, weights.astype(np.float32))
        else:
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(weights.astype(np.float32), q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)
    return path


def main() -> None:
    """Convert a checkpoint of ``train.py``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="head.npz as train.py writes it")
    parser.add_argument("out", type=Path, help="GGUF to write")
    parser.add_argument("--base", type=Path, default=None, help="GGUF of the base model")
    args = parser.parse_args()
    with np.load(args.checkpoint) as file:
        head = {name: file[name] for name in file.files if name != "note"}
        note = str(file["note"]) if "note" in file.files else ""
    out = write_head(args.out, head, load_base(args.base or base_model()), note=note)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
