"""What an installation consists of, and whether the parts fit together."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from ._version import __version__
from .errors import LlamaMtpError


@dataclass(frozen=True)
class Finding:
    """One line of the report; `detail` says what to do where `ok` is false."""

    ok: bool
    what: str
    detail: str


def findings() -> Iterator[Finding]:
    """Yields the versions, the host's library, and the functions found in it. Never raises."""
    yield Finding(True, "python", f"{platform.python_version()} on {platform.machine()}")
    yield Finding(True, "llama-mtp", __version__)
    for what, look in (
        ("llama-cpp-python", _host_version),
        ("host library", _host_library),
        ("native engine", _engine),
        ("host functions", _functions),
    ):
        try:
            yield Finding(True, what, look())
        except (LlamaMtpError, ImportError, OSError, AttributeError) as error:
            yield Finding(False, what, str(error))
    yield Finding(True, "processor cores", str(default_threads()))


def default_threads() -> int:
    """All the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_version() -> str:
    from . import host

    host.check_version()
    return host.version()


def _host_library() -> str:
    from .host import C

    offload = "can" if C.llama_supports_gpu_offload() else "cannot"
    return f"{C._lib._name} ({offload} offload to a GPU here)"


def _engine() -> str:
    from . import _engine

    return f"built for {__version__}, {len(_engine.api_names())} host functions wanted"


def _functions() -> str:
    from . import _engine, host

    missing: list[str] = []
    names = _engine.api_names()
    for name in names:
        try:
            host.address_of(name)
        except LlamaMtpError:
            missing.append(name)
    if missing:
        raise LlamaMtpError(
            f"not found: {', '.join(missing)}; install a supported llama-cpp-python (>= 0.3.36)."
        )
    return f"all {len(names)} found"
