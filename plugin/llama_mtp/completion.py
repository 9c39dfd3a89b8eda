"""The completion surface: text, stop sequences, streaming and log-probabilities of one completion.

Chunk by chunk what ``llama_cpp.Llama._create_completion`` yields, at a cost per token that does not
grow: stock detokenises the whole completion again for every token, takes the log-softmax of every
row that it holds, and can do so only where ``logits_all=True`` keeps n_ctx x n_vocab floats. Here a
token is detokenised once, stop sequences are looked for in what is new, and of a row of logits only
what the answer will show is kept, at the moment it is sampled.

Oddities of stock that a caller can see are kept, and marked "as stock" where they look like a
mistake. Ours differs where stock raises or repeats text:

- ``logprobs`` needs no ``logits_all``. With ``echo`` the prompt's rows are wanted too: the prompt
  is then evaluated anew, as many tokens at a time as the context has rows of logits for.
- ``logprobs`` while streaming, with a BOS among the tokens (an empty prompt puts one in front):
  stock gives the tokens after it twice, with the rows of others, or raises IndexError. Ours gives
  each once, with its own row.
- Log-probabilities are Python floats everywhere: stock's are NumPy scalars when not streaming,
  which ``json`` does not take.
- ``stopping_criteria`` sees the row of the last token, not what lies in unused memory.

A tokenizer of the caller's (``tokenizer=``, or a ``detokenize`` of a subclass) may make the text of
a token depend on those before it: such objects keep the stock completion, with its cost and limits.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from . import host
from .engine.generate import See
from .engine.session import shared_prefix
from .errors import ClosedError, StateError
from .text import Rows, Stream, Text

# Stock knows no FIM tokens ("TODO: Fix"): it marks prefix, suffix and middle with token 0.
_FIM = 0


def _prompt_tokens(llama: Any, prompt: str | list[int], suffix: str | None) -> list[int]:
    """Return what is evaluated before the completion: BOS, the prompt, FIM, EOS, as stock."""
    model = llama._model
    cls, sep = model.token_cls(), model.token_sep()
    bos = [cls if cls != -1 else llama.token_bos()]
    eos = [sep if sep != -1 else llama.token_eos()]
    verbatim = isinstance(prompt, list) and suffix is None
    if verbatim or not model.add_bos_token() or bos == [-1]:
        bos = []
    if verbatim or (not model.add_eos_token() and sep == -1):
        eos = []

    if isinstance(prompt, str):
        tokens = []
        if prompt:
            raw = prompt.encode("utf-8")
            tokens = llama.tokenize(raw, add_bos=False, special=suffix is None)
    else:
        tokens = prompt
    if suffix is None:
        return bos + tokens + eos

    after = []
    if suffix:
        # A character in front takes the space that the tokenizer would add, and is cut off.
        adds_space = llama.metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
        raw = (("☺" if adds_space else "") + suffix).encode("utf-8")
        after = llama.tokenize(raw, add_bos=False, special=False)[2 if adds_space else 0 :]
    before, after = [_FIM, *tokens], [_FIM, *after]
    return bos + (after + before if llama.spm_infill else before + after) + [_FIM] + eos


def _with_bias(processors: Any, logit_bias: dict[int, float]) -> Any:
    bias = {int(token): float(value) for token, value in logit_bias.items()}

    def add_bias(
        input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]
    ) -> npt.NDArray[np.single]:
        biased = np.copy(scores)
        for token, value in bias.items():
            biased[token] = value + scores[token]
        return biased

    mine = host.LogitsProcessorList([add_bias])
    # As stock, whose tokens ours are: extend() returns None, so that with processors of the
    # caller's neither they nor the bias take part (and their list grows).
    return mine if processors is None else processors.extend(mine)


def _look_up(llama: Any, tokens: list[int]) -> None:
    """Load the cached state that shares most with ``tokens``, where it beats what is there."""
    try:
        item = llama.cache[tokens]
        if shared_prefix(item.input_ids, tokens) > shared_prefix(llama._input_ids, tokens):
            llama.load_state(item)
            if llama.verbose:
                print("Llama._create_completion: cache hit", file=sys.stderr)
    except (KeyError, StateError):  # a cache shared by two models holds states of both
        if llama.verbose:
            print("Llama._create_completion: cache miss", file=sys.stderr)


def _save(llama: Any, tokens: list[int]) -> None:
    if llama.cache:
        if llama.verbose:
            print("Llama._create_completion: cache save", file=sys.stderr)
        llama.cache[tokens] = llama.save_state()


def _evaluate_with_rows(llama: Any, tokens: list[int], rows: Rows) -> None:
    """Evaluate a prompt anew and keep each row but the last, which generation starts from."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    width = min(llama.context_params.n_outputs_max, llama.n_batch)
    for start in range(0, len(tokens), width):
        batch = tokens[start : start + width]
        llama._batch.set_batch(batch=batch, n_past=start, logits_all=True)
        llama._ctx.decode(llama._batch)
        llama.input_ids[start : start + len(batch)] = batch
        llama.n_tokens = start + len(batch)
        for i, following in enumerate(tokens[start + 1 : start + len(batch) + 1]):
            rows.add(host.logits_row(llama._ctx, i, llama._n_vocab), batch[i], following)
    llama._requires_eval = False


class Completion:
    """What ``create_completion`` and ``create_chat_completion`` need, for a class with sessions."""

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """Yield a completion: ours where there is a session, else stock's."""
        llama: Any = self
        # A tokenizer of the caller's may say of a token what depends on those before it.
        own_text = (
            type(llama.tokenizer_) is not host.StockTokenizer
            or type(llama).detokenize is not host.StockLlama.detokenize
        )
        if llama._session is None or llama.draft_model is not None or own_text:
            stock: Any = super()
            return stock._create_completion(*args, **kwargs)
        return self._complete(*args, **kwargs)

    def _tokens(
        self,
        see: See,
        wanted: int,
        tokens: list[int],
        *,
        see_rows: bool,
        **sampling: Any,
    ) -> Iterator[int]:
        """Yield the tokens of ``generate``, each shown to ``see`` before that.

        A ``generate`` of the caller's is asked as it is, and knows nothing of ``wanted``.
        """
        llama: Any = self
        if getattr(llama.generate, "__func__", None) is type(llama)._own_generate:
            yield from llama._generate(
                tokens, (), sampling, wanted=wanted, see=see, see_rows=see_rows
            )
            return
        with contextlib.closing(llama.generate(tokens, **sampling)) as generated:
            for token in generated:
                with llama._session.entry:
                    see(token, llama._live_logits() if see_rows else None)
                yield token

    def _complete(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: dict[int, float] | None = None,
    ) -> Iterator[Any]:
        """Yield the chunks of a completion, or the one completion where not ``stream``.

        Arguments and dicts are those of ``llama_cpp.Llama.create_completion``. There is a session.
        """
        assert suffix is None or suffix.__class__ is str
        llama: Any = self
        session = llama._session
        if session.closed:
            raise ClosedError()

        frame = {
            "id": f"cmpl-{uuid.uuid4()!s}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model if model is not None else llama.model_path,
        }

        def chunk(string: str, details: Any = None, reason: str | None = None) -> dict[str, Any]:
            choice = {"text": string, "index": 0, "logprobs": details, "finish_reason": reason}
            return {**frame, "choices": [choice]}

        bos = llama.token_bos()
        prompt_tokens = _prompt_tokens(llama, prompt, suffix)
        n_prompt = len(prompt_tokens)
        if prompt_tokens[:2] == [bos] * 2:
            warnings.warn(
                f'Detected duplicate leading "{llama._model.token_get_text(bos)}" in prompt, '
                "this will likely reduce response quality, consider removing it...",
                RuntimeWarning,
                stacklevel=1,
            )
        if logit_bias is not None:
            logits_processor = _with_bias(logits_processor, logit_bias)
        if llama.verbose:
            llama._ctx.reset_timings()
        if n_prompt >= llama._n_ctx:
            raise ValueError(
                f"Requested tokens ({n_prompt}) exceed context window of {llama.n_ctx()}"
            )
        if max_tokens is None or max_tokens <= 0 or max_tokens + n_prompt >= llama._n_ctx:
            max_tokens = llama._n_ctx - n_prompt
        stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        stop_sequences = [s.encode("utf-8") for s in stops]

        text = Text(llama, chars=logprobs is not None)
        if len(prompt) == 0:  # else the completion would begin with a space
            text.append(bos)
        extra = len(text.tokens)  # tokens of the completion that nobody sampled
        out = Stream(text, stop_sequences)
        rows = Rows(text, logprobs, llama._n_vocab) if logprobs is not None else None
        echo_rows = rows if echo and not stream else None

        if llama.cache:
            _look_up(llama, prompt_tokens)
        llama.set_seed(seed if seed is not None else random.Random(llama._seed).randint(0, 2**32))
        if echo_rows is not None and not llama._logits_all:
            with session.entry:
                _evaluate_with_rows(llama, prompt_tokens, echo_rows)

        final = b""
        finish_reason = "length"
        incomplete = 0
        previous = prompt_tokens[-1] if prompt_tokens else bos
        ends = False
        live: Any = None

        def see(token: int, row: npt.NDArray[np.single] | None) -> None:
            # Row and vocabulary are read here, where nobody else can use the object or close it.
            nonlocal ends, previous
            if rows is not None and row is not None:
                if echo_rows is not None and len(rows) < n_prompt - 1:
                    for at in range(n_prompt - 1):  # logits_all: stock's memory has them
                        rows.add(llama.scores[at], *prompt_tokens[at : at + 2])
                rows.add(row, previous, token)
                previous = token
            ends = host.is_end_of_generation(llama._model, token)
            if not ends:
                text.piece(token)

        def criteria(input_ids: npt.NDArray[np.intc], row: npt.NDArray[np.single]) -> bool:
            nonlocal live
            live = row
            return bool(stopping_criteria(input_ids, row))

        with contextlib.closing(
            self._tokens(
                see,
                max_tokens,
                prompt_tokens,
                see_rows=rows is not None,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                typical_p=typical_p,
                temp=temperature,
                tfs_z=tfs_z,
                mirostat_mode=mirostat_mode,
                mirostat_tau=mirostat_tau,
                mirostat_eta=mirostat_eta,
                frequency_penalty=frequency_penalty,
                presence_penalty=presence_penalty,
                repeat_penalty=repeat_penalty,
                stopping_criteria=None if stopping_criteria is None else criteria,
                logits_processor=logits_processor,
                grammar=grammar,
            )
        ) as generated:
            for token in generated:
                if ends:
                    final = bytes(text.bytes)
                    finish_reason = "stop"
                    break

                text.append(token)

                # As stock: a first byte among the last three, as if there were always three.
                for k, byte in enumerate(text.bytes[-3:]):
                    k = 3 - k
                    for n, pattern in ((2, 192), (3, 224), (4, 240)):
                        if n > k and pattern & byte == pattern:
                            incomplete = n - k
                if incomplete > 0:
                    incomplete -= 1
                    continue  # as stock, past max_tokens too

                at = text.find_stop(stop_sequences)
                if at >= 0:
                    final = bytes(text.bytes[:at])
                    finish_reason = "stop"
                    break

                if stream and rows is not None:
                    for index, ready in out.single_tokens():
                        offset = len(prompt) + text.chars_before(index)
                        yield chunk(text.string(ready), rows.of_one(index - extra, ready, offset))
                elif stream:
                    for string in out.strings():
                        yield chunk(string)

                if len(text.tokens) >= max_tokens:
                    final = bytes(text.bytes)
                    finish_reason = "length"
                    break

        # Asked once more at the end, as stock, whatever ended it.
        if stopping_criteria is not None and stopping_criteria(llama._input_ids, live):
            final = bytes(text.bytes)
            finish_reason = "stop"

        if llama.verbose:
            llama._ctx.print_timings()

        if stream:
            for index, token, string in out.rest(skip_bos=rows is not None):
                details = None
                if rows is not None:  # as stock, whose offsets here count bytes
                    offset = len(prompt) + text.bytes_before(index)
                    details = rows.of_one(index - extra, token, offset)
                yield chunk(string, details)
            yield chunk("", None, finish_reason)
            _save(llama, prompt_tokens + text.tokens)
            if llama.cache and llama.verbose:
                print("Llama._create_completion: cache saved", file=sys.stderr)
            return

        _save(llama, prompt_tokens + text.tokens)
        string = final.decode("utf-8", errors="ignore")
        if echo:
            string = prompt + string  # type: ignore[operator]
        details = None
        if rows is not None:
            details = _logprobs(llama, prompt, prompt_tokens, text, rows, echo=echo)
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": len(text.tokens),
            "total_tokens": n_prompt + len(text.tokens),
        }
        yield {**chunk(string, details, finish_reason), "usage": usage}


def _logprobs(
    llama: Any,
    prompt: str | list[int],
    prompt_tokens: list[int],
    completion: Text,
    rows: Rows,
    *,
    echo: bool,
) -> dict[str, Any]:
    """Return the ``logprobs`` of a whole completion; with ``echo`` those of the prompt too."""
    bos = llama.token_bos()
    text, offset = completion, len(prompt)
    # As stock: the n-th token gets the n-th row. That row is the one before it only if there is a
    # BOS, which is dropped, in front of the prompt and none in front of the completion.
    own = len(prompt) == 0
    if echo:
        text, offset = Text(llama, chars=True), 0
        skip = 1 if prompt_tokens[0] == bos else 0
        own = own or not skip
        for token in prompt_tokens[skip:] + completion.tokens:
            text.append(token)
    values = rows.own if own else rows.next

    tokens: list[str] = []
    offsets: list[int] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for i, token in enumerate(text.tokens[: len(rows)]):
        if token == bos:
            continue
        string = completion.string(token)
        tokens.append(string)
        offsets.append(offset + text.chars_before(i))
        value = values[i]
        token_logprobs.append(value)
        top_logprobs.append(rows.top(i, string, value))
    if echo and tokens:  # nothing comes before the first
        token_logprobs[0] = top_logprobs[0] = None
    return {
        "tokens": tokens,
        "text_offset": offsets,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
    }
