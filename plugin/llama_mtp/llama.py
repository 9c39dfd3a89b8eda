"""The drop-in ``Llama``: the stock class, with a session beside its context.

What is overridden is what touches the context: generate and sample go through the session, eval,
reset and the state calls keep it in step. Everything else is the host's own code.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import host
from . import state as saved
from .completion import complete
from .engine.checkpoints import TAIL
from .engine.native import ffi
from .engine.session import Session, different_vocabulary, shared_prefix
from .engine.stats import SpecStats
from .engine.watch import unwatch, watch
from .errors import (
    BusyError,
    ClosedError,
    HostVersionError,
    NativeError,
    RollbackRefused,
    SpecTypeError,
)
from .heads.narrow_vocabulary import Vocabulary, vocabulary_of
from .settings import Plan, make_plan, read_options

logger = logging.getLogger("llama_mtp")

_STOCK_INIT = inspect.signature(host.StockLlama.__init__)
_STOCK_GENERATE = inspect.signature(host.StockLlama.generate)
_NO_TOKEN = -1  # llama.cpp's LLAMA_TOKEN_NULL
_SAMPLING = tuple(inspect.signature(host.StockLlama._init_sampler).parameters)[1:]


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread at a time into a method of an object with a session; BusyError for others."""

    @functools.wraps(method)
    def alone(self: Llama, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            return method(self, *args, **kwargs)
        with self._session.entry:
            return method(self, *args, **kwargs)

    return alone


class Llama(host.StockLlama):
    """``llama_cpp.Llama`` that drafts with the model's own NextN head: same seed, same tokens.

    Takes every argument of the stock class, and:

    Args:
        spec_type: ``"auto"`` (the default) drafts where the file has an executable head and runs as
            stock otherwise; ``"draft-mtp"`` (alias ``"mtp"``) insists; ``"none"`` is stock; any
            other name is a spec type that a plugin registers.
        spec_draft_n_max: most tokens to draft per round (default 3).
        spec_draft_n_min: fewest drafts worth a round (default 0).
        spec_draft_p_min: stop drafting below this probability (default 0: never).
        spec_draft_model: a GGUF that holds the head by itself (llama.cpp's ``mtp-X.gguf``, a Gemma
            4 assistant); default: the head is in the model's own file.
        spec_draft_type_k, spec_draft_type_v: ggml types of the draft context's own KV cache.
        spec_depth: ``"adaptive"`` (the default) lets measured costs and acceptance choose the depth
            up to the bound, ``"fixed"`` keeps it there.
        spec_adaptive: the same as a bool.
        spec_checkpoints: most copies of the recurrent state of a hybrid model to keep near the ends
            of prompts (default 4, at most 512 MiB together; 0: none), so that a chat whose last
            turn changed is not read again from its start.
        spec_allow_untested: draft also with an architecture whose head no release of this package
            has run; libllama may abort the process.
        spec_prefill_window: the draft context reads at most this many tokens of what it has not
            seen (a prompt, a long stretch without drafts) and forgets the rest (default 128; 0: all
            of them).

    The environment variables ``LLAMA_ARG_SPEC_TYPE``, ``LLAMA_ARG_SPEC_DRAFT_N_MAX``,
    ``..._N_MIN``, ``..._P_MIN`` and ``..._MODEL``, ``LLAMA_ARG_CTX_CHECKPOINTS`` and
    ``LLAMA_MTP_ALLOW_UNTESTED`` and ``LLAMA_MTP_PREFILL_WINDOW`` stand in for arguments that are
    not given.

    Raises:
        SpecTypeError: the spec type is unknown, or cannot be honoured with this file or these
            arguments.
        ModelFileError: the file is no GGUF, damaged or truncated.
        HostVersionError: the installed llama-cpp-python lacks what is needed.
    """

    n_tokens: int  # set by the stock class: positions that count as evaluated

    def __init__(
        self,
        model_path: str,
        *,
        spec_type: str | None = None,
        spec_draft_n_max: int | None = None,
        spec_draft_n_min: int | None = None,
        spec_draft_p_min: float | None = None,
        spec_draft_model: str | None = None,
        spec_draft_type_k: int | None = None,
        spec_draft_type_v: int | None = None,
        spec_depth: str | None = None,
        spec_adaptive: bool | None = None,
        spec_checkpoints: int | None = None,
        spec_allow_untested: bool | None = None,
        spec_prefill_window: int | None = None,
        **stock: Any,
    ) -> None:
        self._session: Session | None = None
        self._plan: Plan | None = None
        self._callback_error: BaseException | None = None
        self._in_callback = False
        self._fields_set = 0
        self._generation: object | None = None  # whose text the context holds
        #: Tokens that the next :meth:`generate` will be asked for, where that is known: no draft is
        #: made beyond them. Completions set it themselves.
        self.spec_tokens_wanted: int | None = None
        self._spec_memory: dict[tuple[str, str], int] = {}  # (context and part, device)
        for name in stock:  # the stock class swallows what it does not know
            if name.startswith("spec_") and name not in _STOCK_INIT.parameters:
                raise TypeError(f"Llama got an unexpected keyword argument {name!r}.")
        self._options = read_options(
            spec_type,
            spec_draft_n_max,
            spec_draft_n_min,
            spec_draft_p_min,
            spec_draft_type_k,
            spec_draft_type_v,
            spec_adaptive,
            spec_checkpoints,
            spec_draft_model,
            spec_allow_untested,
            spec_depth,
            spec_prefill_window,
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
        draft = vocabulary = None
        draft_sizes = host.BufferSizes()
        if self._plan.spec.needs_head:
            with draft_sizes:
                draft_model, vocabulary = self._load_draft_model()
                draft = host.draft_context(
                    self._ctx,
                    self.context_params,
                    n_ubatch=max(host.DRAFT_UBATCH, self._plan.depth + 2),
                    model=draft_model,
                    shares_kv=self._plan.head.shares_kv,
                    all_outputs=self._plan.head.untested,
                    type_k=self._options.type_k,
                    type_v=self._options.type_v,
                    verbose=self.verbose,
                )
        self._spec_memory = {
            (f"{context} {part}", device): size
            for context, sizes in (("target", target_sizes), ("draft", draft_sizes))
            for (part, device), size in sizes.by_device.items()
        }
        self._session = Session(
            self._plan, self._ctx, draft, self.n_batch, self.context_params.n_ubatch, vocabulary
        )
        if draft is not None:
            host.plan_anew(self._ctx)  # the session has asked it for hidden rows
        watch(self._ctx, self._session, self.context_params.n_outputs_max)
        logger.info("%s is on, up to %d drafts a round", self._plan.spec.name, self._plan.depth)

    def _load_draft_model(self) -> tuple[Any | None, Vocabulary | None]:
        """Load the head's own file, freed with this object; None where the model has the head.

        With it comes the head's vocabulary, where that is a part of the model's.
        """
        path = self._options.draft_model
        if path is None:
            return None, None
        assert self._plan is not None
        head = self._plan.head
        vocabulary = vocabulary_of(head.file) if head.narrow else None
        model = host.draft_model(path, self.model_params, verbose=self.verbose)
        self._model._exit_stack.callback(model.close)
        widths = [host.C.llama_model_n_embd_out(m.model) for m in (self._model, model)]
        if widths[0] != widths[1]:
            raise SpecTypeError(
                f"The head in {path} reads hidden rows of {widths[1]} floats, and the model has "
                f"{widths[0]}. Pass the head that was made for this model."
            )
        if difference := different_vocabulary(self._model, model, vocabulary):
            raise SpecTypeError(
                f"The head in {path} has another vocabulary than the model: {difference}. "
                "Pass the head that was made for this model."
            )
        return model, vocabulary

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
        return self._session.policy.depth_max if self._session is not None else 0

    @spec_depth.setter
    def spec_depth(self, depth: int) -> None:
        if self._session is None:
            raise SpecTypeError('No spec type is on; construct with spec_type="draft-mtp".')
        self._session.policy.depth_max = depth

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
        if self._session is not None:
            for part, size in self._session.memory().items():
                told[f"{part} on CPU" if by_device else part] = size
        return told

    # ---- generation

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield tokens after a prompt: the arguments and tokens of ``llama_cpp.Llama.generate``.

        ``send(tokens)`` proposes what may come next, as in stock: the model decides, the text does
        not change. Raises ClosedError after :meth:`close`.
        """
        session = self._session
        if session is None or self.draft_model is not None:
            yield from super().generate(tokens, *args, **kwargs)
            return
        if session.closed:
            raise ClosedError()
        bound = _STOCK_GENERATE.bind(self, tokens, *args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        stopping_criteria = options["stopping_criteria"]
        wanted, self.spec_tokens_wanted = self.spec_tokens_wanted, None  # also where it is busy
        with session.entry:
            chain = self._init_sampler(**{k: v for k, v in options.items() if k in _SAMPLING})
            self._sampler = chain
            address = ffi.cast("void *", host.address_of_sampler(chain))

            session.settle()
            prompt = list(tokens)
            if options["reset"] and self.n_tokens > 0:
                prompt = self._reuse_prefix(prompt)
            elif options["reset"]:
                self.reset()
            if prompt:
                self._eval_prompt(prompt)
            session.begin_generation(self._input_ids, round(options["temp"], 1), wanted)
            self._generation = mine = object()
            evaluated = self._input_ids.tolist()
        try:
            with session.entry:
                token = self._sample_live(chain)
            while True:
                if stopping_criteria is not None:
                    with session.entry:
                        row = host.logits_row(self._ctx, session.live_row, self._n_vocab)
                        if stopping_criteria(self._input_ids, row):
                            return
                sent = yield token
                with session.entry:
                    if self._generation is not mine or self.n_tokens != len(evaluated):
                        self._take_up(session, chain, evaluated)
                        self._generation = mine
                    evaluated.append(token)
                    token = self._next(session, chain, address, token, sent)
        finally:
            # Booked, not rolled back: what comes next may want to go further back in one step.
            if self._generation is mine and not session.closed:
                session.finish_round()

    def _take_up(self, session: Session, chain: Any, evaluated: list[int]) -> None:
        """Go back to a generation's own text after something else has used the object."""
        if session.closed:
            raise ClosedError()
        if any(token < 0 for token in evaluated):
            raise NativeError("The text before this token holds an image and has been overtaken.")
        self._sampler = chain
        session.settle()
        rest = self._reuse_prefix(evaluated) if self.n_tokens else evaluated
        if rest:
            self.eval(rest)
        session.align(self._input_ids)

    def _next(
        self, session: Session, chain: Any, address: Any, last: int, sent: Sequence[int] | None
    ) -> int:
        """Return the token after ``last``; stock's invariant at every sample: last is evaluated."""
        pos = self.n_tokens
        if pos >= len(self.input_ids) or pos >= self._n_ctx:
            mine = self._generation
            self.eval([last])  # stock goes on to the end of the padded memory, and fails there
            self._generation = mine
            return self._sample_live(chain)
        self.input_ids[pos] = last
        try:
            self.n_tokens = pos + 1
            self._requires_eval = False
            token = self._step(session, address, last, pos, sent)
        except BaseException:  # an interrupt too: only what was evaluated counts
            if self.n_tokens == pos + 1 > session.n_past:
                self.n_tokens = pos
            raise
        if self._logits_all:
            self.scores[pos] = host.logits_row(self._ctx, session.live_row, self._n_vocab)
        self._raise_callback_error()
        return token

    def _step(
        self, session: Session, address: Any, last: int, pos: int, sent: Sequence[int] | None
    ) -> int:
        try:
            return session.next(address, last, pos, self._input_ids, sent)
        except RollbackRefused:
            self.n_tokens = pos
            self._evaluate_again()
            self.n_tokens = pos + 1
            return session.next(address, last, pos, self._input_ids, sent)

    def _sample_live(self, chain: Any) -> int:
        token = int(chain.sample(self._ctx, self._live_row()))
        self._raise_callback_error()
        return token

    def _live_row(self) -> int:
        """Return the output row of the last position, evaluated again where its logits are gone."""
        session = self._session
        assert session is not None
        if session.live_row < 0:
            if self.n_tokens == 0:
                raise ValueError("There is no text to go on from; pass at least one token.")
            self.n_tokens -= 1
            self.eval([int(self.input_ids[self.n_tokens])])
        return session.live_row

    def _reuse_prefix(self, prompt: list[int]) -> list[int]:
        """Cut the context to what it shares with ``prompt`` and return the rest to evaluate.

        Unlike stock, never on the memory's word alone: where a recurrent state is not kept, the
        deepest checkpoint has to do; without one, or where a sliding window has moved on, the
        context starts over. Where the draft has read the token behind the cut, the last token that
        is kept counts to the rest: evaluated again, it gives the draft the hidden row it lacks.
        """
        session = self._session
        assert session is not None
        if session.n_past != self.n_tokens:
            self.reset()
            return prompt
        shared = shared_prefix(self._input_ids, prompt)
        if shared == len(prompt) == self.n_tokens and session.live_row >= 0:
            return []
        keep = min(shared, len(prompt) - 1)
        whole = session.recurrent or keep == self.n_tokens or host.keeps_everything(self._ctx)
        if keep <= 0 or not whole:
            self.reset()
            return prompt
        if session.can_truncate(keep):
            if session.lacks_row(keep) and session.can_truncate(keep - 1):
                keep -= 1
            session.truncate(keep)
        else:
            keep = session.restore(prompt)
            if keep == 0:
                self.reset()
                return prompt
        self.n_tokens = keep
        self._requires_eval = True
        return prompt[keep:]

    def _eval_prompt(self, prompt: list[int]) -> None:
        """Evaluate a prompt, with a checkpoint a few tokens before its end."""
        session = self._session
        assert session is not None
        head = len(prompt) - TAIL
        with session.prompt(self.n_tokens + len(prompt)):
            if head > 0 and session.checkpoints.wanted(self.n_tokens + head):
                self.eval(prompt[:head])
                session.save_checkpoint(self._input_ids)
                prompt = prompt[head:]
            self.eval(prompt)

    @_alone
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the ``n_tokens`` that count so far, as stock does."""
        session = self._session
        self._generation = None
        if session is not None:
            session.settle()
            if self.n_tokens <= session.n_past and not session.can_truncate(self.n_tokens):
                self._evaluate_again()
            # Decoded behind our back (libmtmd): an image has no tokens that a prompt could share,
            # and stock leaves there what stood there before.
            self.input_ids[session.n_past : self.n_tokens] = _NO_TOKEN
        super().eval(tokens)

    def _evaluate_again(self) -> None:
        """Rebuild a memory that cannot go back: clear it and evaluate ``input_ids[:n_tokens]``."""
        text = self._input_ids.tolist()
        if any(token < 0 for token in text):
            raise NativeError(
                "The recurrent state before an image is not kept; start the conversation again."
            )
        self.n_tokens = 0
        self._ctx.kv_cache_clear()
        super().eval(text)

    @_alone
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Sample from the last position, or the one that ``idx`` names, as stock does."""
        if self._session is not None:
            position = self.n_tokens - 1 if idx is None else idx
            row = self._live_row() + position - (self.n_tokens - 1)
            idx = row + self.n_tokens  # stock hands the host idx - n_tokens
        token = int(super().sample(*args, idx=idx, **kwargs))
        self._raise_callback_error()
        return token

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """Yield a completion; see :mod:`llama_mtp.completion`."""
        # A tokenizer of the caller's may say of a token what depends on those before it.
        own_text = (
            type(self.tokenizer_) is not host.StockTokenizer
            or type(self).detokenize is not host.StockLlama.detokenize
        )
        if self._session is None or self.draft_model is not None or own_text:
            return super()._create_completion(*args, **kwargs)
        return complete(self, *args, **kwargs)

    # ---- Python callbacks: ctypes would swallow what they raise

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        processors = kwargs.get("logits_processor")
        if self._session is not None and processors is not None:
            kwargs["logits_processor"] = [self._guard(p) for p in processors]
        return super()._init_sampler(*args, **kwargs)

    def _guard(self, processor: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(input_ids: Any, scores: Any) -> Any:
            if self._callback_error is None:
                self._in_callback = True
                try:
                    return processor(input_ids, scores)
                except BaseException as e:
                    self._callback_error = e
                finally:
                    self._in_callback = False
            return scores

        return guarded

    def _raise_callback_error(self) -> None:
        error, self._callback_error = self._callback_error, None
        if error is not None:
            raise error

    # ---- state

    @_alone
    def reset(self) -> None:
        """Forget the text; the next evaluation starts at position 0."""
        self._generation = None
        super().reset()
        if self._session is not None:
            self._session.finish_round()
            if self._session.recurrent:
                self._session.forget(0)  # stock has just cleared the memory

    @_alone
    def save_state(self) -> Any:
        """Return a stock ``LlamaState`` that carries the draft in one more attribute of bytes.

        It loads into stock objects and unpickles without this package.
        """
        if self._session is None:
            return super().save_state()
        return saved.save_state(self, self._session)

    @_alone
    def load_state(self, state: Any) -> None:
        """Go on from a saved state: one of ours brings its draft, a stock one starts it empty.

        Raises StateError, and changes nothing, when it is damaged, of another model or of other
        sizes.
        """
        if self._session is None:
            super().load_state(state)
        else:
            self._generation = None
            saved.load_state(self, self._session, state)

    def set_cache(self, cache: Any) -> None:
        """Set the cache of states; a ``LlamaRAMCache`` counts the draft's bytes from now on."""
        if self._session is not None:
            saved.count_spec_state(cache)
        super().set_cache(cache)

    def __getstate__(self) -> dict[str, Any]:
        options = self._options
        return {
            **super().__getstate__(),
            "spec_type": options.spec_type,
            "spec_draft_n_max": options.n_max,
            "spec_draft_n_min": options.n_min,
            "spec_draft_p_min": options.p_min,
            "spec_draft_model": options.draft_model,
            "spec_draft_type_k": options.type_k,
            "spec_draft_type_v": options.type_v,
            "spec_adaptive": options.adaptive,
            "spec_checkpoints": options.checkpoints,
            "spec_allow_untested": options.allow_untested,
            "spec_prefill_window": options.prefill_window,
        }

    # ---- lifetime: session, target context, model

    def close(self) -> None:
        """Free the draft context, then the host's own objects. Idempotent.

        Waits for the step that another thread is in. Raises BusyError from inside a callback.
        """
        session = getattr(self, "_session", None)
        if session is not None:
            if self._in_callback:
                raise BusyError("close() from inside a callback; close after the generation.")
            with session.entry.last():
                session.close()
            if hasattr(self, "_ctx"):
                unwatch(self._ctx)
        if hasattr(self, "_stack"):
            super().close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _signature() -> inspect.Signature:
    """The stock constructor's signature with our arguments in front of its ``**kwargs``."""
    own = inspect.signature(Llama.__init__).parameters
    parameters = [p for p in _STOCK_INIT.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [p for p in own.values() if p.name.startswith("spec_")]
    return inspect.Signature(parameters)


Llama.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
Llama.generate.__signature__ = _STOCK_GENERATE  # type: ignore[attr-defined]
