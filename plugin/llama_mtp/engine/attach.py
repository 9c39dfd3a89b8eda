"""Making a session for a stock object that is loaded: draft model, draft context, capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host
from ..errors import SpecTypeError
from .native import compare_vocabularies, function_names
from .session import Session
from .setup import Setup
from .watch import watch


@dataclass(frozen=True)
class DraftOptions:
    """How the draft context is made.

    Attributes:
        model_path: the head's own file; None where the model has the head.
        type_k, type_v: ggml types of its KV cache; None: the target's.
    """

    model_path: str | None
    type_k: int | None
    type_v: int | None


def attach(llama: Any, setup: Setup, options: DraftOptions) -> tuple[Session, host.BufferSizes]:
    """Open a session beside a loaded stock ``Llama``; also the sizes of what the draft takes.

    Raises SpecTypeError where the head's own file does not belong to the model.
    """
    draft, sizes = None, host.BufferSizes()
    if setup.spec.needs_head:
        with sizes:
            model = _draft_model(llama, setup, options.model_path)
            draft = host.draft_context(
                llama._ctx,
                llama.context_params,
                # a round of drafts, a row more than what it verified, goes in one part
                n_ubatch=max(host.DRAFT_UBATCH, setup.depth + 2),
                model=model,
                shares_kv=setup.shares_kv,
                all_outputs=setup.all_outputs,
                type_k=options.type_k,
                type_v=options.type_v,
                verbose=llama.verbose,
            )
    session = Session(llama._ctx, draft, setup)
    if draft is not None:
        host.plan_anew(llama._ctx)  # the session has asked it for hidden rows
    watch(llama._ctx, session, llama.context_params.n_outputs_max)
    return session, sizes


def _draft_model(llama: Any, setup: Setup, path: str | None) -> Any | None:
    """Load the head's own file, freed with the target's model; None where that has the head."""
    if path is None:
        return None
    model = host.draft_model(path, llama.model_params, verbose=llama.verbose)
    llama._model._exit_stack.callback(model.close)
    widths = [host.n_embd_out(m) for m in (llama._model, model)]
    if widths[0] != widths[1]:
        raise SpecTypeError(
            f"The head in {path} reads hidden rows of {widths[1]} floats, and the model has "
            f"{widths[0]}. Pass the head that was made for this model."
        )
    if difference := _different_vocabulary(llama._model, model, setup):
        raise SpecTypeError(
            f"The head in {path} has another vocabulary than the model: {difference}. "
            "Pass the head that was made for this model."
        )
    return model


def _different_vocabulary(target: Any, draft: Any, setup: Setup) -> str | None:
    """Say where the vocabularies of two ``LlamaModel`` part; None when they are the same."""
    tokens: npt.NDArray[np.int32] | None = setup.draft_tokens
    if setup.stand_ins is not None and len(setup.stand_ins) != target.n_vocab():
        return f"one has {target.n_vocab()} tokens, the other is for {len(setup.stand_ins)}"
    return compare_vocabularies(
        host.address_table(function_names()),
        host.batch_layout(),
        host.vocabulary_of(target),
        host.vocabulary_of(draft),
        tokens,
    )
