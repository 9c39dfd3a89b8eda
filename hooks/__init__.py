"""What a plugin imports: the marker for its hooks, and the records that it gets and returns.

A plugin is an installable package with an entry point in the group ``llama_mtp`` that names a
module. In that module, functions marked with `hookimpl` implement the hooks of
`llama_mtp.hooks.specs`. README.md in this folder has an example that works as it stands.
"""

from __future__ import annotations

import pluggy

# The repository's hooks/ folder is the package llama_mtp.hooks. Imported as `hooks` it would be a
# second package, whose classes and markers are other objects than those of the first.
if __name__ != "llama_mtp.hooks":
    raise ImportError("This package is llama_mtp.hooks. Install llama-mtp and import it as that.")

NAMESPACE = "llama_mtp"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)

from .records import (  # noqa: E402 - specs.py needs the marker above
    Draft,
    Drafter,
    DraftRequest,
    SpecSettings,
    SpecType,
    Verdict,
)

__all__ = [
    "NAMESPACE",
    "Draft",
    "DraftRequest",
    "Drafter",
    "SpecSettings",
    "SpecType",
    "Verdict",
    "hookimpl",
    "hookspec",
]
