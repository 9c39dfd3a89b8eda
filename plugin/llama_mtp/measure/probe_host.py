"""Ask the installed host whether it can set up a file's NextN head, and what that takes.

A child process makes the objects that a user would make, stock and with MTP, but loads every model
with ``no_alloc``: the host reads the header, sizes weights and caches without allocating them, and
builds the graphs of a load, so that a file of any size is answered in the time that its vocabulary
takes. (Recurrent state is the exception: the host allocates it even then.) Its log is the answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import LlamaMtpError
from . import child

CONTEXTS = ("plain", "target", "draft")
"""In the order in which the child makes them: stock, then the two of an object with MTP."""

_NEW_CONTEXT = "llama_context: constructing llama_context"
_LINES = re.compile(
    r"(?P<part>KV|RS|state|compute|output) +buffer size = +(?P<mib>[0-9.]+) MiB"
    r"|^llama_kv_cache: size = +(?P<cache>[0-9.]+) MiB"
    r"|unused tensor .* \(size = (?P<unused>[0-9]+) bytes\)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Answer:
    """What the host said.

    Attributes:
        sizes: bytes by context and part, such as ``"draft KV"``; contexts are those of
            :data:`CONTEXTS`, parts those of ``Llama.spec_memory``, rounded by the host to
            hundredths of a MiB per buffer, and ``unused``: the tensors that the load of the
            context's model left out, to the byte.
        reason: why the head cannot be set up, in the host's own words; empty if it can.
        host: version of the llama-cpp-python that answered; empty if it died.
        seconds: wall time of the child.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    host: str = ""
    seconds: float = 0.0


def ask_host(
    path: str | os.PathLike[str],
    *,
    n_ctx: int,
    depth: int,
    timeout: float = 60.0,
    options: Mapping[str, Any] | None = None,
) -> Answer:
    """Let a child set up the GGUF at `path`, stock and with MTP.

    Args:
        n_ctx: tokens of context.
        depth: most drafts a round.
        timeout: seconds after which the child is ended.
        options: further keyword arguments of ``Llama``, in types that JSON knows.

    Raises:
        LlamaMtpError: no child can be started.
    """
    question = {"path": os.fspath(path), "n_ctx": n_ctx, "depth": depth, "options": options or {}}
    reply = child.ask(__name__, question, timeout=timeout)
    if reply.answer is None:
        return Answer(
            reason=f"it {reply.fate}, last words: {reply.last_words}", seconds=reply.seconds
        )
    reason, host = reply.answer["reason"], reply.answer["host"]
    if reason:
        return Answer(reason=reply.complaint or reason, host=host, seconds=reply.seconds)
    return Answer(context_sizes(reply.log), host=host, seconds=reply.seconds)


def context_sizes(log: str) -> dict[str, int]:
    """Read bytes by context and part off a log in which the contexts were made in order."""
    sizes: dict[str, int] = {}

    def add(name: str, n_bytes: float) -> None:
        sizes[name] = sizes.get(name, 0) + round(n_bytes)

    sections = log.split(_NEW_CONTEXT)  # each ends with the load of the next one's model, if any
    for i, section in enumerate(sections[: len(CONTEXTS) + 1]):
        allocated = False
        for line in _LINES.finditer(section):
            if line["unused"]:
                if i < len(CONTEXTS):
                    add(f"{CONTEXTS[i]} unused", int(line["unused"]))
            elif line["part"] == "KV":
                allocated = True  # a dummy of no size; the next line tells
            elif line["cache"]:
                # Of a cache that is another context's, too, but nothing was allocated for it.
                add(f"{CONTEXTS[i - 1]} KV", allocated * float(line["cache"]) * 2**20)
                allocated = False
            else:
                add(f"{CONTEXTS[i - 1]} {line['part']}", float(line["mib"]) * 2**20)
    return sizes


# --- in the child ---------------------------------------------------------------------------------


def _answer(path: str, n_ctx: int, depth: int, options: dict[str, Any]) -> dict[str, str]:
    from .. import host
    from ..llama import Llama

    host.simulate_loading()
    os.environ["LLAMA_MTP_ALLOW_UNTESTED"] = "1"  # the host is asked, not our table
    stock = {k: v for k, v in options.items() if not k.startswith("spec_")}
    # The log is what we are here for.
    common: dict[str, Any] = {"n_ctx": n_ctx, "verbose": True}
    reason = ""
    try:
        plain = Llama(path, spec_type="none", **common, **stock)
        mtp = Llama(path, spec_type="draft-mtp", spec_draft_n_max=depth, **common, **options)
        mtp.close()
        plain.close()
    except (LlamaMtpError, ValueError, RuntimeError) as error:
        reason = str(error)
    return {"host": host.version(), "reason": reason}


if __name__ == "__main__":
    child.serve(_answer)
