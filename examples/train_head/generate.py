"""Let the base model write the training set: prompts, answers, and its own hidden rows with them.

    python examples/train_head/generate.py --work work --minutes 30

Every sequence is one chat. A quarter of the user's turns are filled-in templates; the others are
sampled by the model itself, some from an opening of a few words, so that no two are alike. Answers
are greedy or sampled, and no prompt is answered twice. Shards appear in WORK/data one by one.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import ANSWER, CHAT, base_model, initial_head, load_base
from export import write_head
from host import Floats, Trunk
from prompts import draw

from llama_mtp.demo.join import join_smollm2

TOP = 16  #: probabilities kept of each prediction of the trunk
ROOM = 640  #: tokens a sequence may hold
SHARD_TOKENS = 25_000


@dataclass
class Chat:
    """One sequence as it grows. Row ``p`` predicts token ``p + 1``."""

    forced: deque[int]
    temperature: float  # of the answer
    budget: int  # tokens of the answer at most
    turn: int = 0  # tokens the user's turn may still grow; 0 once it is complete
    tokens: list[int] = field(default_factory=list)
    hidden: list[Floats] = field(default_factory=list)
    top_id: list[npt.NDArray[np.int32]] = field(default_factory=list)
    top_p: list[Floats] = field(default_factory=list)


class Writer:
    """Collects finished chats and writes them as shards, each whole or not at all."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.count = len(list(folder.glob(f"{seed:04d}-*.npz")))
        self.total = 0
        self._chats: list[Chat] = []
        self._size = 0

    def add(self, chat: Chat) -> None:
        """Take a finished chat."""
        self._chats.append(chat)
        self._size += len(chat.tokens)
        self.total += len(chat.tokens)
        if self._size >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if not self._chats:
            return
        path = self.folder / f"{self.seed:04d}-{self.count:04d}.npz"
        temporary = path.with_suffix(".part")
        chats = self._chats
        with temporary.open("wb") as file:
            np.savez(
                file,
                length=np.array([len(c.tokens) for c in chats], dtype=np.int32),
                temperature=np.array([c.temperature for c in chats], dtype=np.float32),
                token=np.concatenate([np.array(c.tokens, dtype=np.int32) for c in chats]),
                hidden=np.concatenate([np.stack(c.hidden) for c in chats]).astype(np.float16),
                top_id=np.concatenate([np.stack(c.top_id) for c in chats]),
                top_p=np.concatenate([np.stack(c.top_p) for c in chats]).astype(np.float16),
            )
        temporary.replace(path)
        self.count += 1
        self._chats, self._size = [], 0


def predictions(logits: Floats, span: float = 12.0) -> list[tuple[npt.NDArray[np.int64], Floats]]:
    """Return, for each row, the likely tokens, best first, and their probabilities.

    Only tokens within ``span`` of the best logit are looked at: a cheap scan finds them.
    """
    best = logits.max(axis=1)
    row, column = np.nonzero(logits > (best - span)[:, None])
    starts = np.searchsorted(row, np.arange(len(logits) + 1))
    result = []
    for i in range(len(logits)):
        ids = column[starts[i] : starts[i + 1]]
        values = logits[i, ids]
        if len(ids) > 256:
            keep = np.argpartition(-values, 256)[:256]
            ids, values = ids[keep], values[keep]
        order = np.argsort(-values)
        ids, p = ids[order], np.exp(values[order] - best[i])
        result.append((ids, (p / p.sum()).astype(np.float32)))
    return result


def choose(
    ids: npt.NDArray[np.int64], p: Floats, temperature: float, rng: np.random.Generator
) -> int:
    """Sample a token at ``temperature`` (0: the best), without the tail below 2 % of the best."""
    if temperature == 0:
        return int(ids[0])
    w = p ** (1.0 / temperature)
    w = np.where(w >= 0.02 * w[0], w, 0)
    return int(ids[min(np.searchsorted(np.cumsum(w), rng.random() * w.sum()), len(ids) - 1)])


def generate(trunk: Trunk, out: Path, *, n_seq: int, minutes: float, seed: int) -> None:
    """Fill ``out`` with shards until the time is over."""
    start = time.monotonic()
    deadline = start + 60 * minutes
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    writer = Writer(out, seed)
    prefix, answer = trunk.tokenize(CHAT), trunk.tokenize(ANSWER)
    end = answer[0]
    special = set(range(17)) - {end}  # chat markers and the like never belong into text
    blank_id = np.zeros(TOP, dtype=np.int32)
    blank_p = np.zeros(TOP, dtype=np.float32)

    # Every chat starts alike: the rows of the common start stay in each sequence's cache.
    n = len(prefix)
    shared: list[Floats] = []
    for s in range(n_seq):
        _, rows = trunk.decode(
            np.array(prefix, dtype=np.int32),
            np.arange(n, dtype=np.int32),
            np.full(n, s, dtype=np.int32),
            np.arange(n) == n - 1,
        )
        shared = list(rows.copy())

    def new_chat() -> Chat:
        text, unfinished = draw(dice)
        chat = Chat(
            forced=deque(trunk.tokenize(text) + ([] if unfinished else answer)),
            temperature=dice.choice((0.0, 0.0, 0.5, 0.8)),
            budget=dice.randint(64, 288),
            turn=(160 if "```" in text or ":\n\n" in text else 64) if unfinished else 0,
            tokens=list(prefix),
            hidden=list(shared),
            top_id=[blank_id] * n,
            top_p=[blank_p] * n,
        )
        if not chat.forced:  # repeat the last token of the start to get its prediction
            chat.forced.append(chat.tokens.pop())
            for column in (chat.hidden, chat.top_id, chat.top_p):
                column.pop()
        return chat

    chats = [new_chat() for _ in range(n_seq)]
    for s, chat in enumerate(chats):
        trunk.forget(s, len(chat.tokens))
    report = start
    while time.monotonic() < deadline:
        token: list[int] = []
        pos: list[int] = []
        seq: list[int] = []
        output: list[bool] = []
        spare = trunk.n_batch - n_seq
        for s, chat in enumerate(chats):
            take = min(len(chat.forced), 1 + spare)
            spare -= take - 1
            for _ in range(take):
                pos.append(len(chat.tokens))
                token.append(chat.forced.popleft())
                chat.tokens.append(token[-1])
                seq.append(s)
                output.append(not chat.forced)
        logits, hidden = trunk.decode(
            np.array(token, dtype=np.int32),
            np.array(pos, dtype=np.int32),
            np.array(seq, dtype=np.int32),
            np.array(output),
        )
        guesses = iter(predictions(logits))
        rows = hidden.copy()
        for i, s in enumerate(seq):
            chat = chats[s]
            chat.hidden.append(rows[i])
            if not output[i]:
                chat.top_id.append(blank_id)
                chat.top_p.append(blank_p)
                continue
            ids, p = next(guesses)
            top_id, top_p = blank_id.copy(), blank_p.copy()
            k = min(TOP, len(ids))
            top_id[:k], top_p[:k] = ids[:k], p[:k]
            chat.top_id.append(top_id)
            chat.top_p.append(top_p)
            asking = chat.turn > 0
            t = choose(ids, p, 1.0 if asking else chat.temperature, rng)
            if asking:
                chat.turn -= 1
                if t == end or t in special or chat.turn == 0:
                    chat.turn = 0
                    chat.forced.extend(answer)
                else:
                    chat.forced.append(t)
                continue
            chat.budget -= 1
            chat.forced.append(t)
            if t == end or t in special or chat.budget <= 0 or len(chat.tokens) >= ROOM - 8:
                chat.forced.clear()
                writer.add(chat)
                chats[s] = new_chat()
                trunk.forget(s, len(chats[s].tokens))
        if time.monotonic() - report > 30:
            report = time.monotonic()
            done = writer.total
            print(f"{done} tokens, {done / (report - start):.0f} a second", flush=True)
    writer.flush()


def prepare(work: Path, base: Path, kind: str) -> Path:
    """Return the trunk with an untrained head, joined once: what generation runs on."""
    trunk = work / f"trunk-{kind}.gguf"
    if not trunk.exists():
        work.mkdir(parents=True, exist_ok=True)
        loaded = load_base(base)
        head = write_head(work / "untrained.gguf", initial_head(loaded), loaded)
        join_smollm2(base, head, trunk, type=kind)
    return trunk


def main() -> None:
    """Generate until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for all results")
    parser.add_argument("--base", type=Path, default=None, help="GGUF of the base model")
    parser.add_argument("--type", default="Q4_0", help="tensor type of the trunk that writes")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="also numbers the shards: run several")
    parser.add_argument("--out", default="data", help="sub-folder of the shards")
    args = parser.parse_args()
    path = prepare(args.work, args.base or base_model(), args.type)
    with Trunk(
        path, n_seq=args.sequences, n_ctx=args.sequences * ROOM, n_batch=256, threads=args.threads
    ) as trunk:
        generate(
            trunk,
            args.work / args.out,
            n_seq=args.sequences,
            minutes=args.minutes,
            seed=args.seed,
        )


if __name__ == "__main__":
    main()
