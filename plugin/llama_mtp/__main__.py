"""``python -m llama_mtp``: the command line, where the script ``llama-mtp`` is not on the PATH."""

from .commands.main import main

if __name__ == "__main__":
    main()
