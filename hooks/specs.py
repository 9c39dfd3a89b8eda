"""The hook specifications, in the order in which they fire.

A hook that decides stops at the first answer that is not None. A hook that observes returns
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
    """Observe that a `Llama` with a spec type was made and is ready."""


# ---- in every round -----------------------------------------------------------------------------


@hookspec(firstresult=True)
def mtp_choose_depth(request: DraftRequest) -> int | None:
    """Decide how many tokens the coming round drafts; 0 makes it a plain decode.

    Called before the draft. The first answer that is not None wins and is cut to
    ``request.n_max``; with no answer the built-in depth policy decides.
    """


@hookspec
def mtp_round_finished(verdict: Verdict) -> None:
    """Observe that a round is over: its drafts were verified, and those rejected taken back."""


# ---- when a model is closed ---------------------------------------------------------------------


@hookspec
def mtp_session_closed(settings: SpecSettings) -> None:
    """Observe that the `Llama` which was opened with these settings was closed."""
