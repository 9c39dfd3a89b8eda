"""Measure a head on prompts that it never saw: acceptance of each draft position, greedy.

    python examples/train_head/evaluate.py smollm2_135m_nextn.gguf --work work

The trunk answers the nine held-out prompts greedily. Then the head drafts from every place of each
answer, from the weights of the exported file. Three views of the same drafts are printed:

* *every place*: share of places where draft 1 is the trunk's token; of those, where draft 2 is; ...
* *rounds*: the same in the places where a round of draft and verify at that depth really begins,
  which are the harder ones, and
* *length*: tokens that one pass of the trunk yields on average (1 without a head), and
* *fresh*: draft 1 at the places whose last eight tokens did not stand in the text before. A small
  model under greedy decoding falls into loops, which any head drafts well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from common import ANSWER, CHAT, Base, Floats, base_model, load_base
from generate import prepare
from gguf import GGUFReader
from gguf.quants import dequantize
from host import Trunk as Host
from model import Head
from prompts import HELD_OUT
from torch.nn import functional as F


def read_head(path: Path) -> dict[str, Floats]:
    """Return the head's weights as the file stores them, by part name."""
    head = {}
    for t in GGUFReader(path).tensors:
        part = t.name.split(".", 2)[2].removesuffix(".weight")
        head[part] = np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)
    return head


def answers(
    host: Host, prompts: dict[str, str], n_predict: int
) -> dict[str, tuple[list[int], Floats, int]]:
    """Answer all prompts greedily, side by side: tokens, hidden rows, length of the prompt."""
    tokens = {name: host.tokenize(CHAT + text + ANSWER) for name, text in prompts.items()}
    size = {name: len(t) for name, t in tokens.items()}
    rows: dict[str, list[Floats]] = {name: [] for name in prompts}
    end = host.tokenize(ANSWER)[0]
    following: dict[str, int] = {}
    for s, name in enumerate(prompts):
        n = size[name]
        logits, hidden = host.decode(
            np.array(tokens[name], dtype=np.int32),
            np.arange(n, dtype=np.int32),
            np.full(n, s, dtype=np.int32),
            np.arange(n) == n - 1,
        )
        rows[name].extend(hidden.copy())
        following[name] = int(logits[-1].argmax())
    live = list(prompts)
    for _ in range(n_predict):
        live = [name for name in live if following[name] != end]
        if not live:
            break
        for name in live:
            tokens[name].append(following[name])
        order = list(prompts)
        logits, hidden = host.decode(
            np.array([following[name] for name in live], dtype=np.int32),
            np.array([len(tokens[name]) - 1 for name in live], dtype=np.int32),
            np.array([order.index(name) for name in live], dtype=np.int32),
            np.ones(len(live), dtype=np.bool_),
        )
        for i, name in enumerate(live):
            rows[name].append(hidden[i].copy())
            following[name] = int(logits[i].argmax())
    return {
        name: ([*tokens[name], following[name]], np.stack(rows[name]), size[name])
        for name in prompts
    }


@torch.no_grad()
def accepted(
    head: Head, base: Base, output: Floats, tokens: list[int], hidden: Floats, start: int, n: int
) -> npt.NDArray[np.int64]:
    """Return how many of ``n`` drafts are right from each place where the answer goes on.

    Place p has seen the tokens up to p; its drafts are for p + 1, p + 2 and so on.
    """
    x = torch.tensor(tokens)
    t = len(hidden)
    before = torch.from_numpy(hidden).roll(1, dims=0)
    before[0] = 0
    embedding = torch.from_numpy(base.token_embd)[x[:t]]
    allowed = torch.ones(t, t, dtype=torch.bool).tril()[None, None]
    steps = head.steps(embedding[None], before[None], allowed, n)
    run = np.zeros(t, dtype=np.int64)
    for k, row in enumerate(steps):
        normed = head.norm(row[0], head.head_norm)
        guess = F.linear(normed, torch.from_numpy(output)).argmax(-1)
        right = (guess == x[k + 1 : k + 1 + len(guess)]).numpy()
        run[: len(right)] += right & (run[: len(right)] == k)
    # From place start on: the token at `start` itself comes out of the prompt's own pass.
    return run[start : t - n + 1]


def rounds(run: npt.NDArray[np.int64], depth: int) -> npt.NDArray[np.int64]:
    """Return the accept counts of the rounds that really take place at ``depth``."""
    counts, p = [], 0
    while p < len(run):
        counts.append(min(int(run[p]), depth))
        p += counts[-1] + 1
    return np.array(counts, dtype=np.int64)


def conditional(run: npt.NDArray[np.int64], depth: int) -> list[float]:
    """Return the share of drafts 1 to ``depth`` accepted, each given that those before were."""
    return [float((run > k).sum() / max(1, (run >= k).sum())) for k in range(depth)]


def fresh(tokens: list[int], start: int, n: int, gram: int = 8) -> npt.NDArray[np.bool_]:
    """Return which of ``n`` places from ``start`` on end a run of tokens that is new."""
    seen: set[tuple[int, ...]] = set()
    new = []
    for p in range(start + n):
        key = tuple(tokens[max(0, p - gram + 1) : p + 1])
        if p >= start:
            new.append(key not in seen)
        seen.add(key)
    return np.array(new, dtype=np.bool_)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head", type=Path, help="GGUF of the head")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for all results")
    parser.add_argument("--base", type=Path, default=None, help="GGUF of the base model")
    parser.add_argument("--type", default="Q4_0", help="tensor type of the trunk")
    parser.add_argument("--tokens", type=int, default=192, help="length of an answer at most")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = prepare(args.work, args.base or base_model(), args.type)
    base = load_base(args.base or base_model())
    output = next(t for t in GGUFReader(path).tensors if t.name == "output.weight")
    matrix = np.array(dequantize(output.data, output.tensor_type), dtype=np.float32)
    head = Head(base, read_head(args.head))
    with Host(path, n_seq=len(HELD_OUT), n_ctx=len(HELD_OUT) * 768, threads=args.threads) as host:
        texts = answers(host, HELD_OUT, args.tokens)
    runs, news = {}, {}
    print(f"{'prompt':18} places  every place     rounds          length  fresh")
    for name, (tokens, hidden, size) in texts.items():
        run = runs[name] = accepted(head, base, matrix, tokens, hidden, size, args.depth)
        new = news[name] = fresh(tokens, size, len(run))
        if len(run):
            print(line(name, run, rounds(run, args.depth), args.depth, new))
    run = np.concatenate(list(runs.values()))
    real = np.concatenate([rounds(r, args.depth) for r in runs.values()])
    print(line("all", run, real, args.depth, np.concatenate(list(news.values()))))
    means = [(r > 0).mean() for r in runs.values() if len(r)]
    print(f"every place, mean of the prompts: {np.mean(means):.3f}")
    single = np.concatenate([rounds(r, 1) for r in runs.values()])
    print(f"rounds at depth 1: {single.mean():.3f} accepted")
    share = " ".join(f"{(real > k).mean():.3f}" for k in range(args.depth))
    print(f"rounds at depth {args.depth}, not conditional: {share}")


def line(
    name: str,
    run: npt.NDArray[np.int64],
    real: npt.NDArray[np.int64],
    depth: int,
    new: npt.NDArray[np.bool_],
) -> str:
    """Format one row of the table."""
    places = " ".join(f"{a:.2f}" for a in conditional(run, depth))
    drafts = " ".join(f"{a:.2f}" for a in conditional(real, depth))
    share = f"{(run[new] > 0).mean():.2f} of {new.sum()}" if new.any() else "-"
    return f"{name:18} {len(run):6}  {places:14}  {drafts:14}  {1 + real.mean():6.2f}  {share}"


if __name__ == "__main__":
    main()
