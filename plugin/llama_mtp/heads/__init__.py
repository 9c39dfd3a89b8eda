"""NextN heads in GGUF files: which there are, whether they run, and how a file gets one."""
