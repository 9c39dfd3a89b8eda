"""Multi-token prediction for the stock llama-cpp-python: several tokens per pass, the same tokens.

Names are loaded when they are first used: importing this package opens no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    BusyError,
    ClosedError,
    HostVersionError,
    LlamaMtpError,
    ModelFileError,
    NativeError,
    SpecTypeError,
    StateError,
)

if TYPE_CHECKING:
    from .engine.stats import SpecStats
    from .install import install, uninstall
    from .llama import Llama

_LAZY = {
    "Llama": ".llama",
    "SpecStats": ".engine.stats",
    "install": ".install",
    "uninstall": ".install",
}

__all__ = [
    "BusyError",
    "ClosedError",
    "HostVersionError",
    "Llama",
    "LlamaMtpError",
    "ModelFileError",
    "NativeError",
    "SpecStats",
    "SpecTypeError",
    "StateError",
    "__version__",
    "install",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
