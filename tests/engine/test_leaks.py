"""Objects give back what they took, measured in a process of its own; a planted leak is caught."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ModelFactory

ROUNDS = 40
SMALL = 65_536  # bytes of growth over all rounds: less than one leaked session

SCRIPT = """
import ctypes, gc, sys
from itertools import islice
from llama_mtp import Llama
from llama_mtp.engine.native import ffi

path, planted = sys.argv[1], sys.argv[2] == "planted"

class MallInfo(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = MallInfo

def in_use():
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd

def once(seed):
    llm = Llama(path, n_ctx=512, n_threads=1, n_threads_batch=1, spec_type="draft-mtp",
                spec_adaptive=False, seed=seed, verbose=False)
    for _ in islice(llm.generate([300, 301, 302] * 80, temp=0.8), 40):
        pass
    if planted:
        llm._session._handle = ffi.NULL  # nobody frees the native session now
    llm.close()

for i in range(15):  # caches of Python and the host fill up first
    once(i)
before = in_use()
for i in range({rounds}):
    once(i)
print(in_use() - before)
"""


needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts bytes in glibc's allocator"
)


def growth(path: Path, mode: str) -> int:
    script = textwrap.dedent(SCRIPT).replace("{rounds}", str(ROUNDS))
    out = subprocess.run(
        [sys.executable, "-c", script, str(path), mode], capture_output=True, text=True, check=True
    )
    return int(out.stdout.split()[-1])


@needs_glibc
@pytest.mark.parametrize("arch", ["qwen35", "mimo2"])
def test_a_closed_object_leaves_nothing(model: ModelFactory, arch: str) -> None:
    assert growth(model(arch).path, "clean") < SMALL


@needs_glibc
def test_a_planted_leak_is_caught(model: ModelFactory) -> None:
    assert growth(model("qwen35").path, "planted") > 10 * SMALL
