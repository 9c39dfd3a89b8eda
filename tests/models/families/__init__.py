"""Tiny models with random weights, one module per architecture; `FAMILIES` by architecture."""

from __future__ import annotations

from . import (
    bailingmoe3,
    cohere2moe,
    deepseek2,
    deepseek4,
    deepseek32,
    gemma4,
    glm4moe,
    glm_dsa,
    hy_v3,
    mimo2,
    nemotron_h_moe,
    qwen3next,
    qwen35,
    qwen35moe,
    step35,
)
from .common import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.arch: module.FAMILY
    for module in (
        qwen35,
        qwen35moe,
        qwen3next,
        nemotron_h_moe,
        bailingmoe3,
        deepseek2,
        deepseek32,
        glm_dsa,
        deepseek4,
        glm4moe,
        cohere2moe,
        mimo2,
        step35,
        hy_v3,
        gemma4,
    )
}
