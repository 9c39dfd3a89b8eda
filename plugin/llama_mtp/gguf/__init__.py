"""GGUF files as bytes: reading, writing and requantising, with no knowledge of any architecture."""
