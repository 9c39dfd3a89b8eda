"""Whether an HF checkpoint has the tokens of the model that its head is to be joined to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ModelFileError
from ...gguf.header import TOKENS
from ...gguf.model import Gguf
from .safetensors import read_json


def shared_vocabulary(folder: Path, base: Gguf) -> dict[str, bytes]:
    """Return the base's list of tokens, as metadata, if the folder's is there and the same.

    Raises:
        ModelFileError: a token differs. The base may have more: those that only fill it up.
    """
    theirs = _tokens(folder)
    ours = base.array(TOKENS) if theirs else []
    if not ours:
        return {}
    for number, token in theirs.items():
        here = ours[number] if 0 <= number < len(ours) else None
        # llama.cpp has the space of tokens that were added as it is, not as a lower one, and it
        # fills gaps, which a later version of the tokenizer may have closed.
        if here not in (token, token.replace("\u2581", " "), f"[PAD{number}]"):
            raise ModelFileError(
                f"{folder} and {base.path} have different vocabularies: token {number} is "
                f"{token!r} there and {here!r} here. Take the head from the checkpoint that this "
                "model was made from."
            )
    return {TOKENS: base.entry(TOKENS)}


def _tokens(folder: Path) -> dict[int, str]:
    """Return id to text of a checkpoint's tokens; empty if they are in no file that is known."""
    pairs: list[tuple[Any, Any]] = []
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
        texts = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(texts, dict):
            pairs += texts.items()
        elif isinstance(texts, list):  # [text, score] in the order of ids
            pairs += [(v[0], i) for i, v in enumerate(texts) if isinstance(v, list) and v]
        if isinstance(added, list):
            pairs += [(t.get("content"), t.get("id")) for t in added if isinstance(t, dict)]
    else:
        for name in ("vocab.json", "added_tokens.json"):
            if (folder / name).is_file():
                pairs += read_json(folder / name).items()
    return {i: text for text, i in pairs if isinstance(text, str) and type(i) is int}
