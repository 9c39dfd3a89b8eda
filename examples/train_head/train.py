"""Train the NextN block on the shards of ``generate.py``, several steps ahead.

    python examples/train_head/train.py --work work --minutes 60

The trunk is frozen: its hidden rows and predictions are in the shards, so it is not run here. The
loss is the cross entropy to the trunk's own next-token distribution (half of it sharpened to its
first choice, because greedy acceptance is agreement of first choices) over the tokens that matter
to the batch, and a distance of the head's normed row to the trunk's. WORK/head.npz is renewed every
few minutes with a running average of the weights, so a run may be stopped at any time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.multiprocessing
from common import ROW_SIZE, base_model, initial_head, load_base
from gguf import GGUFReader
from gguf.quants import dequantize
from model import Head
from torch import Tensor, distributed
from torch.nn import functional as F

WEIGHTS = (1.0, 0.5, 0.25)  #: of draft steps 1, 2, 3
WINDOW = 256


@dataclass
class Data:
    """All chats one after another; ``chat`` numbers the chat of each row."""

    token: Tensor  # [rows] int64
    hidden: Tensor  # [rows, n_embd] float16
    top_id: Tensor  # [rows, k] int64
    top_p: Tensor  # [rows, k] float16; all zero where the trunk was not asked
    chat: Tensor  # [rows] int64
    start: npt.NDArray[np.int64]  # first row of each chat, and the end

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return len(self.token)


def load(folder: Path, first: int, last: int | None, limit: int | None = None) -> Data:
    """Read the shards ``first`` to ``last`` (exclusive), up to ``limit`` tokens of whole chats."""
    paths = sorted(folder.glob("*.npz"))[first:last]
    if not paths:
        raise SystemExit(f"No shards in {folder}; run generate.py first.")
    columns: dict[str, list[npt.NDArray[np.generic]]] = {}
    size = 0
    for path in paths:
        with np.load(path) as file:
            shard = {name: file[name] for name in file.files}
        for name, value in shard.items():
            columns.setdefault(name, []).append(value)
        size += len(shard["token"])
        if limit is not None and size >= limit:
            break
    merged = {name: np.concatenate(parts) for name, parts in columns.items()}
    start = np.concatenate([[0], np.cumsum(merged["length"])]).astype(np.int64)
    if limit is not None:
        start = start[: max(2, int(np.searchsorted(start, limit, side="right")))]
    n = int(start[-1])
    chat = np.repeat(np.arange(len(start) - 1), np.diff(start))
    return Data(
        token=torch.from_numpy(merged["token"][:n].astype(np.int64)),
        hidden=torch.from_numpy(merged["hidden"][:n]),
        top_id=torch.from_numpy(merged["top_id"][:n].astype(np.int64)),
        top_p=torch.from_numpy(merged["top_p"][:n]),
        chat=torch.from_numpy(chat),
        start=start,
    )


def windows(data: Data, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield row numbers ``[batch, WINDOW]`` for ever: each epoch shuffles chats and packs them."""
    while True:
        order = rng.permutation(len(data.start) - 1)
        parts = [np.arange(data.start[i], data.start[i + 1]) for i in order]
        stream = np.concatenate(parts)[rng.integers(WINDOW) if data.rows > 2 * WINDOW else 0 :]
        stream = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)
        stream = stream[rng.permutation(len(stream))]
        for i in range(0, len(stream) - batch + 1, batch):
            yield torch.from_numpy(stream[i : i + batch])
        if len(stream) < batch:
            raise SystemExit("Too few tokens for one batch; generate more.")


class Trunk:
    """The frozen parts that the head shares: embedding and output matrix, as the file has them."""

    def __init__(self, path: Path):
        tensors = {t.name: t for t in GGUFReader(path).tensors}

        def matrix(name: str) -> Tensor:
            t = tensors[name]
            values = np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
            return torch.from_numpy(values).to(torch.bfloat16)

        self.embedding = matrix("token_embd.weight")
        self.output = matrix("output.weight")


@dataclass
class Batch:
    """Windows ready for the head."""

    embedding: Tensor
    hidden: Tensor  # row p: the trunk's row p-1, zero at the start of a chat
    target: Tensor  # row p: the trunk's row p
    allowed: Tensor
    chat: Tensor
    top_id: Tensor
    top_p: Tensor


def gather(data: Data, trunk: Trunk, rows: Tensor) -> Batch:
    """Collect the rows ``[b, t]`` of ``data``."""
    chat = data.chat[rows]
    hidden = data.hidden[rows].float()
    before = hidden.roll(1, dims=1)
    before[:, 0] = data.hidden[(rows[:, 0] - 1).clamp(min=0)].float()
    previous = chat.roll(1, dims=1)
    previous[:, 0] = data.chat[(rows[:, 0] - 1).clamp(min=0)]
    before[chat != previous] = 0
    t = rows.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    allowed = (chat[:, :, None] == chat[:, None, :]) & causal
    return Batch(
        embedding=trunk.embedding[data.token[rows]].float(),
        hidden=before,
        target=hidden,
        allowed=allowed[:, None],
        chat=chat,
        top_id=data.top_id[rows],
        top_p=data.top_p[rows].float(),
    )


def candidates(batch: Batch, frequency: Tensor, extra: int) -> Tensor:
    """Return the tokens that the loss looks at: likely ones of the batch, and some others."""
    likely = batch.top_id[batch.top_p > 1e-3].unique()  # type: ignore[no-untyped-call]
    others = torch.multinomial(frequency, extra, replacement=False)
    return torch.cat([likely, others]).unique()  # type: ignore[no-untyped-call]


def losses(
    head: Head,
    batch: Batch,
    trunk: Trunk,
    base_norm: Tensor,
    vocabulary: Tensor,
    n: int,
    sharp: float,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each draft step, cross entropy and distance of the hidden rows."""
    place = torch.full((len(trunk.output),), -1, dtype=torch.int64)
    place[vocabulary] = torch.arange(len(vocabulary))
    matrix = trunk.output[vocabulary]
    result = []
    out = head.steps(batch.embedding, batch.hidden, batch.allowed, n)
    for k, row in enumerate(out):
        m = row.shape[1]
        valid = (batch.chat[:, :m] == batch.chat[:, k:]) & (batch.top_p[:, k:, 0] > 0)
        normed = head.norm(row[valid], head.head_norm)
        with torch.no_grad():
            wanted = head.norm(batch.target[:, k:][valid], base_norm)
            p = batch.top_p[:, k:][valid]
            p = (1 - sharp) * p / p.sum(-1, keepdim=True)
            p[:, 0] += sharp
            index = place[batch.top_id[:, k:][valid]]
            p = torch.where(index < 0, 0, p)
            p = p / p.sum(-1, keepdim=True)
            index = index.clamp(min=0)
        logits = F.linear(normed.to(torch.bfloat16), matrix).float()
        ce = (logits.logsumexp(-1) - (p * logits.gather(1, index)).sum(-1)).mean()
        distance = (normed - wanted).square().mean() / wanted.square().mean()
        result.append((ce, distance))
    return result


@torch.no_grad()
def warm_start(
    head: Head, data: Data, trunk: Trunk, rows: int = 60_000, keep: float = 0.25
) -> None:
    """Begin with the best linear guess of the trunk's next row, and a damped block after it.

    The norms' weights give every channel the same size (a few of the trunk's are a hundred times
    the others, which would rule the gradient); ridge regression then gives the projection from
    token and row before to the row itself. The block's outputs start at ``keep`` of the trunk's.
    """
    p = torch.arange(1, data.rows)
    p = p[data.chat[p] == data.chat[p - 1]]
    p = p[torch.randperm(len(p))[:rows]]

    def unit(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, head.eps)

    e, h, y = (
        unit(x) for x in (trunk.embedding[data.token[p]], data.hidden[p - 1], data.hidden[p])
    )
    head.enorm.copy_(e.square().mean(0).rsqrt())
    head.hnorm.copy_(h.square().mean(0).rsqrt())
    x = torch.cat([e * head.enorm, h * head.hnorm], dim=1)
    moments = x.T @ x / len(p)
    moments.diagonal().add_(1e-3)
    weights = torch.linalg.solve(moments, x.T @ y / len(p)).T * ROW_SIZE
    half, share = weights.shape[1] // 2, 4.0  # of the size goes to the norms, as in the block
    head.e.copy_(weights[:, :half] / share)
    head.h.copy_(weights[:, half:] / share)
    head.enorm.mul_(share)
    head.hnorm.mul_(share)
    head.o.mul_(keep)
    head.down.mul_(keep)


@torch.no_grad()
def agreement(
    head: Head, data: Data, trunk: Trunk, rows: Tensor, n: int = 3, chunk: int = 8
) -> list[float]:
    """Return how often draft step k gives the trunk's first choice, given that the ones before did.

    All rows of ``rows`` where the trunk was asked count, whatever text they stand in.
    """
    hits, tries = [0] * n, [0] * n
    for part in torch.split(rows, chunk):
        batch = gather(data, trunk, part)
        with torch.autocast("cpu", torch.bfloat16):
            out = head.steps(batch.embedding, batch.hidden, batch.allowed, n)
        good = torch.ones_like(part, dtype=torch.bool)
        for k, row in enumerate(out):
            m = row.shape[1]
            valid = (batch.chat[:, :m] == batch.chat[:, k:]) & (batch.top_p[:, k:, 0] > 0)
            good = good[:, :m] & valid
            logits = F.linear(head.norm(row[good], head.head_norm).to(torch.bfloat16), trunk.output)
            right = logits.argmax(-1) == batch.top_id[:, k:][good][:, 0]
            tries[k] += int(good.sum())
            # The next step stands on text that was drafted: the token must be the first choice too.
            followed = good.clone()
            followed[good] = right
            hits[k] += int(right.sum())
            good = followed
    return [h / max(t, 1) for h, t in zip(hits, tries, strict=True)]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Newton-Schulz), for matrices."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; its root mean square is ``0.2 * lr``, like AdamW's."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(m, group["momentum"]).to(torch.bfloat16)
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
                x = (x.T if tall else x).float()
                p.add_(x, alpha=-group["lr"] * 0.2 * math.sqrt(max(x.shape)))


def save(path: Path, head: Head, average: dict[str, Tensor], note: str) -> None:
    """Write the averaged weights to ``path``."""
    kept = {n: p.detach().clone() for n, p in head.named_parameters()}
    for n, p in head.named_parameters():
        p.data.copy_(average[n])
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez(file, note=np.array(note), **head.export())  # type: ignore[arg-type]
    os.replace(temporary, path)
    for n, p in head.named_parameters():
        p.data.copy_(kept[n])


def average_gradients(head: Head, done: float) -> float:
    """Give all workers the same gradients; return the same progress to all."""
    grads = [p.grad for p in head.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([done])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for g, part in zip(grads, torch.split(flat[:-1], [g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))
    return flat[-1].item()


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """Run until the time is over; the learning rate falls to zero just then.

    Each worker has one thread and windows of its own, and they meet once a step: on a machine
    that does other work besides, that wastes far less than threads that meet in every product.
    """
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.workers
    )
    base = load_base(args.base or base_model())
    torch.manual_seed(args.seed)
    rng, dice = np.random.default_rng([args.seed, rank]), np.random.default_rng(args.seed)
    out = args.out or args.work / "head.npz"
    trunk = Trunk(args.work / f"trunk-{args.type}.gguf")
    held = load(args.work / "data", 0, 1)
    data = load(args.work / "data", 1, None, args.max_tokens)
    held_rows = next(windows(held, min(16, held.rows // WINDOW - 2), np.random.default_rng(0)))
    frequency = torch.bincount(data.token, minlength=len(trunk.output)).float()
    if rank == 0:
        words = int((frequency > 0).sum())
        print(f"{data.rows} tokens, {len(data.start) - 1} chats, {words} words", flush=True)
    frequency.sqrt_()

    head = Head(base, initial_head(base))
    warm_start(head, data, trunk)
    base_norm = torch.from_numpy(base.output_norm)
    matrices = [p for p in head.parameters() if p.ndim == 2]
    vectors = [p for p in head.parameters() if p.ndim == 1]
    if args.optimizer == "muon":
        optimizers = [Muon(matrices, args.lr), torch.optim.AdamW(vectors, args.lr, (0.9, 0.95))]
    else:
        optimizers = [torch.optim.AdamW([*matrices, *vectors], args.lr, (0.9, 0.95))]
    if rank == 0:
        print("start: held-out", text(agreement(head, held, trunk, held_rows)), flush=True)
    average = {n: p.detach().clone() for n, p in head.named_parameters()}
    begin = time.monotonic()
    saved = reported = begin
    total = 60 * args.minutes
    source = windows(data, args.batch, rng)
    done, seen = 0.0, 0
    for step in itertools.count():
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        batch = gather(data, trunk, next(source))
        depth = args.depth if dice.random() < args.deep else 1
        vocabulary = candidates(batch, frequency, 1024)
        with torch.autocast("cpu", torch.bfloat16):
            parts = losses(head, batch, trunk, base_norm, vocabulary, depth, args.sharp)
        loss = torch.zeros(())
        for weight, (ce, distance) in zip(WEIGHTS, parts, strict=False):
            loss = loss + weight * (ce + args.feature * distance)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        now = time.monotonic()
        done = average_gradients(head, (now - begin) / total)
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
            optimizer.step()
        decay = min(0.98, step / (step + 10))
        for n, p in head.named_parameters():
            average[n].lerp_(p.detach(), 1 - decay)
        seen += args.workers * args.batch * WINDOW
        if rank == 0 and now - reported > args.report:
            reported = now
            print(
                f"{(now - begin) / 60:5.1f} min  step {step + 1}  {seen} tokens seen  "
                f"loss {text([ce.item() for ce, _ in parts])}  "
                f"distance {text([d.item() for _, d in parts])}  "
                f"held-out {text(agreement(head, held, trunk, held_rows))}",
                flush=True,
            )
        if rank == 0 and now - saved > 120:
            saved = now
            save(out, head, average, f"{data.rows} tokens of text, {seen} seen so far.")
    if rank == 0:
        note = f"{data.rows} tokens of text, {seen} seen in {step} steps."
        save(out, head, average, note)
        print(note, "Held-out", text(agreement(head, held, trunk, held_rows)), flush=True)
    distributed.destroy_process_group()


def text(rates: list[float]) -> str:
    """Format numbers."""
    return " ".join(f"{a:.3f}" for a in rates)


def main() -> None:
    """Train for the given time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for all results")
    parser.add_argument("--base", type=Path, default=None, help="GGUF of the base model")
    parser.add_argument("--type", default="Q4_0", help="tensor type of the trunk that wrote")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=None, help="use only so much of the data")
    parser.add_argument(
        "--batch", type=int, default=8, help=f"windows of {WINDOW} a worker and step"
    )
    parser.add_argument("--depth", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--deep", type=float, default=0.35, help="share of steps at full depth")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--feature", type=float, default=0.5, help="weight of the row distance")
    parser.add_argument("--sharp", type=float, default=0.5, help="share of the first choice")
    parser.add_argument("--report", type=float, default=120, help="seconds between reports")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="checkpoint (WORK/head.npz)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call = (args, str(Path(folder) / "meeting"))
        torch.multiprocessing.spawn(train, call, args.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
