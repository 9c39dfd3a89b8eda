"""The stock class, whose text goes through a session: generate, eval, sample, reset.

Generation goes round by round through the session; what else touches the context keeps it in step.
Without a session everything is stock.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import host
from ..errors import NativeError, RollbackRefused
from .generation import Generation
from .native import ffi
from .session import Session

_STOCK_GENERATE = inspect.signature(host.StockLlama.generate)
_SAMPLING = tuple(inspect.signature(host.StockLlama._init_sampler).parameters)[1:]
_NO_TOKEN = -1  # llama.cpp's LLAMA_TOKEN_NULL

See = Callable[[int, "npt.NDArray[np.single] | None"], object]


def alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread at a time into a method of an object with a session; BusyError for others."""

    @functools.wraps(method)
    def alone(self: GeneratingLlama, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            return method(self, *args, **kwargs)
        with self._session.entry:
            return method(self, *args, **kwargs)

    return alone


class GeneratingLlama(host.StockLlama):
    """``llama_cpp.Llama`` with a session, or without one."""

    n_tokens: int  # set by the stock class: positions that count as evaluated
    _session: Session | None = None
    _callback_error: BaseException | None = None  # of a logits processor

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield tokens after a prompt: the arguments and tokens of ``llama_cpp.Llama.generate``.

        ``send(tokens)`` proposes what may come next, as in stock: the model decides, the text does
        not change. Raises ClosedError after ``close()``.
        """
        yield from self._generate(tokens, args, kwargs)

    _own_generate = generate

    def _generate(
        self,
        tokens: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        wanted: int | None = None,
        see: See | None = None,
        see_rows: bool = False,
    ) -> Generator[int, Sequence[int] | None, None]:
        """As :meth:`generate`, for a caller who knows more.

        Args:
            wanted: most tokens that will be asked for; nothing is drafted beyond them.
            see: called with every token before it is yielded, while no other thread can use the
                object, and with the logits that it was sampled from, if ``see_rows``, else None.
        """
        session = self._session
        if session is None or self.draft_model is not None:
            yield from super().generate(tokens, *args, **kwargs)
            return
        bound = _STOCK_GENERATE.bind(self, tokens, *args, **kwargs)
        bound.apply_defaults()
        criteria = bound.arguments["stopping_criteria"]
        needs_row = see_rows or criteria is not None
        with session.entry:
            generation = self._begin(list(tokens), bound.arguments, wanted)
        sent: Sequence[int] | None = None
        token: int | None = None
        try:
            while True:
                with session.entry:
                    if token is None:
                        token = self._sample_live(generation.chain)
                    else:
                        token = self._next(session, generation, token, sent)
                    row = self._live_logits() if needs_row else None
                    if see is not None and criteria is None:
                        see(token, row)
                if criteria is not None:  # outside of the lock: it may close the object
                    if criteria(self._input_ids, row):
                        return
                    if see is not None:
                        with session.entry:
                            see(token, row)
                sent = yield token
        finally:
            session.finish(generation)

    def _begin(self, prompt: list[int], options: dict[str, Any], wanted: int | None) -> Generation:
        """Evaluate a prompt, and return the generation that goes on from it."""
        session = self._session
        assert session is not None
        chain = self._init_sampler(**{k: v for k, v in options.items() if k in _SAMPLING})
        self._sampler = chain
        address = ffi.cast("void *", host.address_of_sampler(chain))
        generation = Generation(chain, address, sampling=round(options["temp"], 1))
        if options["reset"] and self.n_tokens > 0:
            prompt = self._reuse(prompt)
        elif options["reset"]:
            self.reset()
        session.begin(generation, self._input_ids)
        if prompt:
            self._eval_prompt(prompt)
        generation.text = self._input_ids.tolist()
        end = self._n_ctx + 1
        generation.end = end if wanted is None else min(len(generation.text) + wanted, end)
        session.current = generation
        return generation

    def _take_up(self, session: Session, generation: Generation) -> None:
        """Go back to a generation's own text after something else has used the object."""
        if any(token < 0 for token in generation.text):
            raise NativeError("The text before this token holds an image and has been overtaken.")
        self._sampler = generation.chain
        rest = self._reuse(generation.text) if self.n_tokens else generation.text
        session.begin(generation, self._input_ids)
        if rest:
            self.eval(rest)
        session.current = generation

    def _next(
        self, session: Session, generation: Generation, last: int, sent: Sequence[int] | None
    ) -> int:
        """Return the token after ``last``; stock's invariant at every sample: last is evaluated."""
        if session.current is not generation or self.n_tokens != len(generation.text):
            self._take_up(session, generation)
        generation.text.append(last)
        pos = self.n_tokens
        if pos >= len(self.input_ids) or pos >= self._n_ctx:
            self.eval([last])  # stock goes on to the end of the padded memory, and fails there
            session.current = generation
            return self._sample_live(generation.chain)
        self.input_ids[pos] = last
        try:
            self.n_tokens = pos + 1
            self._requires_eval = False
            token = self._step(session, generation, last, pos, sent)
        except BaseException:  # an interrupt too: only what was evaluated counts
            if self.n_tokens == pos + 1 > session.n_past:
                self.n_tokens = pos
            raise
        if self._logits_all:
            self.scores[pos] = self._live_logits()
        self._raise_callback_error()
        return token

    def _step(
        self,
        session: Session,
        generation: Generation,
        last: int,
        pos: int,
        sent: Sequence[int] | None,
    ) -> int:
        try:
            return session.next(generation, last, pos, self._input_ids, sent)
        except RollbackRefused:
            self.n_tokens = pos
            self._evaluate_again()
            self.n_tokens = pos + 1
            return session.next(generation, last, pos, self._input_ids, sent)

    def _sample_live(self, chain: Any) -> int:
        token = int(chain.sample(self._ctx, self._live_row()))
        self._raise_callback_error()
        return token

    def _live_logits(self) -> npt.NDArray[np.single]:
        """Copy the logits of the last position, float32 of shape (n_vocab,)."""
        session = self._session
        assert session is not None
        return host.logits_row(self._ctx, session.live_row, self._n_vocab)

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

    def _reuse(self, prompt: list[int]) -> list[int]:
        """Cut the context to what it shares with ``prompt`` and return the rest to evaluate.

        Unlike stock, never on the memory's word alone: see ``mtp_reuse``.
        """
        session = self._session
        assert session is not None
        session.current = None
        kept = session.reuse(self._input_ids, np.asarray(prompt, dtype=np.intc))
        if kept == 0:
            self.reset()
        elif kept < max(len(prompt), self.n_tokens):
            self.n_tokens = kept
            self._requires_eval = True
        return prompt[kept:]

    def _eval_prompt(self, prompt: list[int]) -> None:
        """Evaluate a prompt, with a pause for a checkpoint a few tokens before its end."""
        session = self._session
        assert session is not None
        end = self.n_tokens + len(prompt)
        with session.prompt(end):
            before = session.checkpoint_at(end) - self.n_tokens
            if before > 0:
                self.eval(prompt[:before])
                session.save_checkpoint(self._input_ids)
                prompt = prompt[before:]
            self.eval(prompt)

    @alone
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the ``n_tokens`` that count so far, as stock does."""
        session = self._session
        if session is not None:
            session.current = None
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

    @alone
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Sample from the last position, or the one that ``idx`` names, as stock does."""
        if self._session is not None:
            position = self.n_tokens - 1 if idx is None else idx
            row = self._live_row() + position - (self.n_tokens - 1)
            idx = row + self.n_tokens  # stock hands the host idx - n_tokens
        token = int(super().sample(*args, idx=idx, **kwargs))
        self._raise_callback_error()
        return token

    @alone
    def reset(self) -> None:
        """Forget the text; the next evaluation starts at position 0."""
        super().reset()
        if self._session is not None:
            self._session.current = None
            self._session.book()
            if self._session.setup.recurrent:
                self._session.forget(0)  # stock has just cleared the memory

    # ---- Python callbacks: ctypes would swallow what they raise

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        processors = kwargs.get("logits_processor")
        if self._session is not None and processors is not None:
            kwargs["logits_processor"] = [self._guard(p) for p in processors]
        return super()._init_sampler(*args, **kwargs)

    def _guard(self, processor: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(input_ids: Any, scores: Any) -> Any:
            if self._callback_error is None:
                try:
                    return processor(input_ids, scores)
                except BaseException as e:
                    self._callback_error = e
            return scores

        return guarded

    def _raise_callback_error(self) -> None:
        error, self._callback_error = self._callback_error, None
        if error is not None:
            raise error


GeneratingLlama.generate.__signature__ = _STOCK_GENERATE  # type: ignore[attr-defined]
