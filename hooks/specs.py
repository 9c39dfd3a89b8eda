"""The hook specifications, in the order in which they fire.

A decision hook stops at the first answer that is not None; an observer is told and answers
nothing. Each is called at most once per round, never per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import hookspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from .records import DraftRequest, SpecSettings, SpecType, Verdict


# ---- when the spec types are looked up ----------------------------------------------------------


@hookspec
def mtp_register_spec_types(register: Callable[[SpecType], None]) -> None:
    """Offer spec types: call ``register(SpecType(...))`` once for each.

    Called whenever a name is resolved, so it must be cheap and always register the same. A name
    that is taken, reserved (``auto``, ``none``) or malformed is reported with the plugin's name,
    and none of that plugin's spec types is used.
    """


# ---- when a model is loaded ---------------------------------------------------------------------


@hookspec
def mtp_session_opened(settings: SpecSettings) -> None:
    """A `Llama` with a spec type was constructed and is ready."""


# ---- in every round -----------------------------------------------------------------------------


@hookspec(firstresult=True)
def mtp_choose_depth(request: DraftRequest) -> int | None:
    """Decide how many tokens the coming round drafts; 0 makes it a plain decode.

    Called before the draft. The first answer that is not None wins and is cut to
    ``request.n_max``; with no answer the built-in depth policy decides.
    """


@hookspec
def mtp_round_finished(verdict: Verdict) -> None:
    """A round was settled: drafted, verified, and rolled back to the tokens that were emitted."""


# ---- when a model is closed ---------------------------------------------------------------------


@hookspec
def mtp_session_closed(settings: SpecSettings) -> None:
    """The `Llama` whose session was opened with these settings was closed."""
