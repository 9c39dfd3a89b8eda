"""The config.json of an HF checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from ...errors import ModelFileError
from .safetensors import read_json


class Config(dict[str, Any]):
    """What config.json says; of a multimodal model, what it says of the language model first."""

    def __init__(self, folder: Path) -> None:
        """Read the file; ModelFileError where it is missing or damaged."""
        self.path = folder / "config.json"
        if not self.path.is_file():
            raise ModelFileError(
                f"{folder} is no checkpoint: it has no config.json. Pass the folder that holds it "
                "and the *.safetensors files."
            )
        whole = read_json(self.path)
        super().__init__(whole)
        for key in ("text_config", "llm_config"):
            if isinstance(inner := whole.get(key), dict):
                self.update(inner)
        self["architectures"] = whole.get("architectures")

    def number(self, key: str) -> int:
        """A number that has to be there; ModelFileError where it is not."""
        value = self.get(key)
        if not is_size(value):
            raise self.wrong(key, value, "a number is")
        return value

    @property
    def n_layers(self) -> int:
        """Layers of the trunk; some families list them instead of counting."""
        for key in ("hybrid_override_pattern", "layers_block_type"):
            if isinstance(pattern := self.get(key), str | list):
                return len(pattern)
        return self.number("num_hidden_layers")

    @property
    def block_size(self) -> tuple[int, int]:
        """Rows and columns that share a scale where weights are FP8."""
        how = self.get("quantization_config")
        size = how.get("weight_block_size") if isinstance(how, dict) else None
        if size is None:
            return 128, 128
        if not isinstance(size, list) or len(size) != 2 or not all(map(is_size, size)):
            raise self.wrong("weight_block_size", size, "two numbers are")
        return size[0], size[1]

    def wrong(self, key: str, value: Any, wanted: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path} has {key} = {value!r} where {wanted} needed. Download it again."
        )


def is_size(value: Any) -> TypeGuard[int]:
    """Whether something that JSON held is a whole number that can count what a file holds."""
    return type(value) is int and 0 < value < 2**31
