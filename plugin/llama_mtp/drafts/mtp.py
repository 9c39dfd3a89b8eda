"""``draft-mtp``: drafts from the model's own NextN head, driven by the native engine."""

from __future__ import annotations

from collections.abc import Callable

from ..hooks import SpecType, hookimpl


@hookimpl
def mtp_register_spec_types(register: Callable[[SpecType], None]) -> None:
    """Register ``draft-mtp``, alias ``mtp``."""
    register(SpecType("draft-mtp", None, needs_head=True, aliases=("mtp",)))
