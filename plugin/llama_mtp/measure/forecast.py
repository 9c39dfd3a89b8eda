"""What MTP will add to the memory of a load, by part.

First from the header alone (`forecast`), which knows the size of every tensor but not of the
buffers that graphs need; then, where the host could be asked, from its own words (`Forecast.told`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

from ..gguf.model import Gguf
from ..heads.check import HeadReport

_N_BATCH = 512  # the stock class's default
_PAD = 256  # llama.cpp pads a context to a multiple of this
_F16, _F32 = 2, 4  # bytes
_CHECKPOINTS = 4  # copies of a recurrent state that an object keeps by default, in at most ...
_COPIES_MOST = 512 * 2**20  # ... this many bytes


@dataclass(frozen=True)
class Forecast:
    """Bytes that MTP adds to the stock load of the same file. None: not known from this source.

    Attributes:
        source: ``"host"``: the installed host set everything up, no weights loaded; ``"header"``:
            arithmetic on the header.
        n_ctx: tokens of context that were asked for.
        depth: most drafts a round.
        head_weights: the tensors that a stock load leaves out; by the header, all of the NextN
            blocks, of which some hosts load a part anyway.
        draft_kv: the draft context's own memory.
        snapshots: what the target's memory grows by, so that it can forget rejected tokens.
        target_compute: change of the target's compute buffer; below zero where it reserves rows
            for fewer outputs than stock does.
        draft_compute: the draft context's compute buffer.
        output: the draft context's output buffer, and the change of the target's.
        rows: hidden rows and logits on their way between the two, from the first round on. Always
            arithmetic: no load reports it.
        copies: copies of the recurrent state, kept near the ends of prompts and, where there are
            no snapshots, for taking drafts back: what they grow to at most.
        n_copies: how many those are.
        own_file: the head is a model of its own.
    """

    source: Literal["host", "header"]
    n_ctx: int
    depth: int
    head_weights: int
    draft_kv: int | None
    snapshots: int | None
    target_compute: int | None
    draft_compute: int | None
    output: int | None
    rows: int
    copies: int | None
    n_copies: int
    own_file: bool

    @property
    def parts(self) -> dict[str, int | None]:
        """Bytes by part."""
        return {
            "head weights": self.head_weights,
            "draft KV": self.draft_kv,
            "snapshots": self.snapshots,
            "target compute": self.target_compute,
            "draft compute": self.draft_compute,
            "output": self.output,
            "rows in flight": self.rows,
            "state copies": self.copies,
        }

    @property
    def total(self) -> int:
        """Bytes of all parts that are known."""
        return sum(size or 0 for size in self.parts.values())

    @property
    def complete(self) -> bool:
        """Whether every part is known."""
        return None not in self.parts.values()

    def told(self, sizes: Mapping[str, int]) -> Forecast:
        """The same forecast on the host's word: `sizes` are those of `probe_host.Answer`."""

        def held(context: str, *parts: str) -> int:
            return sum(sizes.get(f"{context} {part}", 0) for part in parts)

        memory = ("KV", "RS", "state")
        left_out = held("plain", "unused") - held("target", "unused")
        own_file = self.head_weights - held("draft", "unused") if self.own_file else 0
        return replace(
            self,
            source="host",
            head_weights=left_out + own_file,
            draft_kv=held("draft", *memory),
            snapshots=held("target", *memory) - held("plain", *memory),
            target_compute=held("target", "compute") - held("plain", "compute"),
            draft_compute=held("draft", "compute"),
            output=held("target", "output") + held("draft", "output") - held("plain", "output"),
            copies=_copies(held("plain", "RS", "state"), self.n_copies),
        )


def forecast(target: HeadReport, head: HeadReport, n_ctx: int, depth: int) -> Forecast:
    """Forecast from tensor shapes and metadata; compute buffers stay unknown.

    Args:
        target: the check of the model.
        head: that of the file with the NextN blocks: the same, or one of its own.
        n_ctx: tokens of context.
        depth: most drafts a round.
    """
    own_file = head is not target
    tensors = head.file.tensors.values() if own_file else head.file.in_blocks(head.file.declared)
    rollback = target.rollback
    state = 0 if rollback == "attention" else _state(target.file)
    n_copies = {"attention": 0, "snapshots": _CHECKPOINTS, "checkpoint": _CHECKPOINTS + 1}[rollback]
    return Forecast(
        source="header",
        n_ctx=n_ctx,
        depth=depth,
        head_weights=sum(tensor.n_bytes or 0 for tensor in tensors),  # of an unknown type: nothing
        draft_kv=_draft_kv(head, n_ctx),
        snapshots=state and (depth * state if rollback == "snapshots" else 0),
        target_compute=None,
        draft_compute=None,
        output=(head.file.n_tokens or target.file.n_tokens) * _F32,
        rows=_rows(target, head, n_ctx, depth),
        copies=state and _copies(state, n_copies),
        n_copies=n_copies,
        own_file=own_file,
    )


def _draft_kv(head: HeadReport, n_ctx: int) -> int | None:
    """The draft context holds the NextN layers, in half precision, for the padded context."""
    if head.shares_kv:
        return 0
    widths = [_kv_width(head.file, layer) for layer in head.file.declared]
    if not all(widths):
        return None
    return ceil(n_ctx / _PAD) * _PAD * sum(widths) * _F16


def _kv_width(file: Gguf, layer: int) -> int:
    """Numbers that one token puts into the cache of a layer; 0 if the header does not tell."""
    key_length, value_length = (file.number(f"attention.{x}_length") or 0 for x in ("key", "value"))
    if latent := file.shape(f"blk.{layer}.attn_kv_a_mqa.weight")[1]:
        if file.number("attention.key_length_mla"):
            return latent  # keys and values are views of one row
        return (file.number("attention.head_count") or 0) * (key_length + value_length)
    if key := file.shape(f"blk.{layer}.attn_k.weight")[1]:
        return key + (file.shape(f"blk.{layer}.attn_v.weight")[1] or key)
    if fused := file.shape(f"blk.{layer}.attn_qkv.weight")[1]:
        values = file.shape(f"blk.{layer}.attn_output.weight")[0]  # of all query heads
        queries = values // value_length * key_length if value_length else values
        return fused - queries
    return 0


def _copies(state: int, n: int) -> int:
    return min(n * state, _COPIES_MOST)


def _state(model: Gguf) -> int | None:
    """Bytes of the recurrent state, in single precision; None where the header does not tell."""
    convolutions: dict[str, list[tuple[int, ...]]] = {}  # by layer
    for name, tensor in model.tensors.items():
        layer, _, rest = name.partition(".ssm_conv1d")
        if (
            rest.endswith(".weight") and len(tensor.shape) >= 2
        ):  # one, or in delta attention one each for q, k and v
            convolutions.setdefault(layer, []).append(tensor.shape)
    state = (model.number("ssm.state_size") or 0) * (model.number("ssm.inner_size") or 0)
    numbers = 0
    for shapes in convolutions.values():
        channels = [prod(shape[1:]) for shape in shapes]
        numbers += sum((shape[0] - 1) * n for shape, n in zip(shapes, channels, strict=True))
        numbers += (model.number("kda.head_dim") or 0) * channels[0] or state
    return numbers * _F32 or None


def _rows(target: HeadReport, head: HeadReport, n_ctx: int, depth: int) -> int:
    """Hidden rows of a batch, four times, and the logits of the drafts.

    They stand in the output buffers of both contexts, in the queue between them and in the draft's
    batch. A draft context that hands out masked rows keeps one per output, not a batch of them.
    """
    width = target.file.number("embedding_length_out") or target.n_embd
    copies = 3 if head.gathers else 4
    return min(_N_BATCH, n_ctx) * width * _F32 * copies + depth * target.file.n_tokens * _F32
