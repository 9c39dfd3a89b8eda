"""Make the host try to draft with a file's head, whatever comes of it: run in a process of its own.

Prints ``no context`` where the host refuses to make one, ``the trunk's graph`` where it makes one
whose answer does not depend on the hidden rows that it is given, and ``a head`` where it does.
"""

from __future__ import annotations

import ctypes
import os
import sys

os.environ["GGML_NO_BACKTRACE"] = "1"

import numpy as np
from llama_cpp import llama_cpp

N_EMBD, N_TOKENS = 64, 3


def main(path: str) -> str:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.load_mtp = 0, True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    assert model, "the model does not load"
    # Whatever graph is built, it gets the head's rows where it asks for them.
    answers = [answer(model, rows) for rows in np.random.default_rng(0).normal(size=(2, 3, 64))]
    if answers[0] is None:
        return "no context"
    return "the trunk's graph" if np.array_equal(*answers) else "a head"


def answer(model: object, rows: np.ndarray) -> np.ndarray | None:
    """The logits of the last of three tokens whose hidden rows are given, [n_vocab]."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 128, 32, 32
    params.n_threads = params.n_threads_batch = 1
    params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        return None
    batch = llama_cpp.llama_batch_init(N_TOKENS, 0, 1)
    hidden = np.ascontiguousarray(rows, dtype=np.float32)
    batch.embd = hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch.n_tokens = N_TOKENS
    for i in range(N_TOKENS):
        batch.token[i], batch.pos[i] = 300 + i, i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0, "the draft context does not decode"
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = llama_cpp.llama_get_logits_ith(context, N_TOKENS - 1)
    return np.ctypeslib.as_array(logits, (n_vocab,)).copy()


if __name__ == "__main__":
    print(main(sys.argv[1]))
