"""Every architecture with a NextN graph in the host, run: drafts, text, rollback, reuse, state.

llama.cpp has no test that executes such a graph, so what the engine drafts is compared with what a
naive loop on the host's own API drafts for the same history (see `reference`): identity of the text
cannot see a wrong draft, as the target corrects it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from models.cases import CASES, DEPTH, Case, opened
from models.families import FAMILIES, common, glm4moe
from models.families.common import Tensors
from sampling import GREEDY, SAMPLED

from llama_mtp.gguf.header import read_header
from llama_mtp.heads.architectures import ARCHITECTURES
from llama_mtp.heads.check import check_head
from llama_mtp.host import C
from llama_mtp.measure.identity import check_identity, clear, fresh_text, text
from llama_mtp.settings import PREFILL_WINDOW


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    arch, n_heads = request.param
    with opened(arch, n_heads, tmp_path_factory.mktemp(arch)) as case:
        yield case


@pytest.fixture
def case(built: Case) -> Case:
    built.watch.rounds.clear()
    return built


def test_every_architecture_is_here() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


def test_the_table_says_what_the_host_says(case: Case) -> None:
    """The facts that the engine relies on, asked from the running host."""
    known = ARCHITECTURES[case.arch]
    target, draft = case.ours._ctx, case.ours._session.draft_context
    model = target.model.model
    assert check_head(case.files.path).rollback == known.rollback
    assert C.llama_n_rs_seq(target.ctx) == (DEPTH if known.rollback == "snapshots" else 0)
    assert C.llama_model_is_hybrid(model) or known.rollback != "checkpoint"
    gaps = C.llama_model_rope_type(model) in (C.LLAMA_ROPE_TYPE_MROPE, C.LLAMA_ROPE_TYPE_IMROPE)
    assert gaps == known.mrope
    assert C.llama_model_n_layer_nextn(draft.model.model) == case.reference.n_heads


def test_hidden_rows_come_out_as_the_table_says(case: Case) -> None:
    known = ARCHITECTURES[case.arch]
    text = case.prompt(12)
    true = case.reference.last_row(text, masked=False, all_outputs=True)
    row = case.reference.last_row(text, masked=known.gathers, all_outputs=False)
    assert np.isfinite(true).all() and np.ptp(true) > 0.1
    np.testing.assert_allclose(row, true, rtol=1e-3, atol=1e-4)


def test_text_and_drafts_depend_on_what_came_before(case: Case) -> None:
    """Else no test here could see a wrong history, a wrong rollback or a wrong hidden row."""
    prompt = case.prompt(60)
    emitted = fresh_text(case.stock, prompt, 40, **GREEDY)
    other = [*prompt[:20], *case.prompt(1, 9), *prompt[21:]]
    assert fresh_text(case.stock, other, 40, **GREEDY) != emitted
    without_history = without_row = 0
    for end in range(60, 100, 8):
        history = [*prompt, *emitted][:end]
        rows = case.reference.hidden_rows(history[:-1])
        drafts = case.reference.drafts(history, case.depth)
        short = case.reference.drafts(history[-6:], case.depth, rows[-5:])
        without_history += drafts != short
        rows[-1] = rows[-2]
        without_row += drafts != case.reference.drafts(history, case.depth, rows)
    assert without_history and without_row


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_are_those_of_a_naive_drafter(case: Case, sampling: dict[str, Any]) -> None:
    clear(case.ours)
    text(case.ours, case.prompt(70, 1), 100, **sampling)
    rounds = case.watch.rounds
    assert len(rounds) >= 100 // (1 + case.depth)
    assert {len(r.drafts) for r in rounds} == {case.depth} | ({0} if case.rests else set())
    case.check_drafts(rounds[:4] + rounds[4::8])


def test_drafts_at_a_depth_that_changes(case: Case) -> None:
    """Rounds that use some of the heads, or none, leave the caches of the others right."""
    clear(case.ours)
    stream = case.ours.generate(case.prompt(45, 11), **SAMPLED)
    next(stream)
    for depth in (3, 0, 1, 3, 0, 0, 2, 1, 3, 2, 3):
        case.ours.spec_depth = depth = min(depth, case.depth)
        case.watch.rounds.clear()
        list(
            islice(stream, 2 * (1 + case.depth))
        )  # ends the round that is open, and begins another
        case.check_drafts(case.watch.rounds[-1:], depth)
    case.ours.spec_depth = case.depth


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_same_seed_same_tokens(case: Case, sampling: dict[str, Any]) -> None:
    report = check_identity(
        case.stock, case.ours, case.prompt(50, 2), 400, 7, 1 + case.depth, **sampling
    )
    assert report.n_tokens == 400
    assert report.illegal == []
    assert len(report.divergences) <= 1  # the last bits of a row; most families have none
    assert case.ours.spec_stats.num_accepted_tokens > 0


def test_every_number_of_accepted_drafts(case: Case) -> None:
    """The right tokens, from stock, with a wrong one planned; the head's own drafts in between."""
    depth, prompt = case.depth, case.prompt(40, 3)
    truth = fresh_text(case.stock, prompt, 150, **GREEDY)
    stream = case.ours.generate(prompt, **GREEDY)
    emitted = [next(stream)]
    for accepted in [*range(depth + 1), *reversed(range(depth + 1))] * 2:
        proposed = truth[len(emitted) :][:depth]
        if accepted < depth:
            proposed[accepted] = models.FIRST_WORD + (proposed[accepted] + 1) % models.N_WORDS
        emitted.append(stream.send(proposed))
        emitted += islice(stream, accepted)
        assert case.watch.rounds[-1].drafts == tuple(proposed)
        assert len(case.watch.rounds[-1].history) == len(prompt) + len(emitted) - accepted - 1
        emitted.append(next(stream))
        case.check_drafts(case.watch.rounds[-1:])
        emitted += islice(stream, depth)  # wherever the head's round ended: the next one is cut
    assert emitted == truth[: len(emitted)]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_that_share_a_prefix(case: Case, sampling: dict[str, Any]) -> None:
    """After a generation that was left in the middle of a round, wherever that was."""
    prompt = case.prompt(40, 4)
    for n in range(1, 6):
        begun = fresh_text(case.stock, prompt, n, **sampling)
        for again in (
            prompt,  # the same
            [*prompt, *begun],  # all of it
            [*prompt, *begun[: n // 2], *case.prompt(5, 5)],  # another turn
            prompt[:25],  # shorter
            [*prompt[:33], *case.prompt(9, 6)],  # a branch
        ):
            assert text(case.ours, prompt, n, **sampling) == begun
            case.watch.rounds.clear()
            assert text(case.ours, again, 6, **sampling) == fresh_text(
                case.stock, again, 6, **sampling
            )
            assert not any(r.unknown for r in case.watch.rounds)
            if n in (2, 5):
                case.check_drafts(case.watch.rounds[:1])


@pytest.mark.parametrize("n", range(1, 5))
def test_state_of_the_middle_of_a_round(case: Case, n: int) -> None:
    prompt = case.prompt(40, 7)
    truth = fresh_text(case.stock, prompt, 60, **SAMPLED)
    stream = case.ours.generate(prompt, **GREEDY)
    begun = [*prompt, *islice(stream, n)]
    state, unknown = case.ours.save_state(), set(case.watch.unknown)
    assert text(case.ours, case.prompt(30, 8), 10, **SAMPLED)
    case.ours.load_state(state)
    case.watch.rounds.clear()
    case.watch.unknown = unknown
    whole = [*begun[:-1], *case.prompt(3, 9)]
    assert text(case.ours, whole, 60, **SAMPLED) == fresh_text(case.stock, whole, 60, **SAMPLED)
    case.check_drafts(case.watch.rounds[:3])
    case.ours.load_state(state)
    assert text(case.ours, prompt, 60, **SAMPLED) == truth


@pytest.mark.parametrize("arch", ["mimo2", "step35", "cohere2moe", "deepseek4", "gemma4-assistant"])
def test_sliding_windows_that_have_moved_on(arch: str, tmp_path: Path) -> None:
    """With caches of the window's size, whose cells have been used again by now."""
    with opened(arch, FAMILIES[arch].max_heads, tmp_path, swa_full=False) as case:
        prompt = case.prompt(50, 10)
        truth = fresh_text(case.stock, prompt, 350, **GREEDY)
        assert text(case.ours, prompt, 350, **GREEDY) == truth
        case.check_drafts(case.watch.rounds[-60::12])


@pytest.mark.parametrize(
    "arch,n_heads", [("qwen35", 1), ("step35", 3), ("deepseek4", 1), ("gemma4-assistant", 1)]
)
@pytest.mark.parametrize(
    ("given", "window", "size"),
    [(6, 6, 70), (40, 40, 70), (None, PREFILL_WINDOW, 300)],  # the larger ones take more batches
)
def test_a_prefill_window_is_where_the_draft_begins(
    arch: str, n_heads: int, given: int | None, window: int, size: int, tmp_path: Path
) -> None:
    """The naive drafter begins at the same token, with its true row; the text does not change."""
    with opened(arch, n_heads, tmp_path, given) as case:
        prompt = case.prompt(size, 12)
        assert text(case.ours, prompt, 40, **GREEDY) == fresh_text(case.stock, prompt, 40, **GREEDY)
        rounds = case.watch.rounds
        shared = arch == "gemma4-assistant"
        first = [window + 1, 1, 1] if n_heads == 1 else [window + 1, window + 2, window + 3]
        drafted = [r for r in rounds if r.drafts]  # the prompt's last row is no round of ours
        assert drafted[0].draft_rows == (case.depth if shared else sum(first))
        for a_round in [*drafted[:4], drafted[-1]]:
            assert a_round.unknown == ()
            assert list(a_round.drafts) == case.reference.drafts(
                a_round.history, case.depth, start=0 if shared else size - window
            )


@pytest.mark.parametrize("arch", ["step35", "hy_v3"])
def test_a_head_with_a_part_of_its_experts_is_refused(arch: str, tmp_path: Path) -> None:
    """The host loads it, and dies in the first draft, or makes another model of it."""
    files = FAMILIES[arch].build(tmp_path, 1, 1)
    header = read_header(files.path)
    head = max(int(t.split(".")[1]) for t in header.tensors if t.startswith("blk."))
    parts = [t for t in header.tensors if t.startswith(f"blk.{head}.ffn_") and "norm" not in t]
    assert len(parts) == 7
    data = files.path.read_bytes()
    for part in parts:
        # The same file, but that this tensor has another name: the host does not look for it.
        renamed = tmp_path / "part.gguf"
        renamed.write_bytes(data.replace(part.encode(), part.replace("ffn", "xxx").encode()))
        report = check_head(renamed)
        assert report.missing == (part,)
        assert not report.executable


def test_a_head_of_glm4moe_with_mrope_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision models: the host runs their trunk, and aborts in the first draft."""

    def write(path: Path, arch: str, keys: dict[str, Any], tensors: Tensors) -> None:
        common.write(path, arch, {**keys, "rope.dimension_sections": [2, 1, 1, 0]}, tensors)

    monkeypatch.setattr(glm4moe, "write", write)
    report = check_head(glm4moe.build(tmp_path, 1, 1).path)
    assert not report.executable
    assert "M-RoPE" in report.reason
