"""Whether a joined file still says what its trunk says.

Every file is loaded by a process of its own: libllama ends the process on a file that it cannot
run, and the weights of one are gone before those of the next come.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelFileError
from . import child

_N_PROMPT = 16


def compare_greedy(
    base: Path, joined: Path, *, n_tokens: int = 24, n_threads: int | None = None
) -> None:
    """Load one file after the other and compare greedy tokens after the same prompt.

    Neither drafts: the two texts come from the same tensors by the same kernels, and have to be
    identical. Then the joined file is loaded once more with its head, and has to draft.

    Raises:
        ModelFileError: they differ, or a file does not run.
    """
    expected = _ask(base, n_tokens, n_threads, "none")
    found = _ask(joined, n_tokens, n_threads, "none")
    if expected != found:
        raise ModelFileError(
            f"The joined file does not continue a text as {base} does: {found} instead of "
            f"{expected}. Graft again; the base may have been changed while it was read."
        )
    _ask(joined, n_tokens, n_threads, "draft-mtp")


def _ask(path: Path, n_tokens: int, n_threads: int | None, spec_type: str) -> list[int]:
    question = {
        "path": str(path),
        "n_tokens": n_tokens,
        "n_threads": n_threads,
        "spec_type": spec_type,
    }
    reply = child.ask(__name__, question)
    if reply.answer is None:
        raise ModelFileError(
            f"{path} does not run with spec_type={spec_type!r}: {reply.last_words}. "
            "Load the base and the head's own file by themselves to see which is at fault."
        )
    tokens: list[int] = reply.answer["tokens"]
    return tokens


def _answer(
    path: str, n_tokens: int, n_threads: int | None, spec_type: str
) -> dict[str, list[int]]:
    from ..llama import Llama

    with Llama(
        path,
        n_ctx=_N_PROMPT + n_tokens + 8,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        spec_type=spec_type,
        verbose=True,  # the log tells why a file does not run
    ) as llama:
        # Ids spread over the vocabulary; any text will do, as it is the same for both.
        prompt = [(k + 1) * llama.n_vocab() // (_N_PROMPT + 2) for k in range(_N_PROMPT)]
        stream = llama.generate(prompt, temp=0.0)
        tokens = [int(token) for token, _ in zip(stream, range(n_tokens), strict=False)]
        return {"tokens": tokens}


if __name__ == "__main__":
    child.serve(_answer)
