"""What libllama aborts on while it loads a model, as far as the header shows it.

libllama answers most faults of a file with an error. Where it asserts instead, the process would
end; so such a file is refused before libllama sees it. The rules are those of llama.cpp as
llama-cpp-python 0.3.36 carries it; ``tests/hostile/loads.py`` looks for what they leave out.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ModelFileError
from ..gguf.header import ArrayInfo, shown
from ..gguf.model import Gguf
from ..gguf.types import SCALARS

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
LAST_GATING = 4  # LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS

_ROPE_SCALING = ("none", "linear", "yarn", "longrope")
# I8, I16, I32, I64 and F64: types that no row can be looked up in.
_NO_WEIGHTS = frozenset({24, 25, 26, 27, 28})
_F32 = 0
_ONLY_F32 = (
    ".attn_sinks.weight",
    *(f".hc_{part}_{kind}.weight" for part in ("attn", "ffn") for kind in ("base", "scale")),
)
# libllama forgets the experts of these where there is one or none.
_EXPERTS_OPTIONAL = frozenset({"hunyuan_vl", "hunyuan-dense"})
# Trunks with a sliding window in some layers, as a list says.
_SLIDING = frozenset(
    {
        *("mimo2", "step35", "cohere2moe", "exaone-moe", "dots3note"),
        *("gemma4", "gemma4-assistant"),
    }
)
# Of these, those whose heads are as wide in the window as outside.
_ONE_WIDTH = frozenset({"cohere2moe", "exaone-moe", "deepseek4"})
# Latent attention: one key of the latent and the rotated part, shared by all heads.
_LATENT = frozenset({"deepseek2", "deepseek32", "glm-dsa", "bailingmoe3"})
# Sparse attention whose indexer the host rotates by a Hadamard matrix of 64 and its doubles.
_INDEXED = frozenset({"deepseek32", "glm-dsa", "deepseek4"})
# Linear attention whose value heads are taken to be as wide as the state.
_GATED_DELTA = frozenset({"qwen35", "qwen35moe", "qwen3next"})
# Graphs that rotate the whole of every head.
_WHOLE_ROPE = frozenset(
    {
        *("hy_v3", "cohere2moe", "exaone4", "exaone-moe", "granite", "graniteswitch"),
        *("qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "smollm3"),
    }
)


def refuse_what_aborts(model: Gguf) -> None:
    """Raise ModelFileError for a file that libllama would not survive, by its header."""
    for fault in _faults(model):
        raise ModelFileError(
            f"{shown(model.path)} {shown(fault)}, which llama.cpp aborts on. "
            "Convert or download the model again."
        )


def _faults(model: Gguf) -> Iterator[str]:
    if model.repeats_token:
        yield "has a token twice in its vocabulary"
    yield from _layers(model)
    yield from _experts(model)
    yield from _attention(model)
    for tensor in model.tensors.values():
        looked_up = tensor.name in ("token_embd.weight", "per_layer_token_embd.weight")
        if tensor.type in _NO_WEIGHTS and (looked_up or ".nextn.embed_tokens." in tensor.name):
            yield f"stores {tensor.name} as whole numbers or doubles"
        if tensor.type != _F32 and tensor.name.endswith(_ONLY_F32):
            yield f"stores {tensor.name} as something else than F32"


def _layers(model: Gguf) -> Iterator[str]:
    n_layers, n_heads = model.number("block_count"), model.number("nextn_predict_layers") or 0
    impossible = n_layers is not None and not 0 < n_layers <= MAX_LAYERS
    if impossible or n_heads > (n_layers or 0):
        yield f"declares {n_layers or 0} layers with {n_heads} NextN layers among them"


def _experts(model: Gguf) -> Iterator[str]:
    number = model.number
    n_experts = number("expert_count") or 0
    if model.architecture in _EXPERTS_OPTIONAL and n_experts <= 1:
        return
    per_layer = f"{model.architecture}.expert_used_count" in model.metadata
    n_used = number("expert_used_count")
    n_groups = number("expert_group_count") or 0
    n_groups_used = number("expert_group_used_count") or 0
    if n_experts > MAX_EXPERTS:
        yield f"declares {n_experts} experts"
    # A list has another number for every layer, and is not read here.
    if n_used is None and per_layer:
        n_used = min(1, n_experts)
    if not (n_used or 0) <= n_experts or (n_experts and not n_used):
        yield f"uses {n_used or 0} of {n_experts} experts"
    gating = number("expert_gating_func") or 0
    if gating > LAST_GATING:
        yield f"chooses its experts by the unknown function {gating}"
    if n_groups and (
        n_groups >= n_experts
        or (n_groups > 1 and (n_experts % n_groups or not 0 < n_groups_used < n_groups))
    ):
        yield f"uses {n_groups_used} of {n_groups} groups of {n_experts} experts"


def _attention(model: Gguf) -> Iterator[str]:
    number = model.number
    scaling = model.metadata.get(f"{model.architecture}.rope.scaling.type")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALING:
        yield f"has the unknown RoPE scaling {scaling!r}"
    if model.architecture in _SLIDING:
        every = number("attention.sliding_window_pattern")
        if every == 1 or _all_zero(model, "attention.sliding_window_pattern"):
            yield "has a sliding window and no layer that uses it"
    if model.architecture in _ONE_WIDTH:
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            whole, window = number(name), number(f"{name}_swa")
            if None not in (whole, window) and whole != window:
                yield f"has {name} {window} in the window and {whole} elsewhere"
    if number("full_attention_interval") == 0:
        yield "has full attention in every 0th layer"
    if model.architecture in _WHOLE_ROPE:
        width, n_heads = number("embedding_length"), number("attention.head_count")
        rotated, head = number("rope.dimension_count"), number("attention.key_length")
        if head is None and width and n_heads:
            head = width // n_heads
        if None not in (rotated, head) and rotated != head:
            yield f"rotates {rotated} of {head} numbers of a head"
        if None not in (head, values := number("attention.value_length")) and values != head:
            yield f"has keys of {head} and values of {values} in a head"
    if model.architecture in _LATENT:
        key, rotated = number("attention.key_length_mla"), number("rope.dimension_count")
        latent, row = number("attention.kv_lora_rank"), number("attention.key_length")
        if key and rotated is not None and key <= rotated:
            yield f"rotates {rotated} of {key} numbers of a head"
        if key and None not in (latent, rotated, row) and row != (latent or 0) + (rotated or 0):
            yield f"has keys of {row} that are made of {latent} and {rotated}"
        if key and number("attention.head_count_kv") not in (None, 1):
            yield f"has {number('attention.head_count_kv')} latent keys in a layer"
    if model.architecture == "deepseek4":
        head, rotated = number("attention.key_length"), number("rope.dimension_count")
        if head is not None and (rotated or 0) > head:
            yield f"rotates {rotated} of {head} numbers of a head"
        if number("attention.head_count_kv") not in (None, 1):
            yield f"has {number('attention.head_count_kv')} keys in a layer"
    if model.architecture in _INDEXED and (width := number("attention.indexer.key_length")):
        blocks, rest = divmod(width, 64)  # deepseek4 rotates block by block, the others at once
        if rest or (model.architecture != "deepseek4" and blocks & (blocks - 1)):
            yield f"has an indexer that is {width} wide"
    if model.architecture in _GATED_DELTA:
        inner, state = number("ssm.inner_size"), number("ssm.state_size")
        heads, groups = number("ssm.time_step_rank"), number("ssm.group_count")
        if inner is not None and inner != (state or 0) * (heads or 0):
            yield f"has {heads} linear-attention heads of {state} that make {inner}"
        if groups and heads and heads % groups:
            yield f"has {heads} linear-attention heads in {groups} groups"


def _all_zero(model: Gguf, name: str) -> bool:
    """Whether a key is a list of numbers for the layers, none of which is set."""
    key = f"{model.architecture}.{name}"
    info = model.metadata.get(key)
    if not isinstance(info, ArrayInfo) or info.type not in SCALARS or info.count > MAX_LAYERS:
        return False
    values = model.array(key)  # none of a file that is about to be written
    return bool(values) and not any(values)
