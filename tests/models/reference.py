"""A naive drafter on the host's own API: what the heads of a model propose, with nothing clever.

Every draft starts from nothing: fresh contexts, the whole history decoded again, every row an
output (so that masked and unmasked rows are the same ones), no fused step, no cache that is cut
but where llama.cpp's own loop cuts it. What the engine drafts for the same history has to be the
same tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as C
from llama_cpp import llama_cpp_ext as X
from llama_cpp._logger import set_verbose

from models.families.common import Files

Rows = npt.NDArray[np.float32]

_F32 = 0


class Reference:
    """The heads of one model, the target's hidden rows included."""

    def __init__(self, files: Files, n_ctx: int = 512) -> None:
        self._n_ctx = n_ctx
        self._target = _load(files.path)
        self._draft = _load(files.draft) if files.draft else self._target
        self._n_embd = C.llama_model_n_embd_out(self._target)
        self._n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._target))
        self.n_heads = C.llama_model_n_layer_nextn(self._draft)

    def close(self) -> None:
        if self._draft is not self._target:
            C.llama_model_free(self._draft)
        C.llama_model_free(self._target)

    def hidden_rows(self, tokens: Sequence[int]) -> Rows:
        """Return the target's hidden row of every token, float32 (n, n_embd)."""
        with self._target_context() as target:
            return self._decode(target, tokens, None, 0)

    def drafts(
        self,
        history: Sequence[int],
        n: int,
        rows: Rows | None = None,
        start: int = 0,
    ) -> list[int]:
        """Return ``n`` tokens that the heads propose after ``history``; chained heads one each.

        ``rows`` stand in for the target's hidden rows of all but the last token. The heads read the
        text from position ``start`` on.
        """
        *before, last = history
        with self._contexts(masked=False) as (target, draft, shares_kv):
            if rows is None or shares_kv:
                true = self._decode(target, before, None, 0)
            hidden = true if rows is None else rows
            return self._loop(draft, before, last, hidden, n, shares_kv, start)

    def _loop(
        self,
        draft: Any,
        before: list[int],
        last: int,
        hidden: Rows,
        n: int,
        shares_kv: bool,
        start: int,
    ) -> list[int]:
        chained = self.n_heads > 1 and not shares_kv
        memory = C.llama_get_memory(draft)
        # Token k is read with the row of token k - 1; nothing stands before the first.
        paired = np.concatenate([np.zeros((1, self._n_embd), np.float32), hidden])
        end = len(before)
        for head in range(self.n_heads if chained else 1):
            if shares_kv:
                break
            if chained:
                C.llama_memory_seq_rm(memory, 0, 0, -1)
                X.llama_set_nextn_layer_offset(draft, head)
            self._decode(draft, before[start:], paired[start:-1], start)
        drafts: list[int] = []
        new = paired[-1:]  # the rows that go with [last, *drafts]
        for i in range(min(n, self.n_heads) if chained else n):
            text = [last, *drafts]
            if chained:
                C.llama_memory_seq_rm(memory, 0, end, -1)
                X.llama_set_nextn_layer_offset(draft, i)
                row = self._decode(draft, text, new, end)[-1:]
                at = i
            else:
                row = self._decode(draft, text[-1:], new[-1:], end if shares_kv else end + i)
                at = 0
            logits = C.llama_get_logits_ith(draft, at)
            drafts.append(int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._n_vocab,)))))
            new = np.concatenate([new, row])
        return drafts

    def last_row(self, history: Sequence[int], *, masked: bool, all_outputs: bool) -> Rows:
        """Return the head's own hidden row of the last token, read masked or unmasked.

        Of the batch all rows are outputs, or the last one only.
        """
        with self._contexts(masked) as (target, draft, shares_kv):
            hidden = self._decode(target, history[:-1], None, 0)
            paired = np.concatenate([np.zeros((1, self._n_embd), np.float32), hidden])
            start = 0
            if shares_kv:  # the head has no history of its own
                start, history, paired = len(hidden), history[-1:], paired[-1:]
            rows = self._decode(draft, history, paired, start, all_outputs=all_outputs)
            return rows[0 if masked and not all_outputs else -1]

    # ---- contexts and batches

    @contextmanager
    def _target_context(self) -> Iterator[Any]:
        with self._context(self._target, C.LLAMA_CONTEXT_TYPE_DEFAULT, None) as target:
            X.llama_set_embeddings_nextn(target, True, False)
            C.llama_set_adapter_cvec(target, None, 0, 0, 0, 0)  # else deepseek4's rows are others
            yield target

    @contextmanager
    def _contexts(self, masked: bool) -> Iterator[tuple[Any, Any, bool]]:
        """Yield target, draft, and whether the draft reads the target's KV cache.

        Both before the first decode: making a context that shares a cache empties that cache.
        """
        with (
            self._target_context() as target,
            self._context(self._draft, C.LLAMA_CONTEXT_TYPE_MTP, target) as draft,
        ):
            X.llama_set_embeddings_nextn(draft, True, masked)
            yield target, draft, X.llama_get_ctx_other(draft) == target

    @contextmanager
    def _context(self, model: Any, kind: int, other: Any | None) -> Iterator[Any]:
        params = C.llama_context_default_params()
        params.ctx_type, params.ctx_other = kind, other
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = self._n_ctx
        params.swa_full = True
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = _F32
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = C.llama_init_from_model(model, params)
        assert context, "the host made no context"
        try:
            yield context
        finally:
            C.llama_free(context)

    def _decode(
        self,
        context: Any,
        tokens: Sequence[int],
        hidden: Rows | None,
        pos: int,
        *,
        all_outputs: bool = True,
    ) -> Rows:
        """Decode one batch and return its hidden rows, as many as there are outputs if masked."""
        n = len(tokens)
        batch = C.llama_batch_init(n, 0, 1)
        # A batch of the host has room for tokens or rows; the rows are ours.
        rows = np.ascontiguousarray(hidden, dtype=np.float32) if hidden is not None else None
        if rows is not None:
            assert rows.shape == (n, self._n_embd)
            batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, pos + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_outputs or i == n - 1
        status = C.llama_decode(context, batch)
        batch.embd = None
        C.llama_batch_free(batch)
        assert status == 0, f"llama_decode returned {status}"
        table = X.llama_get_embeddings_nextn(context)
        return np.ctypeslib.as_array(table, shape=(n, self._n_embd)).copy()


def _load(path: Any) -> Any:
    params = C.llama_model_default_params()
    params.load_mtp = True
    params.n_gpu_layers = 0
    set_verbose(False)
    model = C.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"the host does not load {path}"
    return model
