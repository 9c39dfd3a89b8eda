"""Reading and writing GGUF files: what a file holds, and whether its head can be executed."""
