"""The block and the attention of sliced models, with separate widths of q/k and v.

In a model sliced by NViT or ReViT they replace timm's `Block` and `Attention` under the same
parameter names. `methods.slicing.sliced_model` builds them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool = False,
) -> Tensor:
    """Fused attention of q, k [B, H, N, qk] and v [B, H, N, v]: [B, H, N, v].

    The CPU kernel requires equal widths; the fallback takes three times as long (8 heads of 32 and
    48, 197 tokens). So on a CPU the narrower ones are padded with zeros, which do not change the
    result. Traced programs, which may run on any device, are not padded.
    """
    qk, own = q.shape[-1], v.shape[-1]
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    settings: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout, "is_causal": is_causal}
    if q.device.type != "cpu" or qk == own or tracing:
        return F.scaled_dot_product_attention(q, k, v, **settings)
    if own < qk:
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, qk - own)), **settings)[..., :own]
    q, k = F.pad(q, (0, own - qk)), F.pad(k, (0, own - qk))
    return F.scaled_dot_product_attention(q, k, v, **settings, scale=qk**-0.5)


class SlicedAttention(Attention):
    """timm's Attention with separate widths of q/k (`head_dim`) and v (`v_dim`) per head.

    `qkv` outputs heads * (2 qk + v) channels in the order q, k, v, each head by head. `attn_dim` is
    heads * v, the width of `norm`, `gate` and `proj`. The buffer `widths` [3] (heads, qk, v) makes
    the dimensions readable from a state dict. Built by `methods.slicing.sliced_model` only.
    """

    v_dim: int
    widths: Tensor

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, H, N, qk] and v [B, H, N, v], from `qkv`'s output [B, N, heads * (2 qk + v)]."""
        wide = self.num_heads * self.head_dim
        q, k, v = qkv.split((wide, wide, self.attn_dim), dim=-1)
        batch, total, _ = qkv.shape
        q, k = (t.view(batch, total, self.num_heads, self.head_dim) for t in (q, k))
        v = v.view(batch, total, self.num_heads, self.v_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attention over x [B, N, C], as timm's; `attn_mask` is added to the logits."""
        q, k, v = self.split(self.qkv(x))
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            out = fused_attention(q, k, v, attn_mask, dropout, is_causal)
        else:
            weights = (q * self.scale) @ k.transpose(-2, -1)
            if is_causal:
                ahead = torch.ones(weights.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                weights = weights.masked_fill(ahead, -torch.inf)
            elif attn_mask is not None and attn_mask.dtype is torch.bool:
                weights = weights.masked_fill(~attn_mask, -torch.inf)
            elif attn_mask is not None:
                weights = weights + attn_mask
            out = F.dropout(weights.softmax(dim=-1), dropout, self.training) @ v
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, meta: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """As any module's, but other widths are an error: 2 heads of 16 and 4 heads of 8 have
        weights of the same shapes.
        """
        given, own = state.get(prefix + "widths"), [self.num_heads, self.head_dim, self.v_dim]
        if given is not None and not given.is_meta and given.tolist() != own:
            errors.append(f"{prefix}widths (heads, qk, v) must be {own} (got {given.tolist()})")
            return
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)


class SlicedBlock(Block):
    """timm's Block with a `SlicedAttention` and an MLP of any hidden width."""
