"""Put the drop-in `Llama` where code that is not edited will find it."""

from __future__ import annotations

import sys
from typing import Any

_replaced: list[dict[str, Any]] = []  # namespaces of the modules in which install() put ours


def install() -> None:
    """Make :class:`llama_mtp.Llama` what ``llama_cpp.Llama`` names, here and in loaded modules.

    LangChain and the stock server look the class up when they need it. LlamaIndex did ``from
    llama_cpp import Llama`` when it was imported: a module in which ``Llama`` is the stock class
    gets the drop-in too. Under another name the stock class stays within reach. Doing it twice is
    the same as doing it once.
    """
    from .host import StockLlama
    from .llama import Llama

    for name, module in list(sys.modules.items()):
        # Not getattr: it would make lazy modules import things.
        namespace = getattr(module, "__dict__", {})
        if name.partition(".")[0] != __package__ and namespace.get("Llama") is StockLlama:
            namespace["Llama"] = Llama
            _replaced.append(namespace)


def uninstall() -> None:
    """Put the stock class back, whether or not :func:`install` was called."""
    from .host import StockLlama
    from .llama import Llama

    while _replaced:
        namespace = _replaced.pop()
        if namespace.get("Llama") is Llama:
            namespace["Llama"] = StockLlama
