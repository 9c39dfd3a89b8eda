'''Write a plugin for llama-mtp.

A plugin is an installable package with an entry point in the group ``llama_mtp`` that names a
module. In that module, functions marked with `hookimpl` implement the hooks of
`llama_mtp.hooks.specs`. A new source of drafts takes one of them:

    from llama_mtp.hooks import Draft, SpecType, hookimpl

    class RepeatLast:
        """Bets that the last token comes again."""

        def draft(self, request):
            return Draft([int(request.tokens[-1])] * request.n_max)

    @hookimpl
    def mtp_register_spec_types(register):
        register(SpecType("repeat-last", factory=lambda settings: RepeatLast()))

and in its pyproject.toml

    [project.entry-points.llama_mtp]
    repeat-last = "my_module"

After installation ``Llama(path, spec_type="repeat-last")`` uses it. Whatever a drafter proposes,
the output stays that of the model: the target checks every token.
'''

from __future__ import annotations

import pluggy

# The repository's hooks/ folder is the package llama_mtp.hooks. Imported as a top-level `hooks`, it
# would be a second copy whose classes and markers equal nobody else's.
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
