"""A thin layer over the host's low-level API: many sequences a decode, hidden rows with logits."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp_ext

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Trunk:
    """A joined model run without drafting: ``decode`` gives logits and the rows a head is fed."""

    def __init__(
        self, path: Path, *, n_seq: int = 1, n_ctx: int = 2048, n_batch: int = 512, threads: int = 2
    ):
        """Load ``path``. ``n_ctx`` is the room of all sequences together, in tokens."""
        self._ctx = self._model = None
        _quiet()
        llama_cpp.llama_backend_init()
        mparams = llama_cpp.llama_model_default_params()
        mparams.load_mtp = True
        mparams.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), mparams)
        if not self._model:
            raise SystemExit(f"{path} cannot be loaded; join it again.")
        cparams = llama_cpp.llama_context_default_params()
        cparams.n_ctx, cparams.n_seq_max = n_ctx, n_seq
        cparams.n_batch = cparams.n_ubatch = cparams.n_outputs_max = n_batch
        cparams.n_threads = cparams.n_threads_batch = threads
        cparams.kv_unified = False
        self._ctx = llama_cpp.llama_init_from_model(self._model, cparams)
        if not self._ctx:
            raise SystemExit("The host cannot make the context; ask for less n_ctx.")
        llama_cpp_ext.llama_set_embeddings_nextn(self._ctx, True, False)
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_embd = llama_cpp.llama_model_n_embd(self._model)
        self.n_batch = n_batch
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        b = self._batch
        self._token = np.ctypeslib.as_array(b.token, (n_batch,))
        self._pos = np.ctypeslib.as_array(b.pos, (n_batch,))
        self._flag = np.ctypeslib.as_array(b.logits, (n_batch,))
        self._seq = np.zeros(n_batch, dtype=np.int32)
        for i in range(n_batch):
            b.n_seq_id[i] = 1
            b.seq_id[i] = ctypes.cast(self._seq.ctypes.data + 4 * i, ctypes.POINTER(ctypes.c_int32))

    def decode(
        self, token: Ints, pos: Ints, seq: Ints, output: npt.NDArray[np.bool_]
    ) -> tuple[Floats, Floats]:
        """Evaluate up to ``n_batch`` rows of any sequences.

        Returns ``logits [rows with output, n_vocab]`` and ``hidden [rows, n_embd]`` (the last
        block's output before the final norm). Both are views that live until the next call.
        """
        n = len(token)
        self._batch.n_tokens = n
        self._token[:n], self._pos[:n], self._seq[:n] = token, pos, seq
        self._flag[:n] = output
        status = llama_cpp.llama_decode(self._ctx, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}; n_ctx is likely too small.")
        logits = llama_cpp.llama_get_logits(self._ctx)
        hidden = llama_cpp_ext.llama_get_embeddings_nextn(self._ctx)
        return (
            np.ctypeslib.as_array(logits, (int(np.count_nonzero(output)), self.n_vocab)),
            np.ctypeslib.as_array(hidden, (n, self.n_embd)),
        )

    def forget(self, seq: int, start: int = 0) -> None:
        """Drop what sequence ``seq`` holds from position ``start`` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, seq, start, -1)

    def tokenize(self, text: str) -> list[int]:
        """Return tokens of ``text``, with chat markers read as such."""
        raw = text.encode()
        room = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, True)
        return list(room[:n])

    def text(self, tokens: list[int]) -> str:
        """Return what ``tokens`` say, chat markers included."""
        room = ctypes.create_string_buffer(256)
        parts = []
        for t in tokens:
            n = llama_cpp.llama_token_to_piece(self.vocab, t, room, len(room), 0, True)
            parts.append(room.raw[: max(n, 0)])
        return b"".join(parts).decode("utf-8", "replace")

    def close(self) -> None:
        """Free context and model."""
        if self._ctx:
            llama_cpp.llama_free(self._ctx)
            llama_cpp.llama_model_free(self._model)
            self._ctx = self._model = None

    def __enter__(self) -> Trunk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@llama_cpp.llama_log_callback
def _drop(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Swallow the host's log."""


def _quiet() -> None:
    llama_cpp.llama_log_set(_drop, ctypes.c_void_p(0))
