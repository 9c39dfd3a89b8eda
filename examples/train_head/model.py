"""The NextN block in PyTorch: what the host's ``mimo2`` MTP graph computes, and its training view.

Row ``p`` of a sequence holds token ``x[p]`` and the trunk's hidden row ``h[p]``. Draft step 1 at
row ``p`` reads ``(x[p], h[p-1])`` and predicts ``x[p+1]``. Step k reads ``x[p+k-1]`` and the row
that step k-1 returned, and attends to the true rows up to ``p`` and to the draft rows after them,
as the draft context's cache holds them at run time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from common import Base, Floats
from torch import Tensor, nn
from torch.nn import functional as F

#: Name in the file -> name here. Fused matrices are kept apart in training.
PLAIN = {"attn_output": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
NORMS = {
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "nextn.shared_head_norm": "head_norm",
}


class Head(nn.Module):
    """One NextN block; tensors are ``[batch, rows, ...]``."""

    e: nn.Parameter
    h: nn.Parameter
    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    o: nn.Parameter
    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter
    enorm: nn.Parameter
    hnorm: nn.Parameter
    attn_norm: nn.Parameter
    ffn_norm: nn.Parameter
    head_norm: nn.Parameter
    frequency: Tensor

    def __init__(self, base: Base, weights: Mapping[str, Floats]):
        super().__init__()
        self.n_head, self.n_head_kv, self.eps = base.n_head, base.n_head_kv, base.eps
        self.head_dim = base.head_dim
        kv = base.n_head_kv * base.head_dim
        qkv = np.split(weights["attn_qkv"], [base.n_embd, base.n_embd + kv])
        halves = np.split(weights["nextn.eh_proj"], 2, axis=1)
        parts = dict(zip("qkv", qkv, strict=True)) | dict(zip("eh", halves, strict=True))
        parts |= {name: weights[source] for source, name in (PLAIN | NORMS).items()}
        for name, value in parts.items():
            own = torch.from_numpy(np.array(value, dtype=np.float32))
            self.register_parameter(name, nn.Parameter(own))
        exponent = torch.arange(0, base.head_dim, 2, dtype=torch.float32) / base.head_dim
        self.register_buffer("frequency", base.rope_base**-exponent, persistent=False)

    def export(self) -> dict[str, Floats]:
        """Return the weights under the names of the GGUF tensors."""
        get = {n: p.detach().float().numpy() for n, p in self.named_parameters()}
        head = {source: get[name].copy() for source, name in (PLAIN | NORMS).items()}
        head["attn_qkv"] = np.concatenate([get["q"], get["k"], get["v"]])
        head["nextn.eh_proj"] = np.concatenate([get["e"], get["h"]], axis=1)
        return head

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm."""
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps)

    def rope(self, x: Tensor, pos: Tensor) -> Tensor:
        """Rotate ``[batch, rows, heads, dim]`` by ``pos [rows]``, split-half order."""
        angle = pos[:, None, None] * self.frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def inputs(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Join the token's embedding and the hidden row before it."""
        e = F.linear(self.norm(embedding, self.enorm), self.e)
        return (e + F.linear(self.norm(hidden, self.hnorm), self.h)).float()

    def qkv(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return roped queries, keys and values as ``[batch, heads, rows, dim]``."""
        b, t, _ = x.shape
        x = self.norm(x, self.attn_norm)
        q = self.rope(F.linear(x, self.q).view(b, t, self.n_head, -1), pos)
        k = self.rope(F.linear(x, self.k).view(b, t, self.n_head_kv, -1), pos)
        v = F.linear(x, self.v).view(b, t, self.n_head_kv, -1)
        groups = self.n_head // self.n_head_kv
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """Finish the block: output projection and feed-forward, each with its residual."""
        b, _, t, _ = attended.shape
        x = x + F.linear(attended.transpose(1, 2).reshape(b, t, -1), self.o).float()
        y = self.norm(x, self.ffn_norm)
        y = F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down)
        return x + y.float()

    def steps(self, embedding: Tensor, hidden: Tensor, allowed: Tensor, n: int) -> list[Tensor]:
        """Run ``n`` draft steps from every row at once.

        ``embedding [b, t, e]`` and ``hidden [b, t, e]`` (row p: ``h[p-1]``) are the true rows,
        ``allowed [b, 1, t, t]`` says which rows a row may attend to. The k-th result (from 0) has
        ``t - k`` rows: row p is the hidden row of draft step k+1 started at p.
        """
        t = embedding.shape[1]
        pos = torch.arange(t, dtype=torch.float32)
        x = self.inputs(embedding, hidden)
        q, k1, v1 = self.qkv(x, pos)
        out = [self.rest(x, F.scaled_dot_product_attention(q, k1, v1, attn_mask=allowed))]
        drafted: list[tuple[Tensor, Tensor]] = []
        scale = self.head_dim**-0.5
        for k in range(1, n):
            m = t - k
            x = self.inputs(embedding[:, k:], out[-1][:, :m])
            q, kk, vk = self.qkv(x, pos[k:])
            drafted = [(a[:, :, :m], b[:, :, :m]) for a, b in drafted] + [(kk, vk)]
            # Scores against the true rows, then against this chain's own draft rows.
            scores = (q @ k1[:, :, :m].transpose(2, 3)) * scale
            scores = scores.masked_fill(~allowed[:, :, :m, :m], float("-inf"))
            own = torch.stack([(q * a).sum(-1) * scale for a, _ in drafted], dim=-1)
            weights = torch.cat([scores, own], dim=-1).float().softmax(-1).to(v1.dtype)
            mixed = weights[..., :m] @ v1[:, :, :m]
            for j, (_, b) in enumerate(drafted):
                mixed = mixed + weights[..., m + j, None] * b
            out.append(self.rest(x, mixed))
        return out
