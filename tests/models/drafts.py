"""What a file's head drafts for one text, at the constant depth 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from llama_mtp import Llama, host
from models.cases import OPTIONS, Watch

N_TOKENS = 24

PROMPT = np.random.default_rng(5).integers(models.FIRST_WORD, models.N_VOCAB, 9).tolist()


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[tuple[Llama, Watch]]:
    """Ours at the constant depth 1, and what it drafts."""
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "address_table", watch.address_table)
        llama = Llama(
            str(path),
            spec_type="draft-mtp",
            spec_adaptive=False,
            spec_draft_n_max=1,
            **OPTIONS,
            **options,
        )
    watch.llama = llama
    with closing(llama):
        yield llama, watch


def text(llama: Any) -> list[int]:
    stream = llama.generate(PROMPT, temp=0.0)
    return [next(stream) for _ in range(N_TOKENS)]


def drafted(path: Path, **options: Any) -> tuple[list[int], dict[int, int]]:
    """The text, and the draft for each of its positions that had one."""
    with opened(path, **options) as (llama, watch):
        tokens = text(llama)
        return tokens, {len(r.history): r.drafts[0] for r in watch.rounds if r.drafts}
