"""One thread at a time in an object, and a close that waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BusyError, ClosedError


class Entry:
    """The lock of one object. ``with entry:`` is a step; the thread inside may come in again.

    A second thread gets BusyError, and ClosedError once a close has begun.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None  # thread that is inside
        self._depth = 0
        self._brief: list[None] = []  # one for each thread that comes in for a moment, or wants to
        self._closing = False

    @property
    def mine(self) -> bool:
        """Whether the calling thread is inside."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        self._come_in(wait=False)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Come in when the step of another thread is over, for reading or setting a number.

        A step that begins meanwhile waits for that moment.
        """
        self._brief.append(None)
        try:
            self._come_in(wait=True)
            try:
                yield
            finally:
                self.__exit__()
        finally:
            self._brief.pop()

    @contextmanager
    def last(self) -> Iterator[None]:
        """Let nobody in any more, and come in when the thread that is inside has left.

        Raises BusyError where that thread is the caller's: inside a callback.
        """
        if self.mine:
            raise BusyError("close() from inside a callback; close after the generation.")
        self._closing = True
        with self._lock:
            yield

    def _come_in(self, *, wait: bool) -> None:
        got = False
        try:
            got = self._lock.acquire(blocking=wait or bool(self._brief))
            if not got:
                raise ClosedError() if self._closing else BusyError()
            # After the lock was taken: a close may have begun, and ended, before that.
            if self._closing and not self.mine:
                raise ClosedError()
            self._owner, self._depth = threading.get_ident(), self._depth + 1
        except BaseException:  # an interrupt too
            if got:
                self._lock.release()
            raise
