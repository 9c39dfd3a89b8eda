"""Draft a little with one file, compare with plain decoding, and say whether it pays here.

The trial runs in a child process: a head that the host takes for sound may still bring it down at
its first decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from ..errors import LlamaMtpError
from . import child

Verdict = Literal["on", "even", "off", "broken", "impossible"]

MAX_TOKENS = 64
PROMPTS = ("code_python", "explain_concept", "creative_short")  # of pairs.PROMPTS

_BROKEN = 0.05  # of the first drafts: a head that merely guesses badly agrees far more often
_WORTH = 1.03  # below this, a gain cannot be told from noise in so short a trial


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        tokens: compared with plain decoding, greedy, at constant depth.
        partings: where the texts parted, in words.
        illegal: those of them that rounding does not explain (see `llama_mtp.measure.identity`).
        drafted, accepted: tokens, over the same text.
        acceptance: by draft position, how often a draft agreed given that all before it had.
        plain_rate, mtp_rate: tokens per second, medians, the depth following its gain.
        ratio: median of paired runs; above 1 MTP is faster.
        depth: the depth that pays most by what was measured; 0 is plain decoding.
        reckoning: the numbers behind it, in a sentence.
        memory: bytes by context and part, as the host reported.
        added_memory: bytes that the buffers of an object with MTP take more than those of stock.
        on_gpu: layers were offloaded.
        can_offload: the host has a GPU to offload to.
    """

    tokens: int
    partings: tuple[str, ...]
    illegal: int
    drafted: int
    accepted: int
    acceptance: tuple[float, ...]
    plain_rate: float
    mtp_rate: float
    ratio: float
    depth: int
    reckoning: str
    memory: Mapping[str, int]
    added_memory: int
    on_gpu: bool
    can_offload: bool = False


@dataclass(frozen=True)
class Judgement:
    """Whether to turn MTP on here: one line, and what to try where something is wrong."""

    verdict: Verdict
    advice: str
    attempts: tuple[str, ...] = field(default=())


def judge(trial: Trial, cheaper_command: str = "") -> Judgement:
    """Turn measurements into advice; ``cheaper_command`` is that of the file's inspection."""
    if not trial.drafted:
        return Judgement("even", "Nothing was drafted, so nothing can be said; use longer texts.")
    first = trial.acceptance[0]
    if first < _BROKEN:
        return Judgement(
            "broken",
            f"Leave MTP off here, it is broken: {trial.accepted} of {trial.drafted} drafts agreed "
            "with the model (texts stay right, speed is lost).",
            _attempts(trial),
        )
    if trial.illegal:
        return Judgement(
            "broken",
            f"Leave MTP off here and report it: {trial.illegal} of {len(trial.partings)} places "
            "where the text differs from plain decoding are more than rounding.",
            ("spec_type='none' until that is mended",),
        )
    numbers = (
        f"{trial.ratio:.2f} times as fast as plain decoding, {first:.0%} of first drafts agree"
    )
    gpu = ("--n-gpu-layers -1: only the processor was tried",)
    attempts: tuple[str, ...] = gpu if trial.can_offload and not trial.on_gpu else ()
    if cheaper_command:
        attempts += (f"{cheaper_command}: drafts then read less",)
    if trial.ratio < 1 / _WORTH and trial.depth:
        return Judgement(
            "even",
            f"MTP makes no clear difference here: {numbers}, though rounds of depth {trial.depth} "
            "were cheaper than plain tokens.",
            ("--repeats 5, or llama-mtp bench: so short a trial is noisy", *attempts),
        )
    if trial.ratio < 1 / _WORTH:
        advice = f"Leave MTP off here, drafts cost more than they save: {numbers}."
        return Judgement("off", advice, attempts)
    if trial.depth and trial.ratio >= _WORTH:
        advice = f"Turn MTP on here, at depth {trial.depth}: {numbers}."
        return Judgement("on", advice, attempts)
    advice = f"MTP makes no clear difference here: {numbers}; 'auto' is harmless."
    return Judgement("even", advice, attempts)


def _attempts(trial: Trial) -> tuple[str, ...]:
    gpu = (
        "--n-gpu-layers 0: if most drafts agree then, the GPU backend computes the head wrongly "
        "(known from Vulkan, see ggml-org/llama.cpp#27151); use another backend or a newer "
        "llama-cpp-python",
    )
    return (
        *(gpu if trial.on_gpu else ()),
        "another GGUF of the same model: this one's head may be damaged, or in too few bits",
        "llama-mtp graft FILE HEAD -o JOINED.gguf --type Q8_0: a head in a better type, from a "
        "file or a checkpoint that has one",
    )


def run_trial(path: str, **options: Any) -> Trial | Judgement:
    """Run a trial in a child; a judgement instead where the file cannot be tried at all.

    Args:
        path: the GGUF.
        options: those of :func:`measure`, in types that JSON knows.

    Raises:
        LlamaMtpError: no child can be started.
    """
    reply = child.ask(__name__, {"path": path, **options})
    if reply.answer is None:
        reason = f"the host {reply.fate} over it, last words: {reply.last_words}"
    elif "reason" not in reply.answer:
        lists = {k: tuple(reply.answer[k]) for k in ("partings", "acceptance")}
        return Trial(**{**reply.answer, **lists})
    else:
        reason = reply.answer["reason"]
    return Judgement("impossible", f"Leave MTP off here: {reason}")


# --- in the child ---------------------------------------------------------------------------------


def measure(path: str, *, max_tokens: int = MAX_TOKENS, repeats: int = 1, **options: Any) -> Trial:
    """Load the file once, and let a stock object and one with MTP write the same texts.

    Args:
        path: the GGUF.
        max_tokens: per text.
        repeats: paired runs per text.
        options: keyword arguments of ``Llama``, for both.
    """
    from ..host import can_offload
    from . import bench, pairs
    from .identity import IdentityReport, check_identity

    texts = {name: pairs.PROMPTS[name] for name in PROMPTS}
    with pairs.open_pair(path, verbose=True, **options) as (plain, mtp, added_memory):
        session = mtp._session
        assert session is not None
        policy, depth = session.policy, mtp.spec_depth
        reports: dict[str, IdentityReport] = {}
        with mtp.spec_constant_depth(depth):
            for name, text in texts.items():
                prompt = pairs.chat_tokens(plain, text)
                reports[name] = check_identity(
                    plain, mtp, prompt, max_tokens, max_batch=1 + depth, quiet=True, temp=0.0
                )
        stats = mtp.spec_stats
        drafted, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
        acceptance = tuple(round(rate, 4) for rate in stats.acceptance_per_pos)
        figures = bench.measure(
            plain, mtp, texts, ("plain", "adaptive"), max_tokens=max_tokens, repeats=repeats
        )
        return Trial(
            tokens=sum(report.n_tokens for report in reports.values()),
            partings=tuple(
                f"{n}: {parting}" for n, r in reports.items() for parting in r.divergences
            ),
            illegal=sum(len(report.illegal) for report in reports.values()),
            drafted=drafted,
            accepted=accepted,
            acceptance=acceptance,
            plain_rate=round(figures.rate(0.0, "plain"), 2),
            mtp_rate=round(figures.rate(0.0, "adaptive"), 2),
            ratio=round(median(figures.ratio(name, 0.0, "adaptive") for name in texts), 3),
            depth=policy.best,
            reckoning=policy.explain(),
            memory=mtp.spec_memory(),
            added_memory=added_memory,
            on_gpu=bool(options.get("n_gpu_layers")),
            can_offload=can_offload(),
        )


def answer(**question: Any) -> dict[str, Any]:
    """Return a trial as a dict, or the reason why there is none."""
    try:
        return dict(vars(measure(**question)))
    except (LlamaMtpError, ValueError, RuntimeError, MemoryError) as error:
        return {"reason": str(error) or type(error).__name__}


if __name__ == "__main__":
    child.serve(answer)
