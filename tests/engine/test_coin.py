"""A coin in place of the model, and a constant depth in place of the policy: for measuring."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from conftest import COMMON, LlamaFactory, ModelFactory

from llama_mtp import Llama
from llama_mtp.errors import SpecTypeError


@pytest.mark.parametrize("arch", ["qwen35", "hy_v3", "mimo2"])
def test_the_coin_keeps_its_chances_and_its_seed(
    model: ModelFactory, ours: LlamaFactory, arch: str
) -> None:
    def toss(seed: int) -> tuple[list[int], list[float]]:
        fast = ours(model(arch))
        fast._session.accept_by_coin([0.9, 0.5], seed)
        tokens = list(islice(fast.generate(model(arch).text(9), temp=0.0), 480))
        return tokens, fast.spec_stats.acceptance_per_pos

    tokens, rates = toss(1)
    assert rates == pytest.approx([0.9, 0.5, 0.5], abs=0.15)
    assert toss(1) == (tokens, rates)
    assert toss(2)[0] != tokens


def test_without_chances_the_model_decides_again(model: ModelFactory, ours: LlamaFactory) -> None:
    m = model("qwen35")

    def text(fast: Any) -> list[int]:
        return list(islice(fast.generate(m.text(9), temp=0.0), 60))

    true = text(ours(m))
    fast = ours(m)
    fast._session.accept_by_coin([0.5])
    assert text(fast) != true
    fast._session.accept_by_coin([])
    fast.reset()
    assert text(fast) == true


def test_a_constant_depth_leaves_the_policy_as_it_was(
    model: ModelFactory, ours: LlamaFactory
) -> None:
    m = model("qwen35")
    fast = ours(m, spec_adaptive=True)
    list(islice(fast.generate(m.text(9), temp=0.0), 200))
    policy = fast._session.policy
    before = policy.explain()
    for depth in (2, 0, 3):
        with fast.spec_constant_depth(depth):
            list(islice(fast.generate(m.text(9), temp=0.0), 30))
            assert fast.spec_depth == depth
        last = fast.spec_stats.last
        assert len(last.num_drafted_per_pos) == depth
        assert all(n == last.num_rounds for n in last.num_drafted_per_pos[:1])
    assert fast._session.policy is policy
    assert policy.explain() == before
    with pytest.raises(ValueError, match="between 0 and 3"), fast.spec_constant_depth(4):
        pass
    assert fast._session.policy is policy


def test_there_is_no_constant_depth_where_nothing_drafts(model: ModelFactory) -> None:
    path = str(model("hy_v3").path)
    with (
        Llama(path, spec_type="none", **COMMON) as plain,
        pytest.raises(SpecTypeError, match="No spec type"),
        plain.spec_constant_depth(1),
    ):
        pass
