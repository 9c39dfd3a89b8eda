"""Reads the MTP head out of a Hugging Face checkpoint, as tensors that llama.cpp knows.

`families` says what the checkpoint calls each tensor; here the tensors are found, checked against
the model that they are to be joined to, and described: every one as runs of rows of the
checkpoint's own tensors, which are read, converted and put one below the other only while the
joined file is written. BF16, F16 and F32 stay what they are, FP8 becomes BF16, and what llama.cpp
wants in F32 (norms, biases, routers) becomes that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ...errors import ModelFileError
from ...gguf.header import TOKENS
from ...gguf.metadata import entry
from ...gguf.model import Gguf, StrPath, block_of
from ...gguf.write import TensorSource
from ..source import HeadSource
from .families import FAMILIES, Family, Part, family_of
from .safetensors import Checkpoint, StoredTensor, read_json
from .weights import (
    F32,
    TYPES,
    Run,
    Shape,
    Tensor,
    Weight,
    scales_of,
    source_of,
    to_f32,
    transpose,
)

__all__ = ["read_head"]

# What the host reads in F32 besides vectors and norms.
_ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "indexer.proj.weight")


def read_head(folder: StrPath, base: Gguf) -> HeadSource:
    """Find the MTP head of a checkpoint, for the model ``base``.

    Only headers are read here; the tensors' data is when their chunks are asked for.

    Raises:
        ModelFileError: the folder is no checkpoint, is damaged or incomplete; it has no head; its
            family is not known; or it is another model than ``base``.
    """
    folder = Path(folder)
    config = _config(folder)
    family = family_of(config)
    if family is None:
        known = ", ".join(dict.fromkeys(model for f in FAMILIES for model in f.models))
        raise ModelFileError(
            f"{folder} is a checkpoint of {config.get('architectures')}, whose head this release "
            f"cannot read; it knows {known}. Convert it with llama.cpp and graft from that file."
        )
    _check_model(folder, config, family, base)
    checkpoint = Checkpoint(folder)
    reader = _Reader(checkpoint, config, family)
    n_heads = reader.count_heads()
    checkpoint.require(reader.places(n_heads))
    tensors = [
        source_of(f"blk.{head}.{name}", tensor)
        for head in range(n_heads)
        for name, tensor in reader.block(head)
    ]
    _check_shapes(folder, tensors, base)
    metadata = _per_layer(config, family, base, n_heads) | _vocabulary(folder, base)
    n_vocab = _number(config, "vocab_size", folder)
    if n_vocab <= base.n_tokens < n_vocab + family.vocab_multiple:
        n_vocab = base.n_tokens  # filled up when it was converted
    return HeadSource(
        architecture=family.arch,
        n_heads=n_heads,
        n_embd=_number(config, "hidden_size", folder),
        tensors=tuple(tensors),
        origin=folder.resolve().name,
        files=tuple(folder.iterdir()),
        metadata=metadata,
        n_vocab=n_vocab,
    )


# --- config.json ----------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    """Read config.json; of a multimodal model, what it says of the language model comes first."""
    if not (folder / "config.json").is_file():
        raise ModelFileError(
            f"{folder} is no checkpoint: it has no config.json. Pass the folder that holds it and "
            "the *.safetensors files."
        )
    config = read_json(folder / "config.json")
    for key in ("text_config", "llm_config"):
        if isinstance(inner := config.get(key), dict):
            config = {**config, **inner, "architectures": config.get("architectures")}
    return config


def _number(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise ModelFileError(
            f"{folder / 'config.json'} has {key} = {value!r} where a number is needed. "
            "Download it again."
        )
    return value


def _count_layers(config: Mapping[str, Any], folder: Path) -> int:
    """Layers of the trunk; some families list them instead of counting."""
    for key in ("hybrid_override_pattern", "layers_block_type"):
        if isinstance(pattern := config.get(key), str | list):
            return len(pattern)
    return _number(config, "num_hidden_layers", folder)


# --- the model that the head is to be joined to ---------------------------------------------------


def _check_shapes(folder: Path, tensors: list[TensorSource], base: Gguf) -> None:
    """Raise unless the tensors have the shapes of their like in the trunk, where there is one."""
    there: dict[str, set[Shape]] = {}
    for tensor in base.trunk_tensors:
        there.setdefault(block_of(tensor.name)[1], set()).add(_trimmed(tensor.shape))
    for source in tensors:
        wanted = there.get(block_of(source.name)[1])
        if wanted and _trimmed(source.shape) not in wanted:
            raise ModelFileError(
                f"{folder} has {source.name} with the dimensions {_times(source.shape)}, where "
                f"{base.path} needs {' or '.join(map(_times, sorted(wanted)))}. Take the head from "
                "the checkpoint that this model was made from."
            )


def _trimmed(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _check_model(folder: Path, config: Mapping[str, Any], family: Family, base: Gguf) -> None:
    """Raise unless config.json describes the base."""
    pairs = {
        "architecture": (family.arch, base.architecture),
        "number of layers": (_count_layers(config, folder), base.heads.start),
        "hidden size": (_number(config, "hidden_size", folder), base.number("embedding_length")),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ModelFileError(
                f"{folder} and {base.path} are not the same model: the {what} is {theirs} "
                f"there and {ours} here. Take the head from the checkpoint that this model was "
                "made from."
            )
    parts = {block_of(tensor.name)[1] for tensor in base.trunk_tensors}
    if "attn_kv_b.weight" in parts and "attn_k_b.weight" not in parts:
        raise ModelFileError(
            f"{base.path} was converted before llama.cpp split attn_kv_b, and no head fits "
            "it any more. Convert or download the model again."
        )


# --- from names to tensors ------------------------------------------------------------------------


class _Reader:
    """Finds the tensors of a checkpoint's NextN blocks by the table of its family."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any], family: Family) -> None:
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.config = config
        self.family = family
        self.first_layer = _count_layers(config, self.folder)

    def count_heads(self) -> int:
        """Return how many heads there are: as config.json says, or as are found."""
        name = self.family.parts["attn_norm.weight"][0].names[0]
        declared = self.config.get(self.family.count_key)
        if type(declared) is int and declared > 0:
            return declared
        found = 0
        while self._place(name, found) in self.checkpoint:
            found += 1
            if self._place(name, found) == self._place(name, 0):  # not counted by its name
                break
        if not found:
            raise ModelFileError(
                f"{self.folder} has no MTP head: it lacks {self._place(name, 0)}. Take the "
                "original checkpoint; a fine-tuned one often comes without."
            )
        return found

    def places(self, n_heads: int) -> tuple[str, ...]:
        """Return what the names of the heads' tensors begin with."""
        # A config can claim any number of heads; the second that is not there ends the reading.
        return tuple({self._place(self.family.place, head) for head in range(min(n_heads, 64))})

    def block(self, head: int) -> Iterator[tuple[str, Tensor]]:
        """Yield name (without ``blk.N.``) and tensor of everything that one head has.

        Raises:
            ModelFileError: a tensor is missing, or cannot be what the table says.
        """
        parts = dict(self.family.parts)
        for ways in self.family.choices:
            parts |= next(
                (way for way in ways if self._found(next(iter(way.values())), head)), ways[0]
            )
        for name, alternatives in parts.items():
            if found := self._found(alternatives, head):
                yield name, self._tensor(name, *found, head)
            elif not all(part.optional for part in alternatives):
                self._missing(alternatives[0], head)

    def _place(self, template: str, head: int, expert: int = 0) -> str:
        return (
            template.replace("{layer}", str(self.first_layer + head))
            .replace("{head}", str(head))
            .replace("{e}", str(expert))
        )

    def _found(self, alternatives: tuple[Part, ...], head: int) -> tuple[Part, str] | None:
        """Return the first alternative that the checkpoint has, and its template."""
        for part in alternatives:
            for template in part.names:
                name = self._place(template, head)
                if name in self.checkpoint:
                    return part, template
                if part.how == "qkv" and name.replace("qkv_proj", "q_proj") in self.checkpoint:
                    return part, template
        return None

    def _missing(self, part: Part, head: int) -> None:
        name = self._place(part.names[0], head)
        packed = [
            name.removesuffix("weight") + suffix
            for suffix in ("qweight", "weight_packed", "blocks")
            if name.removesuffix("weight") + suffix in self.checkpoint
        ]
        if packed:
            raise ModelFileError(
                f"{self.folder} has the MTP head in a packed format ({packed[0]}), which this "
                "release cannot read. Take the BF16 or FP8 checkpoint."
            )
        raise ModelFileError(
            f"{self.folder} lacks {name} of its MTP head. Download the missing files, or take the "
            "original checkpoint; a fine-tuned one often comes without a head."
        )

    def _tensor(self, name: str, part: Part, template: str, head: int) -> Tensor:
        place = self._place(template, head)
        if part.how == "experts":
            return self._experts(template, head)
        if part.how == "qkv":
            return self._qkv(place)
        weight = self._weight(place)
        shape = weight.stored.shape
        if part.how in ("k_b", "v_b"):
            return self._half_of_kv_b(weight, part.how == "k_b")
        if part.how in ("gate_half", "up_half"):
            return self._half_of_experts(weight, part.how == "gate_half")
        while len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        run = Run(weight, 0, weight.stored.n_rows)
        norm = name.endswith("norm.weight")
        if norm or len(shape) <= 1 or not name.endswith(".weight") or name in _ALWAYS_F32:
            more = 1.0 if norm and self.family.norms_less_one else 0.0
            return Tensor(shape, F32, (run,), to_f32(weight.type, more))
        return Tensor(shape, weight.type, (run,))

    def _experts(self, template: str, head: int) -> Tensor:
        """Stack the experts of one projection."""
        count = 0
        weights = []
        while (place := self._place(template, head, count)) in self.checkpoint:
            weights.append(self._weight(place))
            count += 1
        declared = [
            value
            for key in ("n_routed_experts", "num_experts", "num_local_experts")
            if type(value := self.config.get(key)) is int
        ]
        if declared and count < declared[0]:
            raise ModelFileError(f"{self.folder} lacks {place}. Download the missing files.")
        return self._joined(weights, (count, *weights[0].stored.shape))

    def _half_of_experts(self, weight: Weight, upper: bool) -> Tensor:
        """Take gate or up out of ``[experts, gate and up, columns]``."""
        shape = weight.stored.shape
        if len(shape) != 3 or shape[1] % 2:
            self._unfit(weight, "[experts, 2 n, columns]")
        n_experts, n_rows, n_columns = shape
        half = n_rows // 2
        starts = [e * n_rows + (0 if upper else half) for e in range(n_experts)]
        runs = tuple(Run(weight, start, start + half) for start in starts)
        return Tensor((n_experts, half, n_columns), weight.type, runs)

    def _half_of_kv_b(self, weight: Weight, key: bool) -> Tensor:
        """Take the heads' keys, each transposed, or their values, out of MLA's kv_b."""
        n_head, n_key, n_value = (
            _number(self.config, name, self.folder)
            for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
        )
        both = n_key + n_value
        if len(weight.stored.shape) != 2 or weight.stored.n_rows != n_head * both:
            self._unfit(weight, f"[{n_head} x {both}, columns]")
        rank = weight.stored.n_columns
        if key:
            runs = tuple(Run(weight, h * both, h * both + n_key) for h in range(n_head))
            return Tensor((n_head, rank, n_key), weight.type, runs, transpose, whole=True)
        runs = tuple(Run(weight, h * both + n_key, (h + 1) * both) for h in range(n_head))
        return Tensor((n_head, n_value, rank), weight.type, runs)

    def _qkv(self, place: str) -> Tensor:
        """Query, key and value in one matrix, which the checkpoint may have in three."""
        if place not in self.checkpoint:
            weights = [self._weight(place.replace("qkv_proj", f"{x}_proj")) for x in "qkv"]
            rows = sum(weight.stored.n_rows for weight in weights)
            return self._joined(weights, (rows, weights[0].stored.n_columns))
        weight = self._weight(place, sharded=True)
        shape, n_rows = weight.stored.shape, weight.stored.n_rows
        if weight.group == n_rows:
            return self._joined([weight], shape)
        # One after the other stand the rows of each rank that the model was trained on: its share
        # of query, of key and of value.
        shares = [n // (n_rows // weight.group) for n in self._qkv_rows(weight)]
        starts = [0, shares[0], shares[0] + shares[1]]
        runs = tuple(
            Run(weight, rank + start, rank + start + share)
            for start, share in zip(starts, shares, strict=True)
            for rank in range(0, n_rows, weight.group)
        )
        return Tensor(shape, weight.type, runs)

    def _qkv_rows(self, weight: Weight) -> tuple[int, int, int]:
        n_head, n_kv, width, v_width = (
            _number(self.config, key, self.folder)
            for key in ("num_attention_heads", "swa_num_key_value_heads", "head_dim", "v_head_dim")
        )
        rows = (n_head * width, n_kv * width, n_kv * v_width)
        if sum(rows) != weight.stored.n_rows:
            self._unfit(weight, f"[{sum(rows)}, columns]")
        return rows

    def _joined(self, weights: list[Weight], shape: Shape) -> Tensor:
        """Put whole weights one below the other."""
        first = weights[0]
        for weight in weights:
            if weight.type != first.type or weight.stored.n_columns != first.stored.n_columns:
                self._unfit(weight, f"rows like those of {first.stored.name}")
        runs = tuple(Run(weight, 0, weight.stored.n_rows) for weight in weights)
        if sum(run.last for run in runs) != prod(shape[:-1]):
            self._unfit(first, "the same shape in all of its kind")
        return Tensor(shape, first.type, runs)

    def _unfit(self, weight: Weight, wanted: str) -> None:
        raise ModelFileError(
            f"{self.folder} has {weight.stored.name} as {list(weight.stored.shape)} of "
            f"{weight.stored.dtype}, where {wanted} is needed. Download it again."
        )

    # --- scales -----------------------------------------------------------------------------------

    def _weight(self, place: str, *, sharded: bool = False) -> Weight:
        """Find a tensor and, if it is FP8, its scales; ``sharded``: see `_qkv`."""
        stored = self.checkpoint.tensor(place)
        if stored.dtype not in TYPES:
            raise ModelFileError(
                f"{self.folder} has {stored.name} as {stored.dtype}, which this release cannot "
                "read. Take the BF16 or FP8 checkpoint."
            )
        if not stored.dtype.startswith("F8"):
            return Weight(stored, group=stored.n_rows)
        for suffix in ("_scale_inv", "_scale"):
            if place + suffix in self.checkpoint:
                return self._scaled(stored, self.checkpoint.tensor(place + suffix), sharded)
        raise ModelFileError(
            f"{self.folder} has {stored.name} in FP8 and lacks {stored.name}_scale_inv. Download "
            "the missing files."
        )

    def _scaled(self, stored: StoredTensor, scale: StoredTensor, sharded: bool) -> Weight:
        """Find out from the shape of the scales what each of them is for."""
        n_rows, n_columns = stored.n_rows, stored.n_columns
        if prod(scale.shape) == 1:
            return Weight(stored, scales_of(scale), (n_rows, n_columns), n_rows)
        if scale.shape in ((n_rows,), (*stored.shape[:-1], 1)):  # one for each row
            each = scales_of(scale).reshape(n_rows, 1)
            return Weight(stored, each, (1, n_columns), n_rows)
        block = self._block_size()
        group = stored.shape[-2] if len(stored.shape) > 1 else 1
        if sharded:
            group = self._rows_per_rank(stored, scale.n_rows, block[0])
        n_blocks = n_rows // group * -(-group // block[0])
        if (scale.n_rows, scale.n_columns) != (n_blocks, -(-n_columns // block[1])):
            raise ModelFileError(
                f"{self.folder} has {scale.name} as {list(scale.shape)}, which does not fit "
                f"{stored.name} with {list(stored.shape)} in blocks of {list(block)}. "
                "Download both again."
            )
        return Weight(stored, scales_of(scale), (block[0], min(block[1], n_columns)), group)

    def _block_size(self) -> tuple[int, int]:
        how = self.config.get("quantization_config")
        size = how.get("weight_block_size") if isinstance(how, dict) else None
        size = [128, 128] if size is None else size
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(type(n) is int and 0 < n < 2**31 for n in size)
        ):
            raise ModelFileError(
                f"{self.folder / 'config.json'} has weight_block_size = {size!r}, where two "
                "numbers are needed. Download it again."
            )
        return size[0], size[1]

    def _rows_per_rank(self, stored: StoredTensor, n_scales: int, block: int) -> int:
        """Return the rows after which a matrix of several ranks starts anew; all if it has one.

        Where the blocks of a rank end at its last row, one rank and several have equally many; the
        models that llama.cpp knows then have several.
        """
        for ranks in (8, 4):
            rows, rest = divmod(stored.n_rows, ranks)
            if not rest and ranks * -(-rows // block) == n_scales:
                if any(n % ranks for n in self._qkv_rows(Weight(stored))):
                    continue
                return rows
        return stored.n_rows


# --- vocabulary and metadata ----------------------------------------------------------------------


def _vocabulary(folder: Path, base: Gguf) -> dict[str, bytes]:
    """Return the base's list of tokens if the folder's, where it has one, is the same.

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


def _per_layer(
    config: Mapping[str, Any], family: Family, base: Gguf, n_heads: int
) -> dict[str, bytes]:
    """Return the head's own values of what the base says for each layer."""
    metadata = {}
    for name, values in family.arrays(config, base.heads.start, n_heads).items():
        key = f"{family.arch}.{name}"
        if key not in base.metadata:
            continue
        if any(value is None for value in values):
            raise ModelFileError(
                f"The checkpoint's config.json does not say what {key} is for the head. "
                "Download it again."
            )
        metadata[key] = entry(key, values)
    return metadata
