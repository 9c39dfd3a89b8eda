"""The drop-in ``Llama``: the stock class with a session beside its context.

Here are its parameters, what the user reads, its state and its lifetime. How it generates stands in
:mod:`.engine.generate`, completions in :mod:`.completion`. Everything else is the host's own code.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import host
from .completion import Completion
from .engine import state as saved
from .engine.attach import DraftOptions, attach
from .engine.generate import GeneratingLlama, alone
from .engine.setup import Setup
from .engine.stats import SpecStats
from .engine.watch import unwatch
from .errors import HostVersionError, NativeError, SpecTypeError
from .heads.narrow_vocabulary import vocabulary_of
from .settings import Plan, make_plan, read_options

logger = logging.getLogger("llama_mtp")

_STOCK_INIT = inspect.signature(host.StockLlama.__init__)


class Llama(Completion, GeneratingLlama):
    """``llama_cpp.Llama`` that drafts with the model's own NextN head: same seed, same tokens.

    Takes every argument of the stock class, and:

    Args:
        spec_type: ``"auto"`` (the default) drafts where the file has an executable head and runs as
            stock otherwise; ``"draft-mtp"`` (alias ``"mtp"``) insists; ``"none"`` is stock; any
            other name is a spec type that a plugin registers.
        spec_draft_n_max: most tokens to draft per round (default 3).
        spec_draft_p_min: stop drafting below this probability (default 0: never).
        spec_draft_model: path of a GGUF that holds the head by itself (llama.cpp's ``mtp-X.gguf``,
            a Gemma 4 assistant); default: the head is in the model's own file.
        spec_draft_type_k, spec_draft_type_v: types of the draft context's KV cache, as ggml numbers
            or names (``"q8_0"``); default: the target's, or F16 where the host refuses those.
        spec_adaptive: let measured costs and acceptance choose the depth up to the bound (the
            default), or draft that many tokens in every round.

    The environment variables ``LLAMA_ARG_SPEC_TYPE``, ``LLAMA_ARG_SPEC_DRAFT_N_MAX``,
    ``..._P_MIN``, ``..._MODEL``, ``..._CACHE_TYPE_K``, ``..._CACHE_TYPE_V`` and
    ``LLAMA_MTP_ADAPTIVE`` stand in for arguments that are not given. Three more have no argument:

    - ``LLAMA_ARG_CTX_CHECKPOINTS``: most copies of the recurrent state of a hybrid model to keep
      near the ends of prompts (default 4, at most 512 MiB together; 0: none), so that a chat whose
      last turn changed is not read again from its start.
    - ``LLAMA_MTP_PREFILL_WINDOW``: the draft context reads at most this many tokens of what it has
      not seen (a prompt, a long stretch without drafts) and forgets the rest (default 128; 0: all
      of them).
    - ``LLAMA_MTP_ALLOW_UNTESTED=1``: draft also with an architecture whose head no release of this
      package has run; libllama may abort the process.

    Raises:
        SpecTypeError: an option has a value that it does not take, or the spec type is unknown or
            cannot be honoured with this file or these arguments.
        TypeError: there is no such option; the message names the one to use.
        ModelFileError: the file is no GGUF, damaged or truncated.
        HostVersionError: the installed llama-cpp-python lacks what is needed.
    """

    def __init__(
        self,
        model_path: str,
        *,
        spec_type: str | None = None,
        spec_draft_n_max: int | None = None,
        spec_draft_p_min: float | None = None,
        spec_draft_model: str | os.PathLike[str] | None = None,
        spec_draft_type_k: int | str | None = None,
        spec_draft_type_v: int | str | None = None,
        spec_adaptive: bool | None = None,
        **stock: Any,
    ) -> None:
        self._plan: Plan | None = None
        self._fields_set = 0
        self._spec_memory: dict[tuple[str, str], int] = {}  # (context and part, device)
        # The stock class swallows what it does not know.
        others = {k for k in stock if k.startswith("spec_")} - set(_STOCK_INIT.parameters)
        self._options = read_options(
            spec_type=spec_type,
            spec_draft_n_max=spec_draft_n_max,
            spec_draft_p_min=spec_draft_p_min,
            spec_draft_model=spec_draft_model,
            spec_draft_type_k=spec_draft_type_k,
            spec_draft_type_v=spec_draft_type_v,
            spec_adaptive=spec_adaptive,
            **{name: stock[name] for name in others},
        )
        self._wants_all_rows = bool(stock.get("logits_all"))
        self._plan = make_plan(model_path, self._options, stock)
        if self._plan is None:
            super().__init__(model_path, **stock)
            return
        try:
            self._load(model_path, stock)
        except (ValueError, NativeError, HostVersionError) as e:
            host.StockLlama.close(self)
            if self._options.explicit:
                raise
            logger.warning("running without MTP: %s", e)
            self._plan = self._session = None
            super().__init__(model_path, **stock)

    def _load(self, model_path: str, stock: dict[str, Any]) -> None:
        assert self._plan is not None
        host.check_version()
        if stock.get("n_threads") is None and stock.get("n_threads_batch") is None:
            # A verify batch runs with n_threads_batch, a single row with n_threads: unequal numbers
            # (the stock default) would make one of the two needlessly slow.
            stock = {**stock, "n_threads": host.cpu_count(), "n_threads_batch": host.cpu_count()}
        self._fields_set = 0
        with host.BufferSizes() as target_sizes:
            super().__init__(model_path, **stock)
        if self._fields_set != 2:
            raise HostVersionError(
                f"llama-cpp-python {host.version()} builds its parameters in a way that is not "
                "known here; install a llama-mtp release for it."
            )
        self._session, draft_sizes = attach(
            self,
            _setup(self._plan, self.n_batch, self.context_params.n_ubatch),
            DraftOptions(self._options.draft_model, self._options.type_k, self._options.type_v),
        )
        self._spec_memory = {
            (f"{context} {part}", device): size
            for context, sizes in (("target", target_sizes), ("draft", draft_sizes))
            for (part, device), size in sizes.by_device.items()
        }
        logger.info("%s is on, up to %d drafts a round", self._plan.spec.name, self._plan.depth)

    # ---- parameters: the stock __init__ assigns both before it loads anything

    @property
    def model_params(self) -> Any:
        return self.__dict__["model_params"]

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._plan is not None and self._plan.spec.needs_head:
            params.load_mtp = self._options.draft_model is None
        self._fields_set += 1
        self.__dict__["model_params"] = params

    @property
    def context_params(self) -> Any:
        return self.__dict__["context_params"]

    @context_params.setter
    def context_params(self, params: Any) -> None:
        plan = self._plan
        if plan is not None:
            params.n_rs_seq = plan.n_rs_seq
            if not self._wants_all_rows:
                # Default 0 reserves n_ubatch rows of logits; a round needs 1 + depth.
                rows = host.rows_with_logits(1 + plan.depth, recurrent=plan.recurrent)
                params.n_outputs_max = rows
        self._fields_set += 1
        self.__dict__["context_params"] = params

    # ---- what the user reads

    @property
    def spec_type(self) -> str:
        """The spec type in use: never an alias, ``"none"`` when running as stock."""
        return self._plan.spec.name if self._session is not None and self._plan else "none"

    @property
    def spec_stats(self) -> SpecStats:
        """Counters since construction; ``.last`` for the latest generation."""
        return self._session.stats if self._session is not None else SpecStats()

    @property
    def spec_depth(self) -> int:
        """Most drafts per round; settable at run time up to the constructed bound."""
        return self._session.depth_max if self._session is not None else 0

    @spec_depth.setter
    def spec_depth(self, depth: int) -> None:
        if self._session is None:
            raise SpecTypeError('No spec type is on; construct with spec_type="draft-mtp".')
        self._session.depth_max = depth

    @contextmanager
    def spec_constant_depth(self, depth: int) -> Iterator[None]:
        """Inside the block draft ``depth`` tokens in every round, 0 included.

        What was measured for the adaptive depth stays as it is and goes on afterwards. Raises
        SpecTypeError where no spec type is on, ValueError beyond the constructed bound.
        """
        if self._session is None:
            raise SpecTypeError('No spec type is on; construct with spec_type="draft-mtp".')
        with self._session.constant_depth(depth):
            yield

    def spec_memory(self, *, by_device: bool = False) -> dict[str, int]:
        """Bytes that the object holds beside its weights, by context and part.

        What starts with ``draft``, the ``checkpoints``, the ``hidden rows`` and of ``target RS``
        all but one state are there because of MTP; what starts with ``target`` a stock object has
        too, with a larger ``compute`` part, as it reserves logits for every row of a batch. Empty
        where no spec type is on.

        Args:
            by_device: tell apart where a part lies: keys then end in the host's name of the device,
                ``draft KV on CUDA0``.
        """
        told: dict[str, int] = {}
        for (part, device), size in self._spec_memory.items():
            key = f"{part} on {device}" if by_device else part
            told[key] = told.get(key, 0) + size
        if self._session is not None and not self._session.closed:
            for part, size in self._session.memory().items():
                told[f"{part} on CPU" if by_device else part] = size
        return told

    # ---- state

    @alone
    def save_state(self) -> Any:
        """Return a stock ``LlamaState`` that carries the draft in one more attribute of bytes.

        It loads into stock objects and unpickles without this package.
        """
        if self._session is None:
            return super().save_state()
        return saved.save_state(self, self._session)

    @alone
    def load_state(self, state: Any) -> None:
        """Go on from a saved state: one of ours brings its draft, a stock one starts it empty.

        Raises StateError, and changes nothing, when it is damaged, of another model or of other
        sizes.
        """
        if self._session is None:
            super().load_state(state)
        else:
            self._session.current = None
            saved.load_state(self, self._session, state)

    def set_cache(self, cache: Any) -> None:
        """Set the cache of states; a ``LlamaRAMCache`` counts the draft's bytes from now on."""
        if self._session is not None:
            saved.count_spec_state(cache)
        super().set_cache(cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._options.keywords()}

    # ---- lifetime: session, target context, model

    def close(self) -> None:
        """Free the draft context, then the host's own objects. Idempotent.

        Waits for the step that another thread is in. Raises BusyError from inside a callback.
        """
        session = getattr(self, "_session", None)
        if session is None:
            if hasattr(self, "_stack"):
                super().close()
            return
        with session.entry.last():
            session.close()
            unwatch(self._ctx)
            super().close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _setup(plan: Plan, n_batch: int, n_ubatch: int) -> Setup:
    """What the engine needs to know of a plan."""
    options, head = plan.options, plan.head
    narrow = vocabulary_of(head.file) if head.narrow else None
    return Setup(
        plan.spec,
        depth=plan.depth,
        p_min=options.p_min,
        adaptive=options.adaptive,
        prefill_window=options.prefill_window,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        rollback=plan.report.rollback,
        n_checkpoints=options.checkpoints,
        n_heads=head.n_heads,
        chained=head.chained,
        shares_kv=head.shares_kv,
        gathers=head.gathers,
        gaps=head.mrope,
        all_outputs=head.untested,
        draft_tokens=None if narrow is None else narrow.tokens,
        stand_ins=None if narrow is None else narrow.stand_ins,
    )


def _signature() -> inspect.Signature:
    """The stock constructor's signature with our arguments in front of its ``**kwargs``."""
    own = inspect.signature(Llama.__init__).parameters
    parameters = [p for p in _STOCK_INIT.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [p for p in own.values() if p.name.startswith("spec_")]
    return inspect.Signature(parameters)


Llama.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
