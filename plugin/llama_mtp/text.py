"""The text of a completion: tokens to bytes, what can be streamed, and log-probabilities.

A token is detokenised once, and of a row of logits only what the answer will show is kept.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import host


class Text:
    """Tokens and their text, each token detokenised once.

    ``chars`` asks for :meth:`chars_before`, the length in characters of what a prefix decodes to.
    """

    def __init__(self, llama: Any, *, chars: bool = False):
        self.tokens: list[int] = []
        self.bytes = bytearray()
        self._bos = llama.token_bos()
        self._detokenize = llama.detokenize
        self._pieces: dict[int, bytes] = {}
        self._strings: dict[int, str] = {}
        self._started = False  # a byte has come, be it the space that is dropped
        self._scanned = 0
        # What one decode of the whole would drop (errors="ignore"), the incremental one drops too.
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore") if chars else None
        self._chars = array("q", [0])
        self._ends = array("q", [0])

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token by itself."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._detokenize([token])
        return piece

    def string(self, token: int) -> str:
        """Return what the bytes of a token by itself decode to, the same object every time."""
        string = self._strings.get(token)
        if string is None:
            string = self._strings[token] = self.piece(token).decode("utf-8", errors="ignore")
        return string

    def join(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of tokens in a row: a space at the start goes where BOS comes first."""
        if len(tokens) == 1:
            return self.piece(tokens[0])
        joined = b"".join(map(self.piece, tokens))
        return joined[1:] if tokens and tokens[0] == self._bos and joined[:1] == b" " else joined

    def append(self, token: int) -> None:
        self.tokens.append(token)
        piece = self.piece(token)
        if piece and not self._started:
            self._started = True
            if self.tokens[0] == self._bos and piece[:1] == b" ":
                piece = piece[1:]
        self.bytes += piece
        if self._decoder is not None:
            self._chars.append(self._chars[-1] + len(self._decoder.decode(piece)))
            self._ends.append(len(self.bytes))

    def chars_before(self, index: int) -> int:
        return self._chars[index]

    def bytes_before(self, index: int) -> int:
        return self._ends[index]

    def find_stop(self, stops: Sequence[bytes]) -> int:
        """Return where the first of ``stops`` that occurs begins, -1 if none does.

        First in the order of the list, as stock. Only what has come since the last call is read.
        """
        scanned, self._scanned = self._scanned, len(self.bytes)
        for stop in stops:
            at = self.bytes.find(stop, max(0, scanned + 1 - max(1, len(stop))))
            if at >= 0:
                return at
        return -1


class Stream:
    """What of a text has been handed out, and what may be next.

    Held back is what may yet become a stop sequence, and bytes that are no character yet.
    """

    def __init__(self, text: Text, stops: Sequence[bytes]):
        self.returned = 0  # tokens handed out
        self._text = text
        self._stops = stops
        self._tried = 0  # so many tokens from there on are no whole characters...
        self._broken = False  # ...and never will be

    def _free(self, remaining: bytes) -> int:
        """Return how many of the remaining bytes cannot be the start of a stop sequence."""
        held = 0
        for stop in self._stops:
            for n in range(min(len(stop), len(remaining)), held, -1):
                if remaining.endswith(stop[:n]):
                    held = n
                    break
        return len(remaining) - held

    def strings(self) -> Iterator[str]:
        """Yield the strings of whole characters that can go out now, in the fewest tokens each."""
        if self._broken:
            return
        tokens = self._text.tokens[self.returned :]
        free = self._free(self._text.join(tokens))
        start = end = 0
        while start < len(tokens):
            for n in range(self._tried + 1, len(tokens) - start + 1):
                raw = self._text.join(tokens[start : start + n])
                try:
                    string = raw.decode("utf-8")
                    break
                except UnicodeDecodeError as e:
                    self._tried = n
                    if e.reason != "unexpected end of data":
                        self._broken = True
                        return
            else:
                return
            end += len(raw)
            if end > free:
                return
            start += n
            self.returned += n
            self._tried = 0
            yield string

    def single_tokens(self) -> Iterator[tuple[int, int]]:
        """Yield (index, token) of what can go out now, token by token: for log-probabilities."""
        tokens = self._text.tokens[self.returned :]
        free = self._free(self._text.join(tokens))
        end = 0
        for token in tokens:
            if token == self._text._bos:
                self.returned += 1
                continue
            end += len(self._text.piece(token))
            if end > free:
                return
            self.returned += 1
            yield self.returned - 1, token

    def rest(self, *, skip_bos: bool) -> Iterator[tuple[int, int, str]]:
        """Yield (index, token, string) of the end of a text, up to a stop sequence.

        Each token is decoded by itself, as stock: bytes of a character that spans tokens go.
        """
        tokens = self._text.tokens[self.returned :]
        raw = self._text.join(tokens)
        stops = [raw.index(stop) for stop in self._stops if stop in raw]
        end = min(stops) if stops else len(raw)
        at = 0
        for token in tokens:
            piece = self._text.piece(token)
            at += len(piece)
            self.returned += 1
            if skip_bos and token == self._text._bos:
                continue
            if at >= end:
                piece = piece[: len(piece) - (at - end)]
            yield self.returned - 1, token, piece.decode("utf-8", errors="ignore")
            if at >= end:
                return


class Rows:
    """Of each row of logits what an answer shows: the top N, and the tokens asked for.

    A row has 16 + 8 N bytes, whatever the vocabulary. ``own`` is the log-probability of the token
    that stands at the row's position, ``next`` that of the one sampled from it.
    """

    def __init__(self, text: Text, logprobs: int, n_vocab: int):
        self._text = text
        self.n_top = len(range(n_vocab)[:logprobs])  # as a slice: below 0 it counts from the end
        self.next = array("f")
        self.own = array("f")
        self._ids = array("i")
        self._values = array("f")

    def __len__(self) -> int:
        return len(self.next)

    def add(self, logits: npt.NDArray[np.single], own: int, sampled: int) -> None:
        values = host.StockLlama.logits_to_logprobs(logits)
        top = _largest(values, self.n_top)
        self.own.append(values[own])
        self.next.append(values[sampled])
        self._ids.extend(top.tolist())
        self._values.extend(values[top].tolist())
        for token in top.tolist():
            self._text.piece(token)  # now: who reads the row may do so after close()

    def top(self, row: int, string: str, value: float) -> dict[str, float]:
        """Return string -> log-probability of a row's largest, then of the token ``string``."""
        span = slice(row * self.n_top, (row + 1) * self.n_top)
        top = {
            self._text.string(token): value
            for token, value in zip(self._ids[span], self._values[span], strict=True)
        }
        top[string] = value
        return top

    def of_one(self, row: int, token: int, offset: int) -> dict[str, Any]:
        """Return the ``logprobs`` of a chunk with one token."""
        string = self._text.string(token)
        value = self.next[row]
        return {
            "tokens": [string],
            "text_offset": [offset],
            "token_logprobs": [value],
            "top_logprobs": [self.top(row, string, value)],
        }


def _largest(values: npt.NDArray[np.single], n: int) -> npt.NDArray[np.intp]:
    """Return the indices of the ``n`` largest, in falling order; of equals the last comes first."""
    if n == 0:
        return np.empty(0, dtype=np.intp)
    bound = np.partition(values, len(values) - n)[len(values) - n]
    candidates = np.flatnonzero(values >= bound)
    return candidates[np.lexsort((candidates, values[candidates]))[::-1][:n]]
