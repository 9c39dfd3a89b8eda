"""What llama.cpp can do with each architecture's NextN head: one table, read by everyone.

The facts are those of llama.cpp as llama-cpp-python 0.3.36 carries it. They cannot be asked for at
run time (libllama aborts instead of answering), so they are written down here, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rollback = Literal["attention", "snapshots", "checkpoint"]
"""How the target forgets rejected tokens.

``attention``: the KV cache is cut at any position. ``snapshots``: recurrent state, restored from
the last ``n_rs_seq + 1`` rows of the last micro-batch. ``checkpoint``: recurrent state with no
snapshots; a copy from before the drafts and a replay bring it back.
"""


OWN_OUTPUT = "nextn.shared_head_head.weight"
"""Of a NextN block: an output matrix that this head alone reads."""


@dataclass(frozen=True)
class Architecture:
    """One architecture whose NextN graph llama.cpp can execute.

    Attributes:
        gathers: the NextN graph picks the output rows *before* it publishes the hidden rows. Such
            a draft context must hand them out masked (one per output); every other one unmasked
            (one per batch position). The wrong choice returns another token's row, or aborts.
        rollback: how the target forgets rejected tokens.
        mrope: positions of one sequence may have gaps (M-RoPE), always.
        chained: may have several heads, one for each draft position; elsewhere more than one head
            aborts.
        own_output: the head may have an output matrix of its own (``nextn.shared_head_head``);
            elsewhere the loader refuses a file with such a tensor.
        shares_kv: the head is a model of its own that reads the KV cache of the target.
        target: the architecture of that target.
        requires: tensors of the NextN block, without ``blk.N.``, that the graph uses unchecked or
            asserts on, besides those that every NextN block must have.
        one_of: sets of tensors, of which one has to be complete: the loader takes a part of one,
            and the graph crashes on it.
    """

    gathers: bool
    rollback: Rollback = "attention"
    mrope: bool = False
    chained: bool = False
    own_output: bool = True
    shares_kv: bool = False
    target: str = ""
    requires: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()


_DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
_EXPERTS = (
    "ffn_gate_inp.weight",
    "ffn_down_exps.weight",
    "ffn_gate_shexp.weight",
    "ffn_up_shexp.weight",
    "ffn_down_shexp.weight",
)
_MOE = (*_EXPERTS, "ffn_gate_exps.weight", "ffn_up_exps.weight")
_MOE_FUSED = (*_EXPERTS, "ffn_gate_up_exps.weight")

ARCHITECTURES: dict[str, Architecture] = {
    "qwen35": Architecture(gathers=False, rollback="snapshots", mrope=True),
    "qwen35moe": Architecture(gathers=False, rollback="snapshots", mrope=True),
    "qwen3next": Architecture(gathers=True, rollback="checkpoint"),
    "step35": Architecture(gathers=True, chained=True, one_of=(_DENSE, _MOE)),
    # The trunk may have split q/k/v and experts; the NextN graph knows only the fused, dense form.
    "mimo2": Architecture(
        gathers=True,
        chained=True,
        requires=("attn_qkv.weight", *_DENSE),
    ),
    "hy_v3": Architecture(gathers=False, chained=True, one_of=(_DENSE, _MOE, _MOE_FUSED)),
    "glm4moe": Architecture(gathers=False),
    "deepseek2": Architecture(gathers=False),
    "deepseek32": Architecture(gathers=False),
    "glm-dsa": Architecture(gathers=False),
    "deepseek4": Architecture(gathers=True, rollback="snapshots"),
    "cohere2moe": Architecture(gathers=False),
    # Right in either mode; unmasked also leaves the rows of the catch-up readable.
    "nemotron_h_moe": Architecture(
        gathers=False,
        rollback="snapshots",
        own_output=False,
        requires=("nextn.shared_head_norm.weight",),
    ),
    "bailingmoe3": Architecture(
        gathers=False,
        rollback="snapshots",
        own_output=False,
        requires=("layer_output_norm.weight",),
    ),
    "gemma4-assistant": Architecture(
        gathers=True, own_output=False, shares_kv=True, target="gemma4"
    ),
}

NOT_EXECUTABLE: dict[str, str] = {
    "glm5-next": "llama.cpp 0.3.36 loads the NextN tensors of glm5-next but has no graph for them",
    "dots3note": "llama.cpp 0.3.36 skips the NextN tensors of dots3note",
    "exaone4": "llama.cpp 0.3.36 skips the NextN tensors of exaone4",
    "exaone-moe": "llama.cpp 0.3.36 skips the NextN tensors of exaone-moe",
    "glm4": "llama.cpp 0.3.36 skips the NextN tensors of glm4",
    "bailingmoe2": "llama.cpp 0.3.36 skips the NextN tensors of bailingmoe2",
    "nemotron_h": "llama.cpp 0.3.36 has a NextN graph for nemotron_h_moe only, not for nemotron_h",
    "graniteswitch": "graniteswitch uses the NextN count for its router layer, which is not a head",
}
"""Architectures that may declare NextN layers and still have nothing to execute, and why."""

# Trunks that are not in the table above and are not attention-only.
_SNAPSHOTS = frozenset({"kimi-k3", "qwen4exp", "glm5-next", "nemotron_h", "lfm2", "lfm2moe"})
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_HYBRID = frozenset(
    {"jamba", "falcon-h1", "plamo2", "granitehybrid", "kimi-linear", "minimax-01"},
)


def rollback_of(architecture: str) -> Rollback:
    """How a trunk of this architecture forgets rejected tokens, with or without a NextN head.

    An architecture that is in no list is taken for an attention-only one.
    """
    if known := ARCHITECTURES.get(architecture):
        return known.rollback
    if architecture in _SNAPSHOTS:
        return "snapshots"
    return "checkpoint" if architecture in _RECURRENT | _HYBRID else "attention"
