"""The native module, opened and checked. The only module that imports it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .._version import __version__
from ..errors import BusyError, ClosedError, HostVersionError, NativeError, RollbackRefused

try:
    from .._native import ffi, lib
except ImportError as e:  # a source tree on sys.path, or a wheel for another platform
    raise NativeError(
        f"The native engine is not built ({e}); install the package with `pip install .`."
    ) from e

if (built := ffi.string(lib.mtp_version()).decode()) != __version__:
    raise NativeError(
        f"The native engine is of version {built}, the package {__version__}; reinstall llama-mtp."
    )

__all__ = ["check", "compare_vocabularies", "ffi", "lib", "open_session"]

_EXCEPTIONS: dict[int, type[Exception]] = {
    lib.MTP_INVALID: NativeError,
    lib.MTP_ABI: HostVersionError,
    lib.MTP_HOST: NativeError,
    lib.MTP_ROLLBACK: RollbackRefused,
    lib.MTP_BUSY: BusyError,
    lib.MTP_NO_MEMORY: MemoryError,
    lib.MTP_EXCEPTION: NativeError,
}


def check(status: int, handle: Any) -> None:
    """Turn a status into the exception that belongs to it; ``MTP_OK`` passes."""
    if status == lib.MTP_OK:
        return
    if handle == ffi.NULL:
        raise ClosedError()
    if status == lib.MTP_BUSY:
        raise BusyError()
    raise _EXCEPTIONS[status](ffi.string(lib.mtp_session_error(handle)).decode())


def function_names() -> list[str]:
    """Names of the host functions that the engine calls, in the order in which it takes them."""
    names = iter(lib.mtp_host_function(i) for i in itertools.count())
    return [ffi.string(name).decode() for name in itertools.takewhile(bool, names)]


def _pointers(addresses: Mapping[str, int]) -> Any:
    ordered = (addresses[name] for name in function_names())
    return ffi.new("void *[]", [ffi.cast("void *", address) for address in ordered])


def compare_vocabularies(
    addresses: Mapping[str, int],
    layout: dict[str, int],
    a: int,
    b: int,
    tokens: npt.NDArray[np.int32] | None = None,
) -> str | None:
    """Say where two ``llama_vocab`` (addresses) part; None when they have the same tokens.

    With ``tokens``, token i of ``b`` has to have the text of token ``tokens[i]`` of ``a``.
    """
    text = ffi.new("char[256]")
    status = lib.mtp_compare_vocabularies(
        _pointers(addresses),
        len(addresses),
        ffi.new("struct mtp_host_layout *", layout),
        ffi.cast("void *", a),
        ffi.cast("void *", b),
        ffi.NULL if tokens is None else ffi.from_buffer("int32_t[]", tokens),
        0 if tokens is None else len(tokens),
        text,
        len(text),
    )
    return None if status == lib.MTP_OK else ffi.string(text).decode("utf-8", "replace")


def open_session(
    addresses: Mapping[str, int], layout: dict[str, int], params: dict[str, Any]
) -> Any:
    """Open a native session; its owner closes it with ``mtp_session_close``."""
    out, text = ffi.new("mtp_session **"), ffi.new("char[256]")
    status = lib.mtp_session_open(
        _pointers(addresses),
        len(addresses),
        ffi.new("struct mtp_host_layout *", layout),
        ffi.new("struct mtp_session_params *", params),
        out,
        text,
        len(text),
    )
    if status != lib.MTP_OK:
        raise _EXCEPTIONS[status](ffi.string(text).decode())
    return out[0]
