"""Reads the MTP head out of an HF checkpoint, as tensors that llama.cpp knows.

`families` says what the checkpoint calls each tensor; here the tensors are found, checked against
the model that they are to be joined to, and described: every one as runs of rows of the
checkpoint's own tensors, which are read, converted and put one below the other only while the
joined file is written. BF16, F16 and F32 stay what they are, FP8 becomes BF16, and what llama.cpp
wants in F32 (norms, biases, routers) becomes that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from ...errors import ModelFileError
from ...gguf.metadata import entry
from ...gguf.model import Gguf, StrPath, block_of
from ...gguf.types import F32
from ...gguf.write import TensorSource
from ..source import HeadSource
from .config import Config
from .families import FAMILIES, Family, Part, family_of, parts_of
from .safetensors import Checkpoint, StoredTensor
from .vocabulary import shared_vocabulary
from .weights import TYPES, Run, Shape, Tensor, Weight, scales_of, to_f32, to_f32_and_one, transpose

# What the host reads in F32 besides vectors and norms.
_ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "indexer.proj.weight")
_SAME = "Take the head from the checkpoint that this model was made from."


def read_head(folder: StrPath, base: Gguf) -> HeadSource:
    """Find the MTP head of an HF checkpoint, for the model ``base``.

    Only headers are read here; the tensors' data is when their chunks are asked for.

    Raises:
        ModelFileError: the folder is no checkpoint, is damaged or incomplete; it has no head; its
            family is not known; or it is another model than ``base``.
    """
    folder = Path(folder)
    config = Config(folder)
    family = family_of(config)
    if family is None:
        known = ", ".join(dict.fromkeys(model for f in FAMILIES for model in f.models))
        raise ModelFileError(
            f"{folder} is a checkpoint of {config.get('architectures')}, whose head this release "
            f"cannot read; it knows {known}. Convert it with llama.cpp and graft from that file."
        )
    _check_model(folder, config, family, base)
    reader = _Reader(Checkpoint(folder), config, family)
    n_heads = reader.count_heads()
    reader.require(n_heads)
    tensors = [
        tensor.source(f"blk.{head}.{name}")
        for head in range(n_heads)
        for name, tensor in reader.block(head)
    ]
    _check_shapes(folder, tensors, base)
    n_vocab = config.number("vocab_size")
    if n_vocab <= base.n_tokens < n_vocab + family.vocab_multiple:
        n_vocab = base.n_tokens  # filled up when it was converted
    return HeadSource(
        architecture=family.arch,
        n_heads=n_heads,
        n_embd=config.number("hidden_size"),
        tensors=tuple(tensors),
        origin=folder.resolve().name,
        files=tuple(folder.iterdir()),
        metadata=_per_layer(config, family, base, n_heads) | shared_vocabulary(folder, base),
        n_vocab=n_vocab,
    )


# --- the model that the head is to be joined to ---------------------------------------------------


def _check_model(folder: Path, config: Config, family: Family, base: Gguf) -> None:
    """Raise unless config.json describes the base."""
    pairs = {
        "architecture": (family.arch, base.architecture),
        "number of layers": (config.n_layers, base.heads.start),
        "hidden size": (config.number("hidden_size"), base.number("embedding_length")),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ModelFileError(
                f"{folder} and {base.path} are not the same model: the {what} is {theirs} there "
                f"and {ours} here. {_SAME}"
            )
    parts = {block_of(tensor.name)[1] for tensor in base.trunk_tensors}
    if "attn_kv_b.weight" in parts and "attn_k_b.weight" not in parts:
        raise ModelFileError(
            f"{base.path} was converted before llama.cpp split attn_kv_b, and no head fits it any "
            "more. Convert or download the model again."
        )


def _check_shapes(folder: Path, tensors: Sequence[TensorSource], base: Gguf) -> None:
    """Raise unless the tensors have the shapes of their like in the trunk, where there is one."""
    there: dict[str, set[Shape]] = {}
    for tensor in base.trunk_tensors:
        there.setdefault(block_of(tensor.name)[1], set()).add(_trimmed(tensor.shape))
    for source in tensors:
        wanted = there.get(block_of(source.name)[1])
        if wanted and _trimmed(source.shape) not in wanted:
            raise ModelFileError(
                f"{folder} has {source.name} with the dimensions {_times(source.shape)}, where "
                f"{base.path} needs {' or '.join(map(_times, sorted(wanted)))}. {_SAME}"
            )


def _per_layer(config: Config, family: Family, base: Gguf, n_heads: int) -> dict[str, bytes]:
    """Return the head's own values of what the base says for each layer."""
    values = family.arrays(config, base.heads.start, n_heads)
    arrays = {f"{family.arch}.{name}": array for name, array in values.items()}
    arrays = {key: array for key, array in arrays.items() if key in base.metadata}
    for key, array in arrays.items():
        if None in array:
            raise ModelFileError(
                f"The checkpoint's config.json does not say what {key} is for the head. "
                "Download it again."
            )
    return {key: entry(key, array) for key, array in arrays.items()}


def _trimmed(shape: Shape) -> Shape:
    """Leave out ones at the end."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))


# --- from names to tensors ------------------------------------------------------------------------


class _Reader:
    """Finds the tensors of a checkpoint's NextN blocks by the table of its family."""

    def __init__(self, checkpoint: Checkpoint, config: Config, family: Family) -> None:
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.config = config
        self.family = family
        self.parts = parts_of(family.parts)
        self.choices = [[parts_of(table) for table in ways] for ways in family.choices]

    def count_heads(self) -> int:
        """Return how many heads there are: as config.json says, or as are found."""
        name = self.parts["attn_norm.weight"].ways[0].name
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

    def require(self, n_heads: int) -> None:
        """Raise ModelFileError naming all files of the heads that are missing."""
        # A config can claim any number of heads; the second that is not there ends the reading.
        heads = range(min(n_heads, 64))
        self.checkpoint.require(tuple({self._place(self.family.place, head) for head in heads}))

    def block(self, head: int) -> Iterator[tuple[str, Tensor]]:
        """Yield name (without ``blk.N.``) and tensor of everything that one head has.

        Raises:
            ModelFileError: a tensor is missing, or cannot be what the table says.
        """
        parts = dict(self.parts)
        for ways in self.choices:
            there = (way for way in ways if self._found(next(iter(way.values())), head))
            parts |= next(there, ways[0])
        for name, part in parts.items():
            if found := self._found(part, head):
                yield name, self._tensor(name, *found, head)
            elif not part.optional:
                raise self._missing(self._place(part.ways[0].name, head))

    def _place(self, template: str, head: int, expert: int = 0) -> str:
        layer = self.config.n_layers + head
        for field, value in (("layer", layer), ("head", head), ("e", expert)):
            template = template.replace(f"{{{field}}}", str(value))
        return template

    def _found(self, part: Part, head: int) -> tuple[str, str] | None:
        """Return how a tensor is made, and the template of its name; None if it is not there."""
        for how, template in part.ways:
            name = self._place(template, head)
            apart = how == "qkv" and name.replace("qkv_proj", "q_proj") in self.checkpoint
            if apart or name in self.checkpoint:
                return how, template
        return None

    def _missing(self, name: str) -> ModelFileError:
        stem = name.removesuffix("weight")
        packed = (stem + suffix for suffix in ("qweight", "weight_packed", "blocks"))
        if found := next((name for name in packed if name in self.checkpoint), ""):
            return ModelFileError(
                f"{self.folder} has the MTP head in a packed format ({found}), which this "
                "release cannot read. Take the BF16 or FP8 checkpoint."
            )
        return ModelFileError(
            f"{self.folder} lacks {name} of its MTP head. Download the missing files, or take the "
            "original checkpoint; a fine-tuned one often comes without a head."
        )

    def _tensor(self, name: str, how: str, template: str, head: int) -> Tensor:
        place = self._place(template, head)
        if how == "experts":
            return self._experts(template, head)
        if how == "qkv":
            return self._qkv(place)
        weight = self._weight(place)
        if how in ("k_b", "v_b"):
            return self._half_of_kv_b(weight, how == "k_b")
        if how in ("gate_half", "up_half"):
            return self._half_of_experts(weight, how == "gate_half")
        shape, runs = _trimmed(weight.stored.shape), (Run(weight, 0, weight.stored.n_rows),)
        norm = name.endswith("norm.weight")
        if norm or len(shape) <= 1 or not name.endswith(".weight") or name in _ALWAYS_F32:
            convert = to_f32_and_one if norm and self.family.norms_less_one else to_f32
            return Tensor(shape, F32, runs, convert)
        return Tensor(shape, weight.type, runs)

    def _experts(self, template: str, head: int) -> Tensor:
        """Stack the experts of one projection."""
        weights: list[Weight] = []
        while (place := self._place(template, head, len(weights))) in self.checkpoint:
            weights.append(self._weight(place))
        keys = ("n_routed_experts", "num_experts", "num_local_experts")
        declared = [n for key in keys if type(n := self.config.get(key)) is int]
        if declared and len(weights) < declared[0]:
            raise ModelFileError(f"{self.folder} lacks {place}. Download the missing files.")
        return self._joined(weights, (len(weights), *weights[0].stored.shape))

    def _half_of_experts(self, weight: Weight, upper: bool) -> Tensor:
        """Take gate or up out of ``[experts, gate and up, columns]``."""
        shape = weight.stored.shape
        if len(shape) != 3 or shape[1] % 2:
            raise self._unfit(weight, "[experts, 2 n, columns]")
        n_experts, n_rows, n_columns = shape
        half = n_rows // 2
        starts = [e * n_rows + (0 if upper else half) for e in range(n_experts)]
        runs = tuple(Run(weight, start, start + half) for start in starts)
        return Tensor((n_experts, half, n_columns), weight.type, runs)

    def _half_of_kv_b(self, weight: Weight, key: bool) -> Tensor:
        """Take the heads' keys, each transposed, or their values, out of MLA's kv_b."""
        names = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
        n_head, n_key, n_value = map(self.config.number, names)
        both = n_key + n_value
        if len(weight.stored.shape) != 2 or weight.stored.n_rows != n_head * both:
            raise self._unfit(weight, f"[{n_head} x {both}, columns]")
        rank, heads = weight.stored.n_columns, range(0, n_head * both, both)
        if key:
            runs = tuple(Run(weight, h, h + n_key) for h in heads)
            return Tensor((n_head, rank, n_key), weight.type, runs, transpose, whole=True)
        runs = tuple(Run(weight, h + n_key, h + both) for h in heads)
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
        n_q, n_k, n_v = (n // (n_rows // weight.group) for n in self._qkv_rows(weight.stored))
        runs = tuple(
            Run(weight, rank + start, rank + start + share)
            for start, share in ((0, n_q), (n_q, n_k), (n_q + n_k, n_v))
            for rank in range(0, n_rows, weight.group)
        )
        return Tensor(shape, weight.type, runs)

    def _qkv_rows(self, stored: StoredTensor) -> tuple[int, int, int]:
        keys = ("num_attention_heads", "swa_num_key_value_heads", "head_dim", "v_head_dim")
        n_head, n_kv, width, v_width = map(self.config.number, keys)
        rows = (n_head * width, n_kv * width, n_kv * v_width)
        if sum(rows) != stored.n_rows:
            raise self._unfit(Weight(stored), f"[{sum(rows)}, columns]")
        return rows

    def _joined(self, weights: list[Weight], shape: Shape) -> Tensor:
        """Put whole weights one below the other."""
        first = weights[0]
        for weight in weights:
            if weight.type != first.type or weight.stored.n_columns != first.stored.n_columns:
                raise self._unfit(weight, f"rows like those of {first.stored.name}")
        runs = tuple(Run(weight, 0, weight.stored.n_rows) for weight in weights)
        if sum(run.last for run in runs) != prod(shape[:-1]):
            raise self._unfit(first, "the same shape in all of its kind")
        return Tensor(shape, first.type, runs)

    def _unfit(self, weight: Weight, wanted: str) -> ModelFileError:
        return ModelFileError(
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
            return Weight(stored, scales_of(scale).reshape(-1, 1), (1, n_columns), n_rows)
        block = self.config.block_size
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

    def _rows_per_rank(self, stored: StoredTensor, n_scales: int, block: int) -> int:
        """Return the rows after which a matrix of several ranks starts anew; all if it has one.

        Where the blocks of a rank end at its last row, one rank and several have equally many; the
        models that llama.cpp knows then have several.
        """
        for ranks in (8, 4):
            rows, rest = divmod(stored.n_rows, ranks)
            fits = not rest and ranks * -(-rows // block) == n_scales
            if fits and not any(n % ranks for n in self._qkv_rows(stored)):
                return rows
        return stored.n_rows
