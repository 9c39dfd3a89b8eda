"""deepseek4: hidden rows are other numbers until the host plans its graphs anew.

`llama_set_embeddings_nextn` leaves the plan of the compute buffers as it was. The graph of this
architecture has as many nodes with as without the rows, so the plan stays in force and gives their
memory to later nodes.

    python tests/host_issues/hidden_rows.py
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as C
from llama_cpp import llama_cpp_ext as X

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.families import FAMILIES

N = 96


def hidden_rows(model: Any, n_ubatch: int, plan_anew: bool) -> Any:
    """Decode N tokens and return their hidden rows, float32 of shape (N, n_embd_out)."""
    params = C.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_outputs_max = 128
    params.n_ubatch, params.type_k, params.type_v, params.flash_attn_type = n_ubatch, 0, 0, 0
    context = C.llama_init_from_model(model, params)
    X.llama_set_embeddings_nextn(context, True, False)
    if plan_anew:  # takes off a control vector that was never on; the host then plans again
        C.llama_set_adapter_cvec(context, None, 0, 0, 0, 0)
    batch = C.llama_batch_init(N, 0, 1)
    batch.n_tokens = N
    for i in range(N):
        batch.token[i], batch.pos[i], batch.logits[i] = 300 + i, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert C.llama_decode(context, batch) == 0
    shape = (N, C.llama_model_n_embd_out(model))
    rows = np.ctypeslib.as_array(X.llama_get_embeddings_nextn(context), shape=shape).copy()
    C.llama_batch_free(batch)
    C.llama_free(context)
    return rows


with tempfile.TemporaryDirectory() as folder:
    path = FAMILIES["deepseek4"].build(Path(folder), 1, 1).path
    model = C.llama_model_load_from_file(str(path).encode(), C.llama_model_default_params())
true = hidden_rows(model, 128, plan_anew=True)
for n_ubatch in (16, 32, 96):
    wrong = [
        int((np.abs(hidden_rows(model, n_ubatch, anew) - true).max(axis=1) > 1e-3).sum())
        for anew in (False, True)
    ]
    print(f"n_ubatch {n_ubatch}: {wrong[0]} of {N} rows wrong, after a new plan {wrong[1]}")
