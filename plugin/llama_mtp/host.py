"""The host: what we take from ``llama_cpp`` at run time, and the contexts we make through it.

The only module that imports ``llama_cpp``. Everything that depends on the host's version is here:
the version guard, the table of function addresses, the layout of the struct passed by value, and
the parameters of the draft context.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import multiprocessing
import re
from collections.abc import Sequence
from typing import Any

import llama_cpp as _package
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals
from llama_cpp import llama_cpp as C
from llama_cpp.llama import Llama as StockLlama
from llama_cpp.llama import LlamaRAMCache as LlamaRAMCache
from llama_cpp.llama import LlamaState as LlamaState
from llama_cpp.llama import LogitsProcessorList as LogitsProcessorList
from llama_cpp.llama_chat_format import Jinja2ChatFormatter as Jinja2ChatFormatter
from llama_cpp.llama_tokenizer import LlamaTokenizer as StockTokenizer  # noqa: F401 - for the rest of the package
from packaging.version import Version

from .errors import HostVersionError, NativeError, SpecTypeError

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
        return _address(function)
    raise HostVersionError(
        f"The host library has no {name}; install a llama-cpp-python release that this plugin "
        "supports (>= 0.3.36)."
    )


def address_table(names: Sequence[str]) -> dict[str, int]:
    """Return name -> address for every function that the native engine asks for, in that order."""
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
    return _address(chain.sampler)


def memory_end(context: Any) -> int:
    """Return the position after the last one that sequence 0 of a context holds."""
    return int(C.llama_memory_seq_pos_max(context.memory, 0)) + 1


def memory_is_sound(context: Any) -> bool:
    """Whether the positions of sequence 0 are such that later calls can remove all of them."""
    first = int(C.llama_memory_seq_pos_min(context.memory, 0))
    return memory_end(context) == 0 if first < 0 else memory_end(context) <= context.n_ctx()


def n_embd_out(model: Any) -> int:
    """Return the width of a model's hidden rows, in floats."""
    return int(C.llama_model_n_embd_out(model.model))


def n_rs_seq(context: Any) -> int:
    """Return how many snapshots of its recurrent state a context really keeps."""
    return int(C.llama_n_rs_seq(context.ctx))


def is_end_of_generation(model: Any, token: int) -> bool:
    """Whether the model's vocabulary says that a token ends the text."""
    return bool(C.llama_vocab_is_eog(model.vocab, token))


def can_offload() -> bool:
    """Whether the host was built for a device other than the CPU, and one is here."""
    return bool(C.llama_supports_gpu_offload())


def offloads(context: Any) -> bool:
    """Whether layers of the context's model may be on a device other than the CPU."""
    return bool(context.model.params.n_gpu_layers) and can_offload()


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
        before, data = self._before = _log_callback()

        def listen(level: int, text: bytes, user_data: Any) -> None:
            for device, part, size in self._LINE.findall(text.decode("utf-8", "replace")):
                held = self.by_device.get((part, device), 0)
                self.by_device[part, device] = held + round(float(size) * 2**20)
            if before:
                before(level, text, data)

        self._listen = C.llama_log_callback(listen)  # the host keeps the pointer only
        C.llama_log_set(self._listen, None)
        return self

    def __exit__(self, *_: object) -> None:
        if _address(_log_callback()[0]) == _address(self._listen):  # else somebody set another
            C.llama_log_set(*self._before)


def _log_callback() -> tuple[Any, Any]:
    """Return the callback that the host's log lines go to, and its data."""
    callback, data = C.llama_log_callback(), ctypes.c_void_p()
    C.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _address(pointer: Any) -> int:
    return int(ctypes.cast(pointer, ctypes.c_void_p).value or 0)


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
    attention, rope, KV types) and differs where MTP needs it to: one output, no snapshots, fewer
    rows at a time. Being an ``internals.LlamaContext`` it is freed before its model whatever order
    Python drops things in.

    Args:
        n_ubatch: most rows that are computed at a time, never more than the target's; the compute
            buffer is proportional to it.
        model: a second model that holds the head; default: the target's.
        shares_kv: the head reads the target's KV cache and takes its types.
        all_outputs: every row of a decode may be an output.
        type_k, type_v: ggml types of its KV cache; default: the target's, or the host's own default
            where the host refuses those.

    Raises ValueError when the host refuses to make it.
    """
    mine = type(params).from_buffer_copy(params)
    mine.n_ctx = C.llama_n_ctx(target.ctx)
    mine.n_ubatch = min(n_ubatch, mine.n_ubatch)
    mine.ctx_type = C.LLAMA_CONTEXT_TYPE_MTP
    mine.ctx_other = target.ctx if shares_kv else None
    mine.n_seq_max = 1
    mine.n_rs_seq = 0
    mine.n_outputs_max = mine.n_batch if all_outputs else 1
    mine.n_outputs_max_per_seq = mine.n_outputs_max
    mine.embeddings = False
    asked = not shares_kv and (type_k, type_v) != (None, None)
    if asked:
        mine.type_k = mine.type_k if type_k is None else type_k
        mine.type_v = mine.type_v if type_v is None else type_v
    model = model or target.model
    try:
        return internals.LlamaContext(model=model, params=mine, verbose=verbose)
    except ValueError as e:
        if asked:
            raise SpecTypeError(
                "The host refuses a draft context with these cache types; leave out "
                "spec_draft_type_k and spec_draft_type_v, or pass flash_attn=True with quantized V."
            ) from e
        defaults = C.llama_context_default_params()
        types = (defaults.type_k, defaults.type_v)
        if shares_kv or (mine.type_k, mine.type_v) == types:
            raise
        mine.type_k, mine.type_v = types  # rows of another width may not fill the target's blocks
        return internals.LlamaContext(model=model, params=mine, verbose=verbose)


def vocabulary_of(model: Any) -> int:
    """Return the address of the ``llama_vocab`` of an ``internals.LlamaModel``."""
    return _address(C.llama_model_get_vocab(model.model))


# --- measuring ------------------------------------------------------------------------------------


def twin(llama: StockLlama, **stock: Any) -> StockLlama:
    """Make a stock object on the weights that another object has loaded: a context of its own.

    Its model is as the other one loaded it. One of ours loads the head's tensors too: they are in
    memory, and plain decoding does not read them. Whichever is closed first, the twin's context is
    freed before the model, which only the other object frees.

    Args:
        llama: the object that has the weights.
        stock: arguments of ``llama_cpp.Llama``; those about the model change nothing.

    Raises ValueError when the host refuses to make the context. Not for use while another thread
    loads a model: the stock constructor knows no way to be handed one.
    """
    model = copy.copy(llama._model)
    model._exit_stack = contextlib.ExitStack()
    llama._model._exit_stack.callback(model.close)
    loading = internals.LlamaModel
    internals.LlamaModel = lambda **_: model
    try:
        return StockLlama(llama.model_path, **stock)
    finally:
        internals.LlamaModel = loading


def simulate_loading() -> None:
    """Let every load after this one size the weights and read none. For a process of its own."""
    load = C.llama_model_load_from_file

    def simulated(path: bytes, params: Any) -> Any:
        params.no_alloc = True
        params.load_mode = C.LLAMA_LOAD_MODE_NONE  # on a mapping it would abort
        return load(path, params)

    C.llama_model_load_from_file = simulated


def decode(context: Any, tokens: Sequence[int], position: int) -> None:
    """Decode tokens of sequence 0 from a position on, each with logits; NativeError on failure."""
    batch = C.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, position + i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    status = C.llama_decode(context.ctx, batch)
    C.llama_batch_free(batch)
    if status != 0:
        raise NativeError(f"The host failed to decode {len(tokens)} tokens (status {status}).")


def pick(chain: Any, row: npt.NDArray[np.single], *, accept: bool = False) -> int:
    """Return what a sampler chain chooses from logits of shape (n_vocab,), and accept it or not."""
    data = (C.llama_token_data * len(row))()
    table = np.frombuffer(data, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    table["id"], table["logit"] = np.arange(len(row)), row
    array = C.llama_token_data_array(data=data, size=len(row), selected=-1, sorted=False)
    C.llama_sampler_apply(chain.sampler, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    if accept:
        C.llama_sampler_accept(chain.sampler, token)
    return token


def library_path() -> str:
    """Return the path of the host library."""
    return str(C._lib._name)


def build_flags() -> str:
    """Return what the library was compiled for: processor flags, and those of other backends."""
    flags = C.llama_print_system_info().decode("utf-8", "replace")
    return " ".join(flags.replace(" = 1", "").replace("|", "").split())


def devices() -> list[tuple[str, str, int, int]] | None:
    """Return name, description, free and total bytes of each device that ggml knows.

    None where its registry is in another library (Windows).
    """
    lib = C._lib
    if not hasattr(lib, "ggml_backend_dev_count"):
        return None
    for name, result, arguments in (
        ("count", ctypes.c_size_t, []),
        ("get", ctypes.c_void_p, [ctypes.c_size_t]),
        ("name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("description", ctypes.c_char_p, [ctypes.c_void_p]),
        ("memory", None, [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]),
    ):
        function = getattr(lib, f"ggml_backend_dev_{name}")
        function.restype, function.argtypes = result, arguments
    found = []
    for index in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = (
            look(device).decode("utf-8", "replace")
            for look in (lib.ggml_backend_dev_name, lib.ggml_backend_dev_description)
        )
        found.append((name, description, free.value, total.value))
    return found
