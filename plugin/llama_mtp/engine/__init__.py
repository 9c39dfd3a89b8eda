"""The engine's Python side: sessions, their lifetime and statistics, over the native module."""
