"""Generate the C source of `llama_mtp._native` from the public header.

`include/llama_mtp.h` is header, cdef and documentation at once: what stands between its
`// cdef-begin` and `// cdef-end` lines is handed to cffi, and the generated wrapper includes the
same header, so the compiler checks every declaration against what Python will believe.

Usage: python ffi_build.py HEADER OUT.c
"""

import os
import re
import sys
from pathlib import Path

from cffi import FFI

_SPAN = re.compile(r"^// cdef-begin.*?$(.*?)^// cdef-end", re.DOTALL | re.MULTILINE)


def cdef(header: Path) -> str:
    """The declarations between the two markers, without the export macro."""
    spans = _SPAN.findall(header.read_text(encoding="utf-8"))
    if not spans:
        raise SystemExit(f"{header}: no span between `// cdef-begin` and `// cdef-end` lines")
    return "\n".join(spans).replace("LLAMA_MTP_API ", "")


def main(header: Path, out: Path) -> None:
    ffi = FFI()
    ffi.cdef(cdef(header))
    # The generated unit stays C: C++ there has known rough edges.
    ffi.set_source("llama_mtp._native", '#include "llama_mtp.h"', py_limited_api=True)
    temporary = out.with_suffix(".tmp")
    ffi.emit_c_code(str(temporary))
    os.replace(temporary, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
