"""A GGUF file: opened once, asked by everyone."""

from __future__ import annotations

import os
import re
from functools import cached_property
from typing import Any, TypeAlias

from ..errors import ModelFileError
from .header import TOKENS, ArrayInfo, Header, TensorInfo, read_header
from .metadata import decode
from .types import ValueType

_BLOCK = re.compile(r"blk\.([0-9]+)\.(.*)", re.DOTALL)

StrPath: TypeAlias = "str | os.PathLike[str]"


class Gguf(Header):
    """The header of a GGUF file, and what can be asked of it.

    What the header says is an attribute (see `Header`); nothing is read again but the metadata's
    lists, when they are asked for.
    """

    @classmethod
    def open(cls, file: Gguf | StrPath, *, like: Gguf | None = None) -> Gguf:
        """Read the header of a file; of a split one, ``file`` is the first part.

        A `Gguf` is returned as it is. ``like`` is a file that may have the same vocabulary, which
        then is not read twice.

        Raises:
            ModelFileError: the file or a part is missing, no GGUF, damaged or truncated.
        """
        return file if isinstance(file, Gguf) else cls(**vars(read_header(file, like=like)))

    # --- metadata ---------------------------------------------------------------------------------

    @cached_property
    def architecture(self) -> str:
        """``general.architecture``; empty if the file does not say."""
        return self.text("general.architecture")

    @property
    def n_tokens(self) -> int:
        """Tokens in the vocabulary; 0 if it is not listed."""
        tokens = self.metadata.get(TOKENS)
        if not isinstance(tokens, ArrayInfo) or self.kinds[TOKENS] != ValueType.ARRAY:
            return 0
        return tokens.count

    def text(self, key: str) -> str:
        """The text of a key; empty where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> int | None:
        """The whole number of the key ``{architecture}.{name}``.

        None where there is none, or one of another type than uint32: llama.cpp does not take it
        then. So it is where a key has a list, one value for each block.
        """
        key = f"{self.architecture}.{name}"
        value, kind = self.metadata.get(key), self.kinds.get(key, ValueType.UINT32)
        return value if isinstance(value, int) and kind == ValueType.UINT32 else None

    def entry(self, key: str) -> bytes:
        """Read the entry of a key: see `.metadata`. Empty where there is none."""
        start, end = self.entries.get(key, (0, 0))
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read any more: {error}.") from error

    def array(self, key: str) -> list[Any]:
        """Read the list of a key: numbers, truths or texts. Empty where there is none."""
        raw = self.entry(key) if self.kinds.get(key) == ValueType.ARRAY else b""
        return list(decode(key, raw)) if raw else []

    # --- blocks -----------------------------------------------------------------------------------

    @property
    def declared(self) -> range:
        """The NextN blocks that the metadata declares: the last ones. llama.cpp goes by these."""
        n_blocks = self.number("block_count") or 0
        return range(n_blocks - (self.number("nextn_predict_layers") or 0), n_blocks)

    @cached_property
    def heads(self) -> range:
        """The NextN blocks whose tensors are there; what is before them is the trunk.

        The metadata may say less, as in a file of nothing but a head, or be that of a file whose
        head was dropped.

        Raises:
            ModelFileError: tensors and metadata contradict each other.
        """
        declared, parts = self.declared, map(block_of, self.tensors)
        found = sorted({block for block, rest in parts if rest.startswith("nextn.") and block >= 0})
        start = found[0] if found else declared.start
        heads = range(start, start + len(found))
        if start < 0 or found != list(heads) or (found and declared and heads != declared):
            raise ModelFileError(
                f"{self.path} declares {declared.stop} blocks with {len(declared)} NextN blocks "
                f"among them, and its NextN tensors are in the blocks {found}. "
                "Convert or download it again."
            )
        return heads

    def in_blocks(self, blocks: range) -> list[TensorInfo]:
        """The tensors of some blocks, in the file's order."""
        return [t for t in self.tensors.values() if block_of(t.name)[0] in blocks]

    @property
    def head_tensors(self) -> list[TensorInfo]:
        """The tensors of the NextN blocks; ModelFileError as from `heads`."""
        return [t for t in self.tensors.values() if block_of(t.name)[0] >= self.heads.start]

    @property
    def trunk_tensors(self) -> list[TensorInfo]:
        """All other tensors; ModelFileError as from `heads`."""
        return [t for t in self.tensors.values() if block_of(t.name)[0] < self.heads.start]

    @property
    def has_trunk(self) -> bool:
        """Whether it is more than a head by itself."""
        first = [name for name in self.tensors if name.startswith("blk.0.")]
        alone = bool(self.declared) and self.declared.start == 0
        return bool(first) and not alone and "blk.0.nextn." not in "".join(first)

    # --- tensors ----------------------------------------------------------------------------------

    @property
    def output(self) -> TensorInfo | None:
        """The trunk's output matrix, which may be its table of embeddings; None without one."""
        return self.tensors.get("output.weight") or self.tensors.get("token_embd.weight")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a matrix, contiguous dimension first; zeros if there is none of that name."""
        tensor = self.tensors.get(name)
        return tensor.shape if tensor is not None and len(tensor.shape) >= 2 else (0, 0)


def block_of(name: str) -> tuple[int, str]:
    """Return (block, rest) of a tensor's name; block -1 where it belongs to none."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, name)
