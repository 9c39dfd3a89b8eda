"""The scenarios over which the depth policy is judged: machines, heads and texts, by groups."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from simulator import CURVES, HEADS, Head, Machine, Simulator


@dataclass(frozen=True)
class Part:
    """A stretch of text. ``sampling``: how a generation that begins with it is sampled; None: it
    goes on with the one before."""

    tokens: int
    head: Head
    sampling: Hashable = None
    machine: Machine | None = None


@dataclass(frozen=True)
class Scenario:
    """What one policy lives through. Its time is that of all parts, the first included."""

    name: str
    machine: Machine
    parts: Sequence[Part]
    depth_max: int = 3
    finds: float = 1.0

    @property
    def confident(self) -> bool:
        return self.parts[0].head.shares is not None

    def ms(self, policy: Any, seed: int) -> float:
        """True ms a token with ``policy``."""
        sim = Simulator(self.machine, self.parts[0].head, seed, finds=self.finds)
        for part in self.parts:
            sim.turn(part.head)
            if part.machine is not None:
                sim.machine = part.machine
            if part.sampling is not None:
                policy.begin(part.sampling)
            sim.run(policy, part.tokens)
        return sim.spent / sim.tokens


def _steady(curve: str, head: str) -> Scenario:
    parts = [Part(300, HEADS[head], 0.0), Part(300, HEADS[head], 0.0)]
    return Scenario(f"{curve}, {head}", Machine.of(curve, read=0.05), parts)


def _groups() -> dict[str, list[Scenario]]:
    h = HEADS
    some = ["flat", "small-bf16", "four-rows-cheaper", "inflated-bf16"]
    steady = {
        group: [_steady(curve, head) for curve in CURVES for head in heads]
        for group, heads in {
            "steady, by class": ["knowing", "doubting", "modest", "bluffing", "fading"],
            "steady, by position": ["weak", "middling", "strong", "tiring"],
            "always right or wrong": ["right", "wrong"],
        }.items()
    }
    texts: dict[str, list[Part]] = {
        "collapse, by position": [Part(200, h["strong"], 0.0), Part(100, h["hopeless"])],
        "collapse, by class": [Part(200, h["right"], 0.0), Part(100, h["wrong"])],
        "half a collapse": [Part(200, h["strong"], 0.0), Part(100, h["weak"])],
        "turn to the better": [Part(400, h["doubting"], 0.0), Part(500, h["knowing"])],
        "alternating texts": [Part(192, h["knowing"], 0.0), Part(192, h["doubting"], 0.0)] * 4,
        "alternating texts, by position": [Part(192, h["strong"], 0.0), Part(192, h["weak"], 0.0)]
        * 4,
        "generations of one object": [
            Part(96, h[x], 0.0)
            for x in ("knowing", "modest", "doubting", "knowing", "right", "wrong", "bluffing",
                      "knowing", "doubting", "modest")
        ],
        "generations, by position": [
            Part(96, h[x], 0.0)
            for x in ("strong", "middling", "weak", "strong", "hopeless", "middling")
        ],
        "two temperatures": [Part(96, h["knowing"], 0.0), Part(96, h["doubting"], 1.0)] * 4,
        "short generations": [Part(16, h["knowing"], 0.0)] * 20,
    }  # fmt: skip
    turns = {
        name: [Scenario(f"{c}, {name}", Machine.of(c, read=0.05), parts) for c in some]
        for name, parts in texts.items()
    }

    def machines(head: str, change: Callable[[Machine], Machine]) -> list[Scenario]:
        out = []
        for curve in some:
            m = Machine.of(curve, read=0.05)
            parts = [Part(300, h[head], 0.0), Part(300, h[head], None, change(m))]
            out.append(Scenario(f"{curve}, {head}", m, parts))
        return out

    def mistimed(head: str, factor: float) -> list[Scenario]:
        out = []
        for curve in some:
            m = Machine.of(curve, read=0.05)
            wrong = Machine([factor * m.rows[0], *m.rows[1:]], m.draft / factor, m.read)
            parts = [Part(8, h[head], 0.0, wrong), Part(600, h[head], None, m)]
            out.append(Scenario(f"{curve}, {head}, x{factor}", wrong, parts))
        return out

    long = {
        "long texts": [
            Scenario(f"{c}, {head}, long", Machine.of(c, read=0.05), [Part(500, h[head], 0.0)] * 5)
            for c in ("steep", "every-row-a-decode", "small-bf16", "two-rows-cheaper",
                      "four-rows-cheaper")
            for head in ("middling", "strong", "knowing", "modest")
        ]
    }  # fmt: skip

    dear = Machine.of("two-rows-as-two", read=0.05)
    machine = {
        "rows become dear": machines("strong", lambda m: Machine(dear.rows, 0.2, m.read))
        + machines("knowing", lambda m: Machine(dear.rows, 0.2, m.read)),
        "the machine becomes slower": machines("knowing", lambda m: m.slower(2.0))
        + machines("middling", lambda m: m.slower(2.0)),
        "plain decoding timed wrongly": mistimed("strong", 0.3) + mistimed("doubting", 3.0)
        + mistimed("weak", 3.0),
        "checkpoint rollback": [
            Scenario(f"{c}, {head}", Machine.of(c, read=0.05, copy=0.1 * CURVES[c][0][0]),
                     [Part(300, h[head], 0.0), Part(300, h[head], 0.0)])
            for c in ("flat", "small-bf16", "inflated-bf16", "wide-bf16")
            for head in ("weak", "middling", "strong", "knowing", "bluffing")
        ],
        "a drafter that finds little": [
            Scenario(f"{c}, {head}, {finds}", Machine.of(c),
                     [Part(300, h[head], 0.0), Part(300, h[head], 0.0)], finds=finds)
            for c in ("flat", "small-bf16", "inflated-bf16")
            for head in ("weak", "strong")
            for finds in (0.0, 0.1, 0.3)
        ],
        "depth 7": [
            Scenario(f"{c}, {head}, depth 7", Machine.of(c, read=0.05),
                     [Part(300, h[head], 0.0), Part(300, h[head], 0.0)], depth_max=7)
            for c in ("flat", "small-bf16", "four-rows-cheaper", "bumps", "two-rows-as-two")
            for head in ("strong", "middling", "tiring", "right", "knowing", "fading")
        ],
    }  # fmt: skip
    return {**steady, **long, **turns, **machine}


GROUPS = _groups()
