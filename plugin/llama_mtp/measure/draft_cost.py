"""What of a file's weights one row reads: where memory bounds decoding, that is what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..gguf.header import TensorInfo
from ..gguf.model import Gguf, block_of
from ..heads.architectures import OWN_OUTPUT
from ..heads.check import HeadReport

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


def reads(target: HeadReport, head: HeadReport) -> Reads | None:
    """Reckon from the headers of a model and of the file with its head; None without a head."""
    file = head.file
    if not file.declared or head.shares_kv:
        return None
    first = f"blk.{file.declared.start}."
    block = {t.name.removeprefix(first): t for t in file.in_blocks(file.declared[:1])}
    own = block.pop(OWN_OUTPUT, None)
    output = _size(own or file.output or target.file.output)
    return Reads(
        token=token_bytes(target.file),
        step=_read(file, block.values()) + output,
        output=output,
        own_output=own is not None,
    )


def token_bytes(model: Gguf) -> int:
    """Bytes of weights that a decode of one row by the trunk reads."""
    trunk = [
        t
        for t in model.tensors.values()
        if block_of(t.name)[0] not in model.declared and t is not model.output
    ]
    return _read(model, trunk) + _size(model.output)


def _read(file: Gguf, tensors: Iterable[TensorInfo]) -> int:
    total, experts = 0, 0
    for tensor in tensors:
        if "_exps." in tensor.name:
            experts += _size(tensor)
        elif not tensor.name.endswith(_TABLES):
            total += _size(tensor)
    used, count = file.number("expert_used_count") or 0, file.number("expert_count") or 0
    return total + (experts * used // count if count else experts)


def _size(tensor: TensorInfo | None) -> int:
    return (tensor.n_bytes or 0) if tensor is not None else 0
