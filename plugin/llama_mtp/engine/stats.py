"""Counters of speculative decoding: added to once per round, turned into rates when read.

Metric names are vLLM's, so that dashboards and comparisons carry over.
"""

from __future__ import annotations

import threading

_COUNTERS = (
    "num_rounds",
    "num_drafts",
    "num_picks",
    "num_draft_tokens",
    "num_accepted_tokens",
    "num_emitted_tokens",
    "num_target_decodes",
    "num_draft_decodes",
    "target_ns",
    "draft_ns",
    "sample_ns",
    "rollback_ns",
    "native_overhead_ns",
    "python_ns",
)
_RENAMED = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")  # in as_dict, to vLLM's names
_PLAIN_NAMES = tuple(name for name in _COUNTERS if name not in _RENAMED)
_PER_POSITION = ("num_drafted_per_pos", "num_tested_per_pos", "num_accepted_per_pos")


class SpecStats:
    """Cumulative counters; ``last`` holds the same for the latest generation alone.

    Counts are rounds, tokens or decodes; every ``*_ns`` is a total in nanoseconds, and no time is
    in two of them; ``rollback_ns`` is the host's removal of rows. The lists are
    indexed by draft position, 0 for the first drafted token. ``num_picks`` counts every token that
    a drafter proposed; the other counts of drafts are those of the verified ones. ``last`` is
    ``None`` before the first :meth:`begin`, and always ``None`` on a ``last`` itself. A round is
    added whole: rates and :meth:`as_dict` may be read in another thread.
    """

    __slots__ = (*_COUNTERS, *_PER_POSITION, "_lock", "last")

    num_rounds: int
    num_drafts: int
    num_picks: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_emitted_tokens: int
    num_target_decodes: int
    num_draft_decodes: int
    target_ns: int
    draft_ns: int
    sample_ns: int
    rollback_ns: int
    native_overhead_ns: int
    python_ns: int
    num_drafted_per_pos: list[int]
    num_tested_per_pos: list[int]
    num_accepted_per_pos: list[int]
    last: SpecStats | None

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero and forget the latest generation."""
        with self._lock:
            for name in _COUNTERS:
                setattr(self, name, 0)
            for name in _PER_POSITION:
                setattr(self, name, [])
            self.last = None

    def begin(self, last: SpecStats | None = None) -> None:
        """A generation begins, or goes on with its own ``last``; the totals stay."""
        self.last = SpecStats() if last is None else last

    def observe_round(
        self,
        drafted: int,
        sampled: int,
        accepted: int,
        *,
        picks: int | None = None,
        target_decodes: int = 1,
        draft_decodes: int = 0,
        **times: int,
    ) -> None:
        """Add one settled round, here and in ``last``.

        Of ``picks`` that the drafter made (as many as were verified, by default) ``drafted`` were
        verified, the consumer asked for ``sampled`` verify rows, each one emitted token, and
        ``accepted`` drafts agreed. Drafts whose row nobody asked for count as drafted, not as
        tested. ``times`` are the counters in nanoseconds.
        """
        if picks is None:
            picks = drafted
        for stats in (self,) if self.last is None else (self, self.last):
            with stats._lock:
                stats.num_rounds += 1
                stats.num_picks += picks
                stats.num_emitted_tokens += sampled
                stats.num_target_decodes += target_decodes
                stats.num_draft_decodes += draft_decodes
                for name, ns in times.items():
                    setattr(stats, name, getattr(stats, name) + ns)
                if drafted:
                    stats._count_drafts(drafted, sampled, accepted)

    def _count_drafts(self, drafted: int, sampled: int, accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        # A row is sampled only while all before it agreed, so the sampled rows are the tests.
        for name, n in zip(_PER_POSITION, (drafted, min(sampled, drafted), accepted), strict=True):
            counts = getattr(self, name)
            counts.extend([0] * (drafted - len(counts)))
            for pos in range(n):
                counts[pos] += 1

    def add(self, other: SpecStats) -> None:
        """Add the counters of another one; ``last`` stays."""
        with self._lock:
            for name in _COUNTERS:
                setattr(self, name, getattr(self, name) + getattr(other, name))
            for name in _PER_POSITION:
                mine, theirs = getattr(self, name), getattr(other, name)
                mine.extend([0] * (len(theirs) - len(mine)))
                for pos, count in enumerate(theirs):
                    mine[pos] += count

    @property
    def mean_acceptance_length(self) -> float:
        """Emitted tokens per round, correction or bonus included; 0.0 before the first round."""
        return self.num_emitted_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted drafts over proposed drafts; 0.0 when nothing was proposed."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_per_pos(self) -> list[float]:
        """Per position, how often a draft agreed given that all before it had (0.0 if untested)."""
        with self._lock:
            pairs = zip(self.num_accepted_per_pos, self.num_tested_per_pos, strict=True)
            return [agreed / tested if tested else 0.0 for agreed, tested in pairs]

    def as_dict(self) -> dict[str, int | float | list[int] | list[float]]:
        """Counters and rates in one flat dict; those that vLLM has carry vLLM's names."""
        with self._lock:
            return {
                "spec_decode_num_drafts_total": self.num_drafts,
                "spec_decode_num_draft_tokens_total": self.num_draft_tokens,
                "spec_decode_num_accepted_tokens_total": self.num_accepted_tokens,
                "spec_decode_num_accepted_tokens_per_pos_total": list(self.num_accepted_per_pos),
                "mean_acceptance_length": self.mean_acceptance_length,
                "draft_acceptance_rate": self.draft_acceptance_rate,
                "acceptance_per_pos": self.acceptance_per_pos,
                "num_drafted_per_pos": list(self.num_drafted_per_pos),
                "num_tested_per_pos": list(self.num_tested_per_pos),
                **{name: getattr(self, name) for name in _PLAIN_NAMES},
            }

    def __str__(self) -> str:
        if not self.num_rounds:
            return "no rounds yet"
        per_pos = " ".join(f"{rate:.2f}" for rate in self.acceptance_per_pos)
        positions = f" ({per_pos} by position)" if per_pos else ""
        return (
            f"{self.num_emitted_tokens} tokens in {self.num_rounds} rounds "
            f"({self.mean_acceptance_length:.2f} a round); accepted {self.num_accepted_tokens} of "
            f"{self.num_draft_tokens} drafts{positions}; target {self.target_ns / 1e6:.1f} ms, "
            f"draft {self.draft_ns / 1e6:.1f} ms, sampling {self.sample_ns / 1e6:.1f} ms, "
            f"rollback {self.rollback_ns / 1e6:.1f} ms, "
            f"overhead {(self.native_overhead_ns + self.python_ns) / 1e6:.1f} ms"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"
