"""The version of this package; the native module is stamped with the same."""

__version__ = "0.1.0"
