"""Print what each mechanism and each constant of the depth policy is worth, from the simulator.

    python tests/depth/worth.py [--seeds 1] [--only WORD]

Each row changes one thing: a mechanism is switched off, a constant halved or doubled. The numbers
are times over those of the policy as it is, in percent more: over all scenarios, and in the group
in which the change does most. Some five minutes a seed on one core; the same numbers every time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from scenarios import GROUPS, Scenario

from llama_mtp.depth import constants, policy
from llama_mtp.depth.acceptance import Acceptance
from llama_mtp.depth.costs import Cost, Costs
from llama_mtp.depth.policy import DepthPolicy

Times = dict[str, list[float]]


def times(seeds: int) -> Times:
    """Group -> true ms a token of each of its scenarios and seeds."""

    def one(scenario: Scenario, seed: int) -> float:
        made = DepthPolicy(scenario.depth_max, confident=scenario.confident)
        return scenario.ms(made, seed)

    return {
        group: [one(scenario, 1 + seed) for scenario in scenarios for seed in range(seeds)]
        for group, scenarios in GROUPS.items()
    }


def more(changed: Iterable[float], base: Iterable[float]) -> float:
    """Percent more time, by the geometric mean."""
    logs = [math.log(b / a) for a, b in zip(base, changed, strict=True)]
    return 100.0 * math.expm1(sum(logs) / len(logs))


@contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    policy._LOOK = policy.look(constants.LOOK_WINDOW)
    try:
        yield
    finally:
        setattr(where, name, before)
        policy._LOOK = policy.look(constants.LOOK_WINDOW)


def _by_class_alone(self: Acceptance) -> Any:
    chance = np.divide(self._hits, self._tries).clip(0.0, 0.999)
    return np.broadcast_to(chance, (len(self._right), len(chance)))


def _last_time(self: Cost, ns: float, at: int) -> None:
    self._times.append(ns)
    self.ns, self.at = ns, at


def _without_spare(learn: Callable[..., bool]) -> Callable[..., bool]:
    def learned(self: Acceptance, classes: Any, drafted: int, *rest: Any) -> bool:
        sampled, accepted, spare = rest
        return learn(self, classes, drafted, sampled, accepted, None if drafted else spare)

    return learned


#: What is switched off, and how.
MECHANISMS: dict[str, tuple[Any, str, Any]] = {
    "watch for a turn": (Acceptance, "_watch", lambda self, c, right: False),
    "each text for itself": (constants, "TEXT", math.inf),
    "costs that nobody tests sink": (constants, "STALE", math.inf),
    "acceptance by position": (Acceptance, "chances", _by_class_alone),
    "verdict on the pick behind": (Acceptance, "learn", _without_spare(Acceptance.learn)),
    "price of drafts that bring nothing": (Costs, "waste", lambda self, ns: None),
    "medians of times": (Cost, "add", _last_time),
    "looks within a share of the time": (constants, "LOOK_SHARE", math.inf),
}


def rows() -> Iterator[tuple[str, tuple[Any, str, Any]]]:
    for name, change in MECHANISMS.items():
        yield f"without: {name}", change
    for name, value in vars(constants).items():
        for factor in (0.5, 2.0) if name.isupper() else ():
            # Of what is kept of a sum, what is forgotten is halved and doubled.
            other = 1 - factor * (1 - value) if name.startswith("KEEP") else value * factor
            other = type(value)(other)
            if other and other != value:
                yield f"{name} {value:g} -> {other:g}", (constants, name, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    base = times(args.seeds)
    flat = [t for group in base.values() for t in group]
    print(f"{len(flat)} texts\n\n| change | all, % | where it does most | % |\n|---|---|---|---|")
    for name, change in rows():
        if args.only not in name:
            continue
        with replaced(*change):
            changed = times(args.seeds)
        by_group = {g: more(changed[g], base[g]) for g in base}
        most = max(by_group, key=lambda g: abs(by_group[g]))
        total = more([t for group in changed.values() for t in group], flat)
        print(f"| {name} | {total:+.2f} | {most} | {by_group[most]:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
