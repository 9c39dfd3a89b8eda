"""All that can be said about a GGUF and MTP before it is loaded: what it holds, whether the
installed host can run it, what it will cost, and what to do next.

The header answers most of it in milliseconds (:func:`inspect_file` with ``probe=False``); the rest
is asked of the host in a child process, without loading weights (:func:`ask`).
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..gguf.header import TensorInfo
from ..gguf.model import Gguf, StrPath
from ..gguf.types import type_name
from ..heads.architectures import ARCHITECTURES, Rollback
from ..heads.check import HeadReport, check_head
from ..heads.narrow import usual_size
from .draft_cost import Reads, reads
from .forecast import Forecast, forecast
from .probe_host import ask_host

Verdict = Literal["run", "pair", "graft", "find", "none"]
"""``run``: as it is. ``pair``: beside the file that it belongs to. ``graft``: once joined with what
it lacks. ``find``: with another file. ``none``: not at all."""

N_CTX, DEPTH = 4096, 3


@dataclass(frozen=True)
class Quantisation:
    """Bytes by tensor type, the largest first."""

    bytes_by_type: Mapping[str, int]

    @property
    def main(self) -> str:
        """The type that most bytes are in; empty if there are no tensors."""
        return next(iter(self.bytes_by_type), "")

    @property
    def n_bytes(self) -> int:
        return sum(self.bytes_by_type.values())


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_file` found.

    Attributes:
        path: the file, or the first part.
        draft_model: the file with the head, if it is one of its own.
        n_parts: files that the model is split into.
        file_size: bytes of all parts.
        name: what the file calls itself; may be empty.
        architecture: ``general.architecture``; empty if the file does not say.
        n_layer_trunk: layers without the NextN blocks.
        n_heads: NextN blocks that the file declares.
        n_embd, n_vocab: width of the hidden rows, and tokens of the vocabulary.
        n_ctx_train: tokens of context that the model was trained on.
        present: tensors of the NextN blocks that are there.
        missing: tensors that the head needs and the file lacks.
        head, trunk: in which types the two are stored.
        rollback: how the trunk forgets rejected tokens (see `llama_mtp.heads.architectures`).
        shares_kv: the head reads another model's KV cache.
        untested: no release of this package has run the architecture's head.
        reason, remedy: why the head does not run, and what to do; empty if it does.
        host: version of the llama-cpp-python that was asked; empty if none was.
        host_runs: whether it set the head up; None if it was not asked.
        probe_seconds: how long asking took.
        forecast: memory that MTP will add; None where there is nothing to run.
        reads: bytes of weights that a token and a draft step read; None where no head does.
        verdict, next_command: what to do, and what to type for it.
        cheaper_command: what writes a head that reads less; empty where that saves little.
    """

    path: str
    draft_model: str | None
    n_parts: int
    file_size: int
    name: str
    architecture: str
    n_layer_trunk: int
    n_heads: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    present: tuple[str, ...]
    missing: tuple[str, ...]
    head: Quantisation
    trunk: Quantisation
    rollback: Rollback
    shares_kv: bool
    untested: bool
    reason: str
    remedy: str
    forecast: Forecast | None
    reads: Reads | None
    verdict: Verdict
    next_command: str
    cheaper_command: str
    host: str = ""
    host_runs: bool | None = None
    probe_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as ``llama-mtp inspect --json`` prints them; sizes in bytes."""
        plain = asdict(self)
        for part in ("head", "trunk"):
            plain[part]["main"] = getattr(self, part).main
        if self.forecast is not None:
            plain["forecast"] = {
                "source": self.forecast.source,
                "n_ctx": self.forecast.n_ctx,
                "depth": self.forecast.depth,
                "parts": self.forecast.parts,
                "total": self.forecast.total,
                "complete": self.forecast.complete,
            }
        return plain


def inspect_file(
    path: Gguf | StrPath,
    *,
    draft_model: Gguf | StrPath | None = None,
    n_ctx: int = N_CTX,
    depth: int = DEPTH,
    probe: bool = True,
    timeout: float = 60.0,
    options: Mapping[str, Any] | None = None,
) -> Inspection:
    """Say what the GGUF at `path` holds, whether its head runs here, and what that costs.

    Args:
        path: the file, or the first part of a split one.
        draft_model: a file that holds the head by itself.
        n_ctx: tokens of context to forecast memory for.
        depth: most drafts a round, likewise.
        probe: ask the installed host too, in a child process that loads no weights; without it the
            forecast is arithmetic on the header, compute buffers unknown.
        timeout: seconds that the child may take.
        options: further keyword arguments of ``Llama`` to forecast for, such as ``n_gpu_layers``.

    Raises:
        ModelFileError: a file is unreadable, no GGUF, damaged or truncated.
        LlamaMtpError: no child can be started.
    """
    target = check_head(path)
    head = target if draft_model is None else check_head(draft_model, target=target)
    inspection = _from_headers(target, head, n_ctx, depth)
    return ask(inspection, timeout=timeout, options=options) if probe else inspection


def ask(
    inspection: Inspection, *, timeout: float = 60.0, options: Mapping[str, Any] | None = None
) -> Inspection:
    """Return the inspection with the host's answer in it; unchanged where there is no question."""
    expected = inspection.forecast
    if expected is None:
        return inspection
    own: dict[str, Any] = {}
    if inspection.draft_model is not None:
        own["spec_draft_model"] = inspection.draft_model
    answer = ask_host(
        inspection.path,
        n_ctx=expected.n_ctx,
        depth=expected.depth,
        timeout=timeout,
        options={**(options or {}), **own},
    )
    asked = replace(
        inspection,
        host=answer.host,
        host_runs=not answer.reason,
        probe_seconds=round(answer.seconds, 3),
    )
    if not answer.reason:
        layers = (options or {}).get("n_gpu_layers", 0)
        more = f" --n-gpu-layers {layers}" if layers else ""
        return replace(
            asked,
            forecast=expected.told(answer.sizes),
            next_command=inspection.next_command + more,
        )
    return replace(
        asked,
        reason=f"the installed host does not set it up: {answer.reason.rstrip('.')}.",
        remedy="Convert or download the file again, or install another llama-cpp-python.",
        forecast=None,
        verdict="none" if inspection.untested else "find",
        next_command="llama-mtp plugins" if inspection.untested else "llama-mtp inspect OTHER.gguf",
    )


def _from_headers(target: HeadReport, head: HeadReport, n_ctx: int, depth: int) -> Inspection:
    file, alone = target.file, head is not target
    tensors = head.file.in_blocks(head.file.declared)
    names = set() if alone else {tensor.name for tensor in tensors}
    verdict, next_command = _advice(target, head)
    if verdict == "run" and depth != DEPTH:  # doctor is to try what was asked about
        next_command += f" --depth {depth}"
    read = reads(target, head) if head.executable else None
    worth_asking = head.executable or (head.untested and not head.missing)
    return Inspection(
        path=str(file.path),
        draft_model=str(head.file.path) if alone else None,
        n_parts=len(file.parts),
        file_size=file.file_size,
        name=file.text("general.name"),
        architecture=target.architecture,
        n_layer_trunk=target.n_layer_trunk,
        n_heads=head.n_heads,
        n_embd=target.n_embd,
        n_vocab=file.n_tokens,
        n_ctx_train=target.n_ctx_train,
        present=tuple(sorted(tensor.name for tensor in tensors)),
        missing=head.missing,
        head=_quantisation(tensors),
        trunk=_quantisation(t for t in file.tensors.values() if t.name not in names),
        rollback=target.rollback,
        shares_kv=head.shares_kv,
        untested=head.untested,
        reason=head.reason,
        remedy=head.remedy,
        forecast=forecast(target, head, n_ctx, depth) if worth_asking else None,
        reads=read,
        verdict=verdict,
        next_command=next_command,
        cheaper_command="" if read is None else _cheaper(head, read),
    )


def _quantisation(tensors: Iterable[TensorInfo]) -> Quantisation:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[type_name(tensor.type)] += tensor.n_bytes or 0
    return Quantisation(dict(sizes.most_common()))


def _advice(target: HeadReport, head: HeadReport) -> tuple[Verdict, str]:
    """The verdict, and the command that comes next."""
    file = shlex.quote(str(target.file.path))
    if head is not target:
        own = f"--draft-model {shlex.quote(str(head.file.path))}"
        if head.executable:
            return "run", f"llama-mtp doctor {file} {own}"
        return "find", f"llama-mtp inspect {file} --draft-model OTHER.gguf"
    if head.executable:
        return "run", f"llama-mtp doctor {file}"
    architecture = ARCHITECTURES.get(head.architecture)
    if architecture is None and head.architecture not in _TARGETS:
        return "none", "llama-mtp plugins"  # a spec type of a plugin needs no head
    if architecture is None:
        return "pair", f"llama-mtp inspect {file} --draft-model ASSISTANT.gguf"
    if architecture.shares_kv:
        return "pair", f"llama-mtp inspect TARGET.gguf --draft-model {file}"
    if head.n_heads > 1 and not architecture.chained:
        return "none", "llama-mtp plugins"
    if head.file.in_blocks(head.file.declared) and not head.file.in_blocks(range(1)):
        return "graft", f"llama-mtp graft BASE.gguf {file} -o JOINED.gguf"
    return "graft", f"llama-mtp graft {file} HEAD.gguf -o JOINED.gguf"


def _cheaper(head: HeadReport, read: Reads) -> str:
    """The command that lets a draft step read less, where that saves 3 % of a decode or more."""
    n_vocab = head.file.n_tokens
    left_out = 1 - usual_size(n_vocab) / n_vocab if n_vocab else 0.0
    if head.narrow or left_out * read.output <= 0.03 * read.token:
        return ""
    return f"llama-mtp narrow {shlex.quote(str(head.file.path))}"


_TARGETS = {a.target for a in ARCHITECTURES.values() if a.target}
