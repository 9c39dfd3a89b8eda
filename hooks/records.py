"""The records that travel between llama-mtp and a plugin.

All are frozen: a plugin reads them, and answers with a record or a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class SpecSettings:
    """What one `Llama` object was set up with; the same for all of its rounds.

    Attributes:
        spec_type: the resolved name, never an alias.
        n_max: most tokens that a draft may have.
        p_min: a drafter that knows its confidence stops below this probability; 0 never stops.
        n_ctx: context length in tokens.
        n_vocab: a token id is in ``range(n_vocab)``.
    """

    spec_type: str
    n_max: int
    p_min: float
    n_ctx: int
    n_vocab: int


@dataclass(frozen=True, eq=False)
class DraftRequest:
    """What a round asks a drafter: which tokens may follow these?

    Attributes:
        tokens: int32, shape (n,), read-only: the whole context, the last emitted token included.
            A view that is valid during the call only; copy what must be kept.
        n_max: most tokens that this round can use, at least 1.
    """

    tokens: npt.NDArray[np.int32]
    n_max: int


@dataclass(frozen=True)
class Draft:
    """A drafter's answer: token ids in order. Empty means no draft: the round is a plain decode.

    Tokens past the request's ``n_max`` are cut off; a token id outside the vocabulary ends the
    draft there.
    """

    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Verdict:
    """How one round ended.

    Attributes:
        n_drafted: tokens proposed.
        n_accepted: tokens that the target agreed with.
        n_emitted: tokens that the consumer took, the correction or bonus included.
        target_ns: nanoseconds in the target's decode.
        draft_ns: nanoseconds in the drafter.
    """

    n_drafted: int
    n_accepted: int
    n_emitted: int
    target_ns: int
    draft_ns: int


class Drafter(Protocol):
    """A source of drafts. One object serves one `Llama`, from one thread at a time."""

    def draft(self, request: DraftRequest) -> Draft:
        """Propose up to ``request.n_max`` tokens that may follow ``request.tokens``.

        Called once per round. A wrong draft costs time, never the text: the target decides.
        """
        ...


@dataclass(frozen=True)
class SpecType:
    """A named source of drafts, for ``Llama(..., spec_type=name)``.

    Attributes:
        name: what the user types; no comma and no white space.
        factory: makes the drafter of one `Llama`; None if the native engine drafts itself.
        needs_head: the model file must hold an executable NextN head.
        aliases: other names for it.
    """

    name: str
    factory: Callable[[SpecSettings], Drafter] | None
    needs_head: bool = False
    aliases: tuple[str, ...] = ()
