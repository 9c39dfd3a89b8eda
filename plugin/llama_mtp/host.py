"""The host: what we take from ``llama_cpp`` at run time, and the contexts we make through it.

The only module that imports ``llama_cpp``. Everything that depends on the host's version is here:
the version guard, the table of function addresses, the layout of the struct passed by value, and
the parameters of the draft context.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import re
from typing import Any

import llama_cpp as _package
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals
from llama_cpp import _logger
from llama_cpp import llama_cpp as C
from llama_cpp.llama import Llama as StockLlama
from llama_cpp.llama import LlamaRAMCache, LlamaState, LogitsProcessorList
from llama_cpp.llama_tokenizer import LlamaTokenizer as StockTokenizer
from packaging.version import Version

from .errors import HostVersionError, NativeError

__all__ = [
    "DRAFT_UBATCH",
    "BufferSizes",
    "C",
    "LlamaRAMCache",
    "LlamaState",
    "LogitsProcessorList",
    "StockLlama",
    "StockTokenizer",
    "address_of",
    "address_of_sampler",
    "address_table",
    "architecture",
    "batch_layout",
    "check_version",
    "cpu_count",
    "draft_context",
    "draft_model",
    "internals",
    "keeps_everything",
    "load_memory",
    "logits_row",
    "memory_end",
    "memory_is_sound",
    "plan_anew",
    "pointer_to",
    "rows_with_logits",
    "save_memory",
    "tokenizer",
    "version",
    "vocabulary_of",
]

_OLDEST = (0, 3, 36)

# Rows that a draft context computes at a time. Its compute buffer is proportional to them, and one
# block reads a prompt hardly slower in so small parts: tests/bench/figures/catch_up.py. A round of
# drafts, which has a row more than what it verified, goes in one part however deep it is.
DRAFT_UBATCH = 64

# In the memory of the processor the host lays tensors out in steps of 32 bytes, half a cache line.
_ROWS_A_STEP = 32 // 4  # indices of rows with logits, int32, that fill one

# llama-ext.h is not extern "C": plain name, Itanium ABI, MSVC ABI.
_MANGLED = {
    "llama_set_embeddings_nextn": (
        "_Z26llama_set_embeddings_nextnP13llama_contextbb",
        "?llama_set_embeddings_nextn@@YAXPEAUllama_context@@_N1@Z",
    ),
    "llama_get_embeddings_nextn": (
        "_Z26llama_get_embeddings_nextnP13llama_context",
        "?llama_get_embeddings_nextn@@YAPEAMPEAUllama_context@@@Z",
    ),
    "llama_get_embeddings_nextn_ith": (
        "_Z30llama_get_embeddings_nextn_ithP13llama_contexti",
        "?llama_get_embeddings_nextn_ith@@YAPEAMPEAUllama_context@@H@Z",
    ),
    "llama_set_nextn_layer_offset": (
        "_Z28llama_set_nextn_layer_offsetP13llama_contexti",
        "?llama_set_nextn_layer_offset@@YAXPEAUllama_context@@H@Z",
    ),
}

_MODEL_FIELDS = ("load_mtp",)
_CONTEXT_FIELDS = ("ctx_type", "ctx_other", "n_rs_seq", "n_outputs_max", "type_k", "type_v")


def version() -> str:
    """Return the version of the installed llama-cpp-python."""
    return str(_package.__version__)


def check_version() -> None:
    """Raise HostVersionError unless the host has what MTP needs."""
    release = Version(version()).release  # a release candidate has what the release has
    lacking = [f for f in _MODEL_FIELDS if not hasattr(C.llama_model_params, f)]
    lacking += [f for f in _CONTEXT_FIELDS if not hasattr(C.llama_context_params, f)]
    if release < _OLDEST or lacking:
        raise HostVersionError(
            f"llama-cpp-python {version()} cannot run NextN heads"
            + (f" (no {', '.join(lacking)})" if lacking else "")
            + "; install llama-cpp-python >= 0.3.36."
        )


def address_of(name: str) -> int:
    """Return the address of a host function; HostVersionError when the library has none."""
    for spelling in (name, *_MANGLED.get(name, ())):
        try:
            function = getattr(C._lib, spelling)
        except AttributeError:
            continue
        return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
    raise HostVersionError(
        f"The host library has no {name}; install a llama-cpp-python release that this plugin "
        "supports (>= 0.3.36)."
    )


def address_table(names: list[str]) -> dict[str, int]:
    """Return name -> address for every function the native engine asks for."""
    return {name: address_of(name) for name in names}


def batch_layout() -> dict[str, int]:
    """Return sizes and offsets (bytes) of the structs passed by value, as the host sees them."""
    batch = C.llama_batch
    layout = {name: getattr(batch, name).offset for name, _ in batch._fields_}
    layout["batch_size"] = ctypes.sizeof(batch)
    layout["chain_params_size"] = ctypes.sizeof(C.llama_sampler_chain_params)
    return layout


def cpu_count() -> int:
    """Return the thread count that the stock class gives to batches."""
    return multiprocessing.cpu_count()


def address_of_sampler(chain: Any) -> int:
    """Return the address of the ``llama_sampler`` chain inside an ``internals.LlamaSampler``."""
    return int(ctypes.cast(chain.sampler, ctypes.c_void_p).value or 0)


def memory_end(context: Any) -> int:
    """Return the position after the last one that sequence 0 of a context holds."""
    return int(C.llama_memory_seq_pos_max(context.memory, 0)) + 1


def memory_is_sound(context: Any) -> bool:
    """Whether the positions of sequence 0 are such that later calls can remove all of them."""
    first = int(C.llama_memory_seq_pos_min(context.memory, 0))
    return memory_end(context) == 0 if first < 0 else memory_end(context) <= context.n_ctx()


def keeps_everything(context: Any) -> bool:
    """Whether sequence 0 still reaches back to position 0 (sliding windows move on)."""
    return int(C.llama_memory_seq_pos_min(context.memory, 0)) <= 0


def offloads(context: Any) -> bool:
    """Whether layers of the context's model may be on a device other than the CPU."""
    return bool(context.model.params.n_gpu_layers) and bool(C.llama_supports_gpu_offload())


def architecture(llama: Any) -> str:
    """Return the model's architecture, by the name that GGUF files and saved states use."""
    name = ctypes.create_string_buffer(64)
    C.llama_model_meta_val_str(llama._model.model, b"general.architecture", name, len(name))
    return name.value.decode()


def pointer_to(data: npt.NDArray[np.uint8]) -> Any:
    """Return the ``uint8_t *`` of an array that the caller keeps alive."""
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def save_memory(context: Any) -> bytes:
    """Return the memory of a context as the host writes it; NativeError when it does not."""
    size = int(C.llama_state_get_size(context.ctx))
    data = np.empty(size, dtype=np.uint8)
    written = int(C.llama_state_get_data(context.ctx, pointer_to(data), size))
    if not 0 < written <= size:
        raise NativeError("The host failed to copy the state of a context.")
    return data[:written].tobytes()


def load_memory(context: Any, data: bytes | memoryview) -> bool:
    """Replace the memory of a context by what the host wrote; False when it refuses the bytes.

    It clears the memory before it looks at most of them.
    """
    array = np.frombuffer(data, dtype=np.uint8)  # the host only reads: no copy
    return int(C.llama_state_set_data(context.ctx, pointer_to(array), len(array))) == len(array)


def logits_row(context: Any, row: int, n_vocab: int) -> npt.NDArray[np.single]:
    """Copy one live row of logits, float32 of shape (n_vocab,)."""
    pointer = C.llama_get_logits_ith(context.ctx, row)
    logits: npt.NDArray[np.single] = np.ctypeslib.as_array(pointer, shape=(n_vocab,)).copy()
    return logits


class BufferSizes(contextlib.AbstractContextManager["BufferSizes"]):
    """Collects the buffer sizes that the host reports while something is made, in bytes.

    Parts are the host's own words: ``KV``, ``RS``, ``state``, ``compute``, ``output``, and so are
    devices: ``CPU``, ``CUDA0``, ``CUDA_Host``. Its log lines go on to where they went before.
    """

    _LINE = re.compile(r"(\S+) +(KV|RS|state|compute|output) +buffer size = +([0-9.]+) MiB")

    def __init__(self) -> None:
        self.by_device: dict[tuple[str, str], int] = {}  # (part, device)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by part, over all devices."""
        parts: dict[str, int] = {}
        for (part, _), size in self.by_device.items():
            parts[part] = parts.get(part, 0) + size
        return parts

    def __enter__(self) -> BufferSizes:
        def listen(level: int, text: bytes, user_data: Any) -> None:
            for device, part, size in self._LINE.findall(text.decode("utf-8", "replace")):
                held = self.by_device.get((part, device), 0)
                self.by_device[part, device] = held + round(float(size) * 2**20)
            _logger.llama_log_callback(level, text, user_data)

        self._listen = C.llama_log_callback(listen)  # the host keeps the pointer only
        C.llama_log_set(self._listen, ctypes.c_void_p(0))
        return self

    def __exit__(self, *_: object) -> None:
        C.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def plan_anew(context: Any) -> None:
    """Have the host plan its compute buffers again, before its next decode.

    To be called where hidden rows have been switched on: the host made its plan without them and
    keeps it while the graph's shape is the same, which is so for deepseek4. Their memory then goes
    to whatever is computed after them, and the rows that one reads are something else. Of the calls
    that make the host plan anew, clearing the control vector is the one in its C interface.
    """
    C.llama_set_adapter_cvec(context.ctx, None, 0, 0, 0, 0)


def rows_with_logits(wanted: int, *, recurrent: bool) -> int:
    """Return the ``n_outputs_max`` to ask for where ``wanted`` rows are needed: a few more, or not.

    Their indices stand in the compute buffer before what is computed (ggml-impl.h:
    TENSOR_ALIGNMENT). Where they end in the middle of a cache line, every tensor after them starts
    there, and with AVX512 a prompt took 4 % (BF16) to 14 % (Q4_0) longer. The input that only a
    recurrent memory has (llama-graph.cpp: s_copy) shifts them by half a line once more.
    """
    steps = -(-wanted // _ROWS_A_STEP)
    even = (steps + recurrent) % 2 == 0
    return wanted if even else steps * _ROWS_A_STEP + 1


def draft_model(path: str, params: Any, *, verbose: bool) -> Any:
    """Load a NextN head that is a model of its own, with the target's ``llama_model_params``.

    Raises ValueError when the host cannot load it.
    """
    mine = type(params).from_buffer_copy(params)
    mine.load_mtp = True
    mine.kv_overrides = type(mine.kv_overrides)()  # they are about the target's metadata
    mine.tensor_buft_overrides = type(mine.tensor_buft_overrides)()  # and these about its tensors
    return internals.LlamaModel(path_model=path, params=mine, verbose=verbose)


def tokenizer(path: str) -> Any:
    """Load the vocabulary of a file alone: an ``internals.LlamaModel`` without weights.

    Raises ValueError when the host cannot load it.
    """
    params = C.llama_model_default_params()
    params.vocab_only = True
    return internals.LlamaModel(path_model=path, params=params, verbose=False)


def draft_context(
    target: Any,
    params: Any,
    *,
    n_ubatch: int,
    model: Any | None = None,
    shares_kv: bool = False,
    all_outputs: bool = False,
    type_k: int | None,
    type_v: int | None,
    verbose: bool,
) -> Any:
    """Make the draft context from the target's own model: no tensor is loaded twice.

    It follows the target's ``llama_context_params`` (n_ctx, n_batch, threads, offload, flash
    attention, rope) and differs where MTP needs it to: one output, no snapshots, fewer rows at a
    time, its own KV types (default: the host's default, F16). Being an ``internals.LlamaContext``
    it is freed before its model whatever order Python drops things in.

    Args:
        n_ubatch: most rows that are computed at a time, never more than the target's; the compute
            buffer is proportional to it.
        model: a second model that holds the head; default: the target's.
        shares_kv: the head reads the target's KV cache and takes its types.
        all_outputs: every row of a decode may be an output.

    Raises ValueError when the host refuses to make it.
    """
    mine = type(params).from_buffer_copy(params)
    defaults = C.llama_context_default_params()
    mine.n_ctx = C.llama_n_ctx(target.ctx)
    mine.n_ubatch = min(n_ubatch, mine.n_ubatch)
    mine.ctx_type = C.LLAMA_CONTEXT_TYPE_MTP
    mine.ctx_other = target.ctx if shares_kv else None
    mine.n_seq_max = 1
    mine.n_rs_seq = 0
    mine.n_outputs_max = mine.n_batch if all_outputs else 1
    mine.n_outputs_max_per_seq = mine.n_outputs_max
    mine.embeddings = False
    if not shares_kv:
        mine.type_k = defaults.type_k if type_k is None else type_k
        mine.type_v = defaults.type_v if type_v is None else type_v
    return internals.LlamaContext(model=model or target.model, params=mine, verbose=verbose)


def vocabulary_of(model: Any) -> int:
    """Return the address of the ``llama_vocab`` of an ``internals.LlamaModel``."""
    return int(ctypes.cast(C.llama_model_get_vocab(model.model), ctypes.c_void_p).value or 0)
