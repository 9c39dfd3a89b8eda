"""A family's model opened three times: in stock, in ours, and in a naive drafter."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import COMMON

import models
from llama_mtp import Llama, host
from llama_mtp.heads.architectures import ARCHITECTURES
from llama_mtp.host import C
from models.families import FAMILIES
from models.families.common import Files
from models.reference import Reference

DEPTH = 3
# Small batches: a prompt takes several, so that the draft context catches up in several steps.
OPTIONS: dict[str, Any] = {**COMMON, "n_batch": 32, "n_ubatch": 16}

CASES = [(arch, n) for arch in FAMILIES for n in range(1, FAMILIES[arch].max_heads + 1)]


@dataclass(frozen=True)
class Round:
    """What the engine gave to the target in one decode."""

    history: tuple[int, ...]  # up to the last emitted token, which the decode begins with
    drafts: tuple[int, ...]
    unknown: tuple[int, ...]  # positions that the draft context got without their hidden row
    draft_rows: int  # that the draft context decoded since the round before


@dataclass
class Watch:
    """Stands between the engine and the host's ``llama_decode``, and keeps the rounds."""

    rounds: list[Round] = field(default_factory=list)
    unknown: set[int] = field(default_factory=set)
    draft_rows: int = 0
    llama: Any = None

    def address_table(self, names: list[str]) -> dict[str, int]:
        table = {name: host.address_of(name) for name in names}
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, C.llama_batch)
        decode = prototype(table["llama_decode"])

        def watched(context: int, batch: Any) -> int:
            if context == self.llama._ctx.ctx:
                self._keep(batch)
            else:
                self._look_at_rows(batch)
            return int(decode(context, batch))

        self._watched = prototype(watched)  # the engine has its address only
        return {**table, "llama_decode": ctypes.cast(self._watched, ctypes.c_void_p).value or 0}

    def _keep(self, batch: Any) -> None:
        end = self.llama.n_tokens - batch.pos[0]  # of the emitted tokens, in the batch
        if 0 < end <= batch.n_tokens:  # else older rows once more, for checkpoint rollback
            history = tuple(self.llama._input_ids.tolist())
            unknown = tuple(p for p in self.unknown if 0 < p < len(history))
            drafts = tuple(batch.token[end : batch.n_tokens])
            self.rounds.append(Round(history, drafts, unknown, self.draft_rows))
            self.draft_rows = 0

    def _look_at_rows(self, batch: Any) -> None:
        n = batch.n_tokens
        self.draft_rows += n
        width = C.llama_model_n_embd_out(self.llama._model.model)
        rows = np.ctypeslib.as_array(batch.embd, shape=(n, width))
        for pos, row in zip(batch.pos[:n], rows, strict=True):
            (self.unknown.discard if row.any() else self.unknown.add)(pos)


@dataclass(frozen=True)
class Case:
    """A family's model in a stock object, in ours, and in a naive drafter."""

    arch: str
    files: Files
    depth: int
    stock: Any
    ours: Any
    watch: Watch
    reference: Reference

    def prompt(self, n: int, seed: int = 0) -> list[int]:
        rng = np.random.default_rng(seed)
        return [int(t) for t in rng.integers(models.FIRST_WORD, models.N_VOCAB, n)]

    def check_drafts(self, rounds: Sequence[Round], depth: int | None = None) -> None:
        """Compare what was drafted in these rounds, ``depth`` tokens, with the naive drafter.

        Whatever was cut before, every token stands in the draft context with its true hidden row.
        """
        assert rounds
        for a_round in rounds:
            assert a_round.unknown == ()
            if self.rests and not a_round.drafts:
                continue
            assert list(a_round.drafts) == self.reference.drafts(
                a_round.history, self.depth if depth is None else depth
            )

    @property
    def rests(self) -> bool:
        """Whether a round may go without drafts: checkpoint rollback catches up with its replay."""
        return ARCHITECTURES[self.arch].rollback == "checkpoint"


@contextmanager
def opened(
    arch: str, n_heads: int, folder: Path, window: int | None = 0, **more: Any
) -> Iterator[Case]:
    """Write a family's model, and open it three times."""
    files = FAMILIES[arch].build(folder, n_heads, 1)
    options = {**OPTIONS, **more}
    apart = {"spec_draft_model": str(files.draft)} if files.draft else {}
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "address_table", watch.address_table)
        patch.setenv("LLAMA_MTP_PREFILL_WINDOW", "" if window is None else str(window))
        ours = Llama(
            str(files.path),
            spec_type="draft-mtp",
            spec_adaptive=False,
            spec_draft_n_max=DEPTH,
            spec_draft_type_k=0,
            spec_draft_type_v=0,
            **apart,
            **options,
        )
    watch.llama = ours
    depth = min(DEPTH, n_heads) if n_heads > 1 else DEPTH
    with (
        closing(ours),
        closing(llama_cpp.Llama(str(files.path), **options)) as stock,
        closing(Reference(files)) as reference,
    ):
        yield Case(arch, files, depth, stock, ours, watch, reference)
