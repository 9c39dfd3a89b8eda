"""What of a file's weights one row reads: where memory bounds decoding, that is what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..gguf.header import Header, TensorInfo
from .forecast import Source

OWN_OUTPUT = "nextn.shared_head_head.weight"
"""Of a NextN block: an output matrix that this head alone reads."""

_TABLES = ("token_embd.weight", "nextn.embed_tokens.weight")  # of which one row is read


@dataclass(frozen=True)
class Reads:
    """Bytes of weights; of a MoE layer's experts the part that a row uses.

    Attributes:
        token: a decode of one row by the trunk.
        step: a draft step by one head.
        output: of that, the output matrix.
        own_output: that matrix is the head's own.
    """

    token: int
    step: int
    output: int
    own_output: bool

    @property
    def share(self) -> float:
        """What a draft step costs, in decodes of one row."""
        return self.step / self.token if self.token else 0.0


def reads(target: Source, head: Source) -> Reads | None:
    """Reckon from the headers of a model and of the file with its head; None without a head."""
    if not head.head_layers or head.report.shares_kv:
        return None
    prefix = f"blk.{head.head_layers.start}."
    block = {t.name.removeprefix(prefix): t for t in head.head if t.name.startswith(prefix)}
    own = block.pop(OWN_OUTPUT, None)
    output = _size(own or output_matrix(head.header) or output_matrix(target.header))
    return Reads(
        token=token_bytes(target),
        step=_read(head, block.values()) + output,
        output=output,
        own_output=own is not None,
    )


def token_bytes(target: Source) -> int:
    """Bytes of weights that a decode of one row by the trunk reads."""
    output, heads = output_matrix(target.header), {tensor.name for tensor in target.head}
    tensors = target.header.tensors.items()
    trunk = [t for name, t in tensors if name not in heads and t is not output]
    return _read(target, trunk) + _size(output)


def output_matrix(header: Header) -> TensorInfo | None:
    """The trunk's output matrix, which may be its table of embeddings; None if there is none."""
    return header.tensors.get("output.weight") or header.tensors.get("token_embd.weight")


def _read(source: Source, tensors: Iterable[TensorInfo]) -> int:
    total, experts = 0, 0
    for tensor in tensors:
        if "_exps." in tensor.name:
            experts += _size(tensor)
        elif not tensor.name.endswith(_TABLES):
            total += _size(tensor)
    used, count = source.number("expert_used_count"), source.number("expert_count")
    return total + (experts * used // count if count else experts)


def _size(tensor: TensorInfo | None) -> int:
    return (tensor.n_bytes or 0) if tensor is not None else 0
