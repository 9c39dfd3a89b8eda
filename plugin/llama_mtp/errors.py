"""The exception tree: what can go wrong, as Python sees it."""

from __future__ import annotations


class LlamaMtpError(Exception):
    """Base of every error that this package raises on its own account."""

    def __str__(self) -> str:
        # Names that come from files need not be text, and a message has to be printable.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class ModelFileError(LlamaMtpError, ValueError):
    """The GGUF is unreadable, or lacks what the requested spec type needs."""


class FileWriteError(LlamaMtpError, OSError):
    """A file cannot be written: no space or permission, or it must not be overwritten."""


class SpecTypeError(LlamaMtpError, ValueError):
    """A spec type is unknown, or cannot be honoured with the other arguments."""


class StateError(LlamaMtpError, ValueError):
    """A saved state is damaged, or belongs to another model or to other sizes."""


class HostVersionError(LlamaMtpError, RuntimeError):
    """The installed llama-cpp-python is not one that the plugin knows how to drive."""


class NativeError(LlamaMtpError, RuntimeError):
    """The native engine refused a call or the host failed under it."""


class BusyError(NativeError):
    """Two threads entered one object at once."""

    def __init__(
        self,
        text: str = "Another thread is using this Llama object; give each thread its own.",
    ) -> None:
        super().__init__(text)


class ClosedError(NativeError):
    """The object was used after ``close()``."""

    def __init__(self, text: str = "The model is closed; make a new Llama object.") -> None:
        super().__init__(text)


class RollbackRefused(NativeError):
    """The target cannot go back to the asked position; its text has to be evaluated again."""
