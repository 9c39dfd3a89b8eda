"""Put the drop-in `Llama` where code that is not edited will find it."""

from __future__ import annotations

import sys


def install() -> None:
    """Replace ``llama_cpp.Llama`` by :class:`llama_mtp.Llama` for everything imported from now on.

    LangChain, LlamaIndex and the stock server look the class up when they need it; a module that
    did ``from llama_cpp import Llama`` before this call keeps the stock class. Doing it twice is
    the same as doing it once.
    """
    from .llama import Llama

    _put(Llama)


def uninstall() -> None:
    """Put the stock class back, whether or not :func:`install` was called."""
    from .host import StockLlama

    _put(StockLlama)


def _put(cls: type) -> None:
    from .host import StockLlama

    for module in ("llama_cpp", StockLlama.__module__):
        sys.modules[module].Llama = cls  # type: ignore[attr-defined]
