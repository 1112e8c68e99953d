"""Attention and its maximum over heads, computed together: tensors in, tensors out.

The fused kernel gives no weights, and all of them at once, [B, H, N, N], are more memory than a
dense model needs. Taking both from one head (or one image) after another costs little more than the
fused kernel alone, and less than computing the weights a second time beside it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

#: queries whose attention `attend_by_head` holds at a time; up to twice as many go as one
ROWS = 128


def attend_by_head(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention of q, k, v [B, H, N, D]: (output [B, H, N, D], maximum over heads [B, N, N]).

    One head and some queries at a time: [B, H, N, N] is never there, and weights are still in the
    cache when the maximum reads them. The maximum is taken before dropout and has no gradient.
    bias [B, 1, 1, N] is added to the logits.
    """
    batch, heads, total, _ = q.shape
    if total <= 2 * ROWS:
        out, peak = _attend_rows(q, k, v, scale, bias, dropout)
        return out.transpose(1, 2), peak
    outs: list[Tensor] = []
    whole: Tensor | None = None
    for first in range(0, total, ROWS):
        rows = q[:, :, first : first + ROWS]
        out, part = _attend_rows(rows, k, v, scale, bias, dropout)
        if first == 0:
            # filled in, not joined: [B, N, N] twice would be the peak of the model's memory
            peak = part.new_empty(batch, total, total)
            if not out.requires_grad:
                whole = out.new_empty(batch, total, heads, v.shape[3])
        peak[:, first : first + ROWS] = part
        if whole is None:
            outs.append(out)
        else:
            whole[:, first : first + ROWS] = out
    out = torch.cat(outs, dim=1) if whole is None else whole
    return out.transpose(1, 2), peak


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """`attend_by_head` for some queries, q [B, H, n, D]: (output [B, n, H, D], maximum [B, n, N]).

    Taken head by head, the output's layout is the one that joins the heads without a copy.
    """
    # inference mode: nothing differentiates, traces or exports what is written in place
    plain = not torch.compiler.is_compiling() and q.is_inference()
    if plain and not dropout and not torch.is_autocast_enabled(q.device.type):
        # by image where that holds no more weights at a time; a GPU wants few, large products
        by_image = q.device.type == "cpu" and q.shape[0] >= q.shape[1]
        reusing = _attend_images_reusing if by_image else _attend_rows_reusing
        return reusing(q, k, v, scale, bias)
    out: list[Tensor] = []
    peak: Tensor | None = None
    for head in range(q.shape[1]):
        weights = (q[:, head] * scale) @ k[:, head].transpose(-2, -1)
        if bias is not None:
            weights = weights + bias[:, 0]
        weights = weights.softmax(dim=-1)
        out.append(F.dropout(weights, dropout, dropout > 0) @ v[:, head])
        if peak is None:
            # the maximum is taken in place: not where the backward pass will read the weights
            peak = weights.detach().clone() if weights.requires_grad else weights
        else:
            torch.maximum(peak, weights.detach(), out=peak)
    return torch.stack(out, dim=2), cast(Tensor, peak)


def _attend_rows_reusing(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_attend_rows` in inference mode: the same products in three buffers for all heads, which
    took a CPU a quarter less time.
    """
    batch, heads, rows, _ = q.shape
    out = v.new_empty(batch, rows, heads, v.shape[3])
    logits, weights, peak = (q.new_empty(batch, rows, k.shape[2]) for _ in range(3))
    # with beta = 0 what is added is not even read
    added, beta = (logits, 0) if bias is None else (bias[:, 0].expand_as(logits), 1)
    for head in range(heads):
        keys = k[:, head].transpose(-2, -1)
        torch.baddbmm(added, q[:, head], keys, beta=beta, alpha=scale, out=logits)
        now = weights if head else peak
        torch.softmax(logits, dim=-1, out=now)
        torch.bmm(now, v[:, head], out=out[:, :, head])
        if head:
            torch.maximum(peak, now, out=peak)
    return out, peak


def _attend_images_reusing(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_attend_rows_reusing` with one image after another in the place of one head after another:
    an image's weights [H, n, N] stay in a core's cache until the maximum has read them.
    """
    batch, heads, rows, _ = q.shape
    out = v.new_empty(batch, heads, rows, v.shape[3])
    peak = q.new_empty(batch, rows, k.shape[2])
    logits, weights = (q.new_empty(heads, rows, k.shape[2]) for _ in range(2))
    beta = 0 if bias is None else 1  # with 0 what is added is not even read
    for image in range(batch):
        added = logits if bias is None else bias[image].expand_as(logits)
        keys = k[image].transpose(-2, -1)
        torch.baddbmm(added, q[image], keys, beta=beta, alpha=scale, out=logits)
        torch.softmax(logits, dim=-1, out=weights)
        torch.bmm(weights, v[image], out=out[image])
        torch.amax(weights, dim=0, out=peak[image])
    return out.transpose(1, 2), peak
