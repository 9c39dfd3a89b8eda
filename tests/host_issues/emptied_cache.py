"""gemma4-assistant: making its context empties the cache of the target.

python tests/host_issues/emptied_cache.py
"""

import sys
import tempfile
from pathlib import Path

from llama_cpp import llama_cpp as C

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.families import FAMILIES

with tempfile.TemporaryDirectory() as folder:
    files = FAMILIES["gemma4-assistant"].build(Path(folder), 1, 1)
    load = C.llama_model_default_params()
    load.load_mtp = True
    target = C.llama_model_load_from_file(str(files.path).encode(), load)
    draft = C.llama_model_load_from_file(str(files.draft).encode(), load)
params = C.llama_context_default_params()
params.n_ctx = 128
context = C.llama_init_from_model(target, params)
C.llama_decode(context, C.llama_batch_get_one((C.llama_token * 4)(300, 301, 302, 303), 4))
print("last position before:", C.llama_memory_seq_pos_max(C.llama_get_memory(context), 0))
params.ctx_type, params.ctx_other = C.LLAMA_CONTEXT_TYPE_MTP, context
C.llama_init_from_model(draft, params)
print("last position after:", C.llama_memory_seq_pos_max(C.llama_get_memory(context), 0))
