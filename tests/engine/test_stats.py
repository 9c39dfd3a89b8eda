"""SpecStats: counters add up, rates follow, ``last`` is one generation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mtp.engine.stats import SpecStats


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, int]:
    drafted = draw(st.integers(0, 5))
    accepted = draw(st.integers(0, drafted))
    return drafted, draw(st.integers(accepted, accepted + 1)), accepted


def test_empty() -> None:
    stats = SpecStats()
    assert stats.mean_acceptance_length == stats.draft_acceptance_rate == 0.0
    assert stats.acceptance_per_pos == []
    assert stats.last is None
    assert "no rounds yet" in repr(stats)


def test_rates() -> None:
    stats = SpecStats()
    stats.observe_round(3, 4, 3, target_ns=10, draft_ns=2, draft_decodes=3)
    stats.observe_round(3, 2, 1, target_ns=10, draft_ns=2, draft_decodes=3)
    rest = {"sample_ns": 1, "rollback_ns": 4, "native_overhead_ns": 2, "python_ns": 3}
    stats.observe_round(0, 1, 0, target_ns=5, **rest)
    assert (stats.num_rounds, stats.num_drafts, stats.num_draft_tokens) == (3, 2, 6)
    assert (stats.num_accepted_tokens, stats.num_emitted_tokens) == (4, 7)
    assert (stats.num_target_decodes, stats.num_draft_decodes) == (3, 6)
    assert stats.mean_acceptance_length == pytest.approx(7 / 3)
    assert stats.draft_acceptance_rate == pytest.approx(4 / 6)
    assert stats.num_drafted_per_pos == [2, 2, 2]
    assert stats.num_tested_per_pos == [2, 2, 1]
    assert stats.num_accepted_per_pos == [2, 1, 1]
    assert stats.acceptance_per_pos == [1.0, 0.5, 1.0]
    assert (stats.target_ns, stats.draft_ns) == (25, 4)
    assert {name: getattr(stats, name) for name in rest} == rest


def test_rows_nobody_asked_for_are_not_tested() -> None:
    stats = SpecStats()
    stats.observe_round(3, 1, 1)
    assert stats.num_drafted_per_pos == [1, 1, 1]
    assert stats.num_tested_per_pos == [1, 0, 0]
    assert stats.acceptance_per_pos == [1.0, 0.0, 0.0]


def test_last_is_the_latest_generation() -> None:
    stats = SpecStats()
    stats.begin()
    first = stats.last
    stats.observe_round(2, 3, 2)
    stats.begin()
    stats.observe_round(1, 1, 0)
    assert first is not None and first.num_emitted_tokens == 3
    assert stats.last is not None and stats.last is not first
    assert stats.last.num_emitted_tokens == 1
    assert stats.last.last is None
    assert stats.num_emitted_tokens == 4
    stats.reset()
    assert stats.num_rounds == 0 and stats.last is None


def test_as_dict_uses_vllm_names_and_copies() -> None:
    stats = SpecStats()
    stats.observe_round(2, 2, 1)
    values = stats.as_dict()
    assert values["spec_decode_num_drafts_total"] == 1
    assert values["spec_decode_num_draft_tokens_total"] == 2
    assert values["spec_decode_num_accepted_tokens_total"] == 1
    assert values["spec_decode_num_accepted_tokens_per_pos_total"] == [1, 0]
    assert values["mean_acceptance_length"] == 2.0
    stats.observe_round(2, 3, 2)
    assert values["spec_decode_num_accepted_tokens_per_pos_total"] == [1, 0]
    assert "5 tokens in 2 rounds" in str(stats)


@given(st.lists(st.lists(rounds(), max_size=8), min_size=1, max_size=5))
def test_totals_are_the_sum_of_generations(generations: list[list[tuple[int, int, int]]]) -> None:
    stats = SpecStats()
    emitted = accepted = 0
    for generation in generations:
        stats.begin()
        for drafted, sampled, agreed in generation:
            stats.observe_round(drafted, sampled, agreed)
        assert stats.last is not None
        emitted += stats.last.num_emitted_tokens
        accepted += stats.last.num_accepted_tokens
    assert stats.num_emitted_tokens == emitted
    assert stats.num_accepted_tokens == accepted == sum(stats.num_accepted_per_pos)
    for tested, agreed, drafted in zip(
        stats.num_tested_per_pos, stats.num_accepted_per_pos, stats.num_drafted_per_pos, strict=True
    ):
        assert agreed <= tested <= drafted
    assert all(0.0 <= rate <= 1.0 for rate in stats.acceptance_per_pos)


def test_counters_of_several_generations_add_up() -> None:
    whole, total = SpecStats(), SpecStats()
    for counts in ((3, 4, 3), (1, 1, 0), (2, 2, 1)):
        one = SpecStats()
        for stats in (whole, one):
            stats.observe_round(*counts, target_ns=7, draft_decodes=2)
        total.add(one)
    assert total.as_dict() == whole.as_dict()
