"""Saved states: the stock ``LlamaState``, and what the draft needs in one attribute of bytes.

``state.spec_state`` is an attribute of the instance, so the state unpickles and loads where this
package is not installed. It holds, behind a header of fixed size:

    JSON     what the state was made with (model, sizes, cache types), to be compared at load
    queue    tokens and hidden rows that wait for the draft context (``mtp_state_get``)
    memory   the draft context's own memory, as the host writes it

and a checksum over these and over the stock part. ``llama_state_size`` stays the size of
``llama_state``: the stock ``load_state`` insists on it. Caches count the rest by
:func:`count_spec_state`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import host
from ..errors import NativeError, StateError
from .session import Session

__all__ = ["count_spec_state", "load_state", "save_state"]

ATTRIBUTE = "spec_state"

_MAGIC = b"llamaMTP"
_FORMAT = 1
_HEAD = struct.Struct("<8sIIQQI")  # magic, format, bytes of JSON, queue and memory, checksum

_SAMPLES = 64  # blocks of the model file that stand for its weights
_BLOCK = 4096
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")

# What a state of other parameters would be silently wrong with, by the names the user knows.
_CONTEXT = (
    "type_k",
    "type_v",
    "swa_full",
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)


def save_state(llama: Any, session: Session) -> Any:
    """Return the state of ``llama`` between two rounds."""
    queue = session.save_draft()
    context = session.draft_context
    memory = host.save_memory(context) if context is not None else b""
    state = host.LlamaState(
        # Without logits_all stock copies n_batch rows of a buffer that nobody wrote: 1.2 GB at a
        # vocabulary of 152k. One element takes their place where load_state broadcasts it.
        scores=llama._scores.copy() if llama._logits_all else np.zeros((1, 1), dtype=np.single),
        input_ids=llama.input_ids.copy(),
        n_tokens=llama.n_tokens,
        llama_state=(target := host.save_memory(llama._ctx)),
        llama_state_size=len(target),
        seed=llama._seed,
    )
    made_with = {"target": _target(llama), "draft": _draft(session), "build": _build(llama)}
    head = json.dumps(made_with, sort_keys=True).encode()
    seal = _HEAD.pack(
        _MAGIC,
        _FORMAT,
        len(head),
        len(queue),
        len(memory),
        _checksum(state, head, queue, memory),
    )
    setattr(state, ATTRIBUTE, b"".join((seal, head, queue, memory)))
    return state


def load_state(llama: Any, session: Session, state: Any) -> None:
    """Put a state back into ``llama``; StateError, and nothing is changed, when it does not fit.

    Without our attribute (a state of the stock class) the draft starts empty at the later position.
    """
    _check_stock_part(llama, state)
    sealed = hasattr(state, ATTRIBUTE)
    queue = memory = b""
    fits_draft = same_build = False
    if sealed:
        made_with, queue, memory = _unpack(state)
        _compare(made_with.get("target"), _target(llama))
        fits_draft = bool(queue) and made_with.get("draft") == _draft(session)
        same_build = made_with.get("build") == _build(llama)
        if fits_draft:
            try:
                session.check_draft(queue)
            except NativeError:  # n_batch is smaller now
                fits_draft = False

    # The host clears its memory before it looks at the bytes. Where nothing says that it will take
    # them, the memory is kept to be put back.
    session.replay()
    kept = None if same_build else host.save_memory(llama._ctx)
    data = memoryview(state.llama_state)[: state.llama_state_size]
    loaded = host.load_memory(llama._ctx, data) and host.memory_is_sound(llama._ctx)
    if not loaded or host.memory_end(llama._ctx) < state.n_tokens:
        if kept is None or not host.load_memory(llama._ctx, kept):
            llama._ctx.kv_cache_clear()
            llama.n_tokens = 0
        session.forget(host.memory_end(llama._ctx))
        llama._requires_eval = True
        raise StateError(
            "The host does not take this state: it is damaged, or of a model, flash attention "
            "setting or llama-cpp-python version with another layout."
        )

    if llama._logits_all:
        rows = llama.scores[: state.n_tokens]
        rows[:] = state.scores
        rest = llama.scores[state.n_tokens :]
        rest[rest > 0] = 0.0
    llama.input_ids = state.input_ids.copy()
    llama.n_tokens = state.n_tokens
    llama._requires_eval = True
    llama._seed = state.seed

    session.forget(host.memory_end(llama._ctx))
    context = session.draft_context
    if context is not None and fits_draft and host.load_memory(context, memory):
        session.load_draft(queue)
    else:
        session.load_draft(None)


def _check_stock_part(llama: Any, state: Any) -> None:
    """Look at what every state has, of the stock class or ours."""
    try:
        tokens, n = state.input_ids, int(state.n_tokens)
        size, target = int(state.llama_state_size), memoryview(state.llama_state).cast("B")
        ids = np.asarray(tokens)
        int(state.seed)
    except (AttributeError, TypeError, ValueError) as e:
        raise StateError(f"This is not a LlamaState: {e}.") from e
    if ids.shape != llama.input_ids.shape or ids.dtype != llama.input_ids.dtype:
        raise StateError(
            f"The state has room for {ids.size} tokens and this object for "
            f"{llama.input_ids.size}; construct Llama with the n_ctx that it was saved with."
        )
    if not 0 <= n <= ids.size or (n and int(ids[:n].max()) >= llama._n_vocab):
        raise StateError("The state is damaged: its tokens are not of this vocabulary.")
    if size != len(target):
        raise StateError(f"The state is damaged: {len(target)} of {size} bytes are there.")
    name = host.architecture(llama).encode()
    stored = bytes(target[4 : 4 + int.from_bytes(target[:4], "little")][:64])
    if stored != name:
        raise StateError(
            "The state is of another model: its architecture is "
            f"{stored.decode('ascii', 'backslashreplace')!r}, here {name.decode()!r}."
        )
    if llama._logits_all:
        shape = np.shape(state.scores)
        if len(shape) != 2 or shape[0] not in (1, n) or shape[1] not in (1, llama._n_vocab):
            raise StateError(
                f"The state holds logits of shape {shape}, which is not one row for each of its "
                f"{n} tokens; save it with logits_all=True."
            )


def _unpack(state: Any) -> tuple[dict[str, Any], bytes, bytes]:
    """Return what the state was made with, the draft's queue and its memory."""
    seal = getattr(state, ATTRIBUTE)
    if not isinstance(seal, bytes) or len(seal) < _HEAD.size or not seal.startswith(_MAGIC):
        raise StateError(f"The state is damaged: its {ATTRIBUTE} is not what llama-mtp writes.")
    _, version, n_head, n_queue, n_memory, checksum = _HEAD.unpack_from(seal)
    if version != _FORMAT:
        raise StateError(
            f"The state's draft is in format {version}, which this llama-mtp does not know; "
            f"install a newer one, or delete the state's {ATTRIBUTE} to load it without a draft."
        )
    if _HEAD.size + n_head + n_queue + n_memory != len(seal):
        raise StateError(f"The state is damaged: its {ATTRIBUTE} is not as long as it says.")
    at = _HEAD.size
    head = seal[at : at + n_head]
    queue = seal[at + n_head : at + n_head + n_queue]
    memory = seal[at + n_head + n_queue :]
    if _checksum(state, head, queue, memory) != checksum:
        raise StateError("The state is damaged: its checksum does not match.")
    made_with = json.loads(head)
    return made_with, queue, memory


def _checksum(state: Any, *parts: bytes) -> int:
    """Return a CRC against damage (a pickle is not safe from malice anyhow)."""
    numbers = (int(n) for n in (state.n_tokens, state.llama_state_size, state.seed))
    crc = zlib.crc32(repr([*numbers]).encode())
    for part in (state.input_ids[: state.n_tokens].tobytes(), state.llama_state, *parts):
        crc = zlib.crc32(part, crc)
    return crc


def _compare(then: Any, now: dict[str, Any]) -> None:
    if not isinstance(then, dict):
        raise StateError("The state is damaged: it does not say what it was made with.")
    for name, value in now.items():
        saved = then.get(name)
        if saved == value or (name == "weights" and None in (saved, value)):
            continue
        if name in ("weights", "lora"):
            raise StateError(
                "The state is of another model file."
                if name == "weights"
                else "The state was saved with other LoRA adapters."
            )
        raise StateError(f"The state was saved with {name} {saved}, here it is {value}.")


def _target(llama: Any) -> dict[str, Any]:
    """Return what the target's state depends on."""
    cached = llama.__dict__.get("_state_identity")
    if cached is None:
        params = llama.context_params
        cached = llama._state_identity = {
            "architecture": host.architecture(llama),
            "weights": _file_print(llama.model_path),
            "lora": [_file_print(llama.lora_path), llama.lora_scale] if llama.lora_path else None,
            "n_vocab": llama._n_vocab,
            "n_ctx": llama._ctx.n_ctx(),
            **{name: getattr(params, name) for name in _CONTEXT},
        }
    return dict(cached)


def _draft(session: Session) -> dict[str, Any] | None:
    context = session.draft_context
    if context is None:
        return None
    return {"type_k": context.params.type_k, "type_v": context.params.type_v}


def _build(llama: Any) -> dict[str, Any]:
    """Return what may change the host's layout of the same state."""
    params = llama.context_params
    return {
        "host": host.version(),
        "flash_attn": params.flash_attn_type,
        "offload": [llama.model_params.n_gpu_layers, params.offload_kqv],
    }


def _file_print(path: str) -> str | None:
    """Return a digest of blocks spread over a model file, all its splits included.

    It stays the same where the file is moved, and differs for other weights of the same sizes.
    None where the file is gone.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in _splits(Path(path)):
            with part.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                digest.update(struct.pack("<q", size))
                for k in range(_SAMPLES):
                    f.seek(max(size - _BLOCK, 0) * k // (_SAMPLES - 1))
                    digest.update(f.read(_BLOCK))
    except OSError:
        return None
    return digest.hexdigest()


def _splits(path: Path) -> Iterator[Path]:
    match = _SPLIT.search(path.name)
    if match is None:
        yield path
        return
    stem = path.name[: match.start()]
    for k in range(1, int(match[1]) + 1):
        yield path.with_name(f"{stem}-{k:05d}-of-{match[1]}.gguf")


class _CountingRAMCache(host.LlamaRAMCache):
    """The stock cache, which counts ``llama_state_size`` only, with the draft's bytes counted."""

    @property
    def cache_size(self) -> int:
        return sum(
            state.llama_state_size + len(getattr(state, ATTRIBUTE, b""))
            for state in self.cache_state.values()
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the stock class: it is to be readable without this package."""
        return host.LlamaRAMCache, (), self.__dict__


def count_spec_state(cache: Any) -> None:
    """Make the user's own in-memory cache count the draft's bytes, in ``cache_size`` and bound.

    Only an object of exactly the stock class is changed, and only that object. The disk cache
    counts what it writes, and other classes count in their own way.
    """
    if type(cache) is host.LlamaRAMCache:
        cache.__class__ = _CountingRAMCache
