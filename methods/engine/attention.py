"""A block's attention as the reduced forward computes it, and what a method may read of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor

from vitpareto.methods.engine.head_maximum import attend_by_head
from vitpareto.methods.engine.sliced_block import SlicedAttention, fused_attention
from vitpareto.methods.engine.tokens import Tokens

#: patch queries whose attention `Attended.patch_rows` holds at a time
ROWS = 64


@dataclass(frozen=True)
class Attended:
    """What a block's attention saw: q, k, v [B, H, N, D] after any q/k-norm, and the key bias. In a
    sliced block v has a width of its own.

    peak [B, N, N]: the attention's maximum over heads, without a gradient, query by key; None
    where the reduction did not ask for it (`Reduction.needs_peak`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    prefix: int
    class_token: bool
    valid: Tensor | None
    peak: Tensor | None = None

    def attention(self, first: int, last: int) -> Tensor:
        """Attention of the queries first..last-1 over all tokens: [B, H, last - first, N]."""
        logits = (self.q[:, :, first:last] * self.scale) @ self.k.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        return logits.softmax(dim=-1)

    def class_row(self) -> Tensor:
        """The class token's attention over all tokens, [B, H, N]; N * C multiply-accumulates.

        Without a class token: the mean over the patch queries (padding left out), n * N * C.
        """
        if self.class_token:
            return self.attention(0, 1)[:, :, 0]
        return self.patch_rows()[0]

    def patch_rows(self) -> tuple[Tensor, Tensor]:
        """The mean over the patch queries of their attention, padding left out, [B, H, N], and what
        each patch pays itself, [B, H, n].

        Some queries at a time: [B, H, n, N] is more memory than a dense model needs. Summed in at
        least float32: a half precision's sum of many small shares drifts.
        """
        total, dtype = self.q.shape[2], self.q.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sums, own = [], []
        for first in range(self.prefix, total, ROWS):
            last = min(first + ROWS, total)
            rows = self.attention(first, last)
            # a copy: a view would keep all of `rows` alive
            own.append(rows[..., first:last].diagonal(dim1=-2, dim2=-1).clone())
            if self.valid is not None:
                counted = self.valid[:, first - self.prefix : last - self.prefix]
                rows = rows.masked_fill(~counted[:, None, :, None], 0.0)
            sums.append(rows.sum(dim=2, dtype=wide))
        count: Tensor | int = total - self.prefix
        if self.valid is not None:
            count = self.valid.sum(dim=1)[:, None, None]
        return (torch.stack(sums).sum(dim=0) / count).to(dtype), torch.cat(own, dim=-1)


def attend(
    attn: Attention,
    x: Tensor,
    tokens: Tokens,
    class_token: bool,
    proportional: bool,
    needs_peak: bool = False,
) -> tuple[Tensor, Attended]:
    """Attention over x [B, N, C] with everything timm's has: q/k-norm, gate, scale norm, dropout.

    Returns (output [B, N, C], Attended). No mask is passed before the first merge or padding: a
    mask costs the flash kernel on CUDA.
    """
    batch, total, _ = x.shape
    if isinstance(attn, SlicedAttention):
        q, k, v = attn.split(attn.qkv(x))
    else:
        qkv = attn.qkv(x).view(batch, total, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = tokens.key_bias(proportional)
    dropout = attn.attn_drop.p if attn.training else 0.0
    peak = None
    if needs_peak:
        out, peak = attend_by_head(q, k, v, attn.scale, bias, dropout)
    elif attn.fused_attn:
        out = fused_attention(q, k, v, bias, dropout)
    else:
        weights = (q * attn.scale) @ k.transpose(-2, -1)
        if bias is not None:
            weights = weights + bias
        out = F.dropout(weights.softmax(dim=-1), dropout, attn.training) @ v
    out = attn.norm(out.transpose(1, 2).reshape(batch, total, attn.attn_dim))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    seen = Attended(q, k, v, attn.scale, bias, tokens.prefix, class_token, tokens.valid, peak)
    return out, seen
