"""Attention as the reduced forward computes it, and the part of it that methods may read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor

from vitpareto.methods.engine.head_maximum import attend_with_head_maximum
from vitpareto.methods.engine.sliced_block import SlicedAttention, fused_attention
from vitpareto.methods.engine.tokens import Tokens

#: how many queries `Attended.patch_rows` computes at a time
ROWS = 64


@dataclass(frozen=True)
class Attended:
    """The inputs of a block's attention.

    Attributes:
        q, k, v: [B, H, N, D] after q/k-norm; in a sliced block v may be wider or narrower.
        scale: factor on the logits.
        bias: added to the logits, [B, 1, 1, N] or [B, 1, N, N]; None if there is none.
        prefix: number of prefix tokens.
        class_token: whether token 0 is a class token.
        valid: [B, n] bool, False for padding; None without padding.
        peak: [B, N, N], maximum of the attention over heads, query by key, without gradient; None
            unless `Reduction.needs_peak`.
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
        """Attention of the queries first to last - 1 over all tokens: [B, H, last - first, N]."""
        logits = (self.q[:, :, first:last] * self.scale) @ self.k.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        return logits.softmax(dim=-1)

    def class_row(self) -> Tensor:
        """The class token's attention over all tokens, [B, H, N], at N * C MACs.

        Without a class token, the mean over the patch queries except padding, at n * N * C MACs.
        """
        if self.class_token:
            return self.attention(0, 1)[:, :, 0]
        return self.patch_rows()[0]

    def patch_rows(self) -> tuple[Tensor, Tensor]:
        """(mean attention of the patch queries except padding [B, H, N], attention of each patch to
        itself [B, H, n]).

        Computed for `ROWS` queries at a time, because [B, H, n, N] takes more memory than a dense
        model, and summed in at least float32, because a sum of many small values drifts in half
        precision.
        """
        total, dtype = self.q.shape[2], self.q.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sums, own = [], []
        for first in range(self.prefix, total, ROWS):
            last = min(first + ROWS, total)
            rows = self.attention(first, last)
            # clone: a view would keep all of `rows` alive
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
    """(output [B, N, C], `Attended`) of attention over x [B, N, C].

    It has all parts of timm's Attention: q/k-norm, gate, scale norm, dropout. No mask is passed
    before the first merge or padding, because CUDA's flash kernel takes none.
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
        out, peak = attend_with_head_maximum(q, k, v, attn.scale, bias, dropout)
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
