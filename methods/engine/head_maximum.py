"""Attention and the maximum of its weights over heads, computed together.

The fused kernel returns no weights, and all of them, [B, H, N, N], take more memory than a dense
model. Computing both head by head (or image by image) costs little more than the fused kernel, and
less than computing the weights a second time.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

#: how many queries are computed at a time; up to twice as many go in one step
ROWS = 128


def attend_with_head_maximum(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """(output [B, H, N, D], maximum over heads [B, N, N]) of attention of q, k, v [B, H, N, D].

    Computed for one head and some queries at a time, so that [B, H, N, N] is never stored and the
    weights are in the cache when the maximum reads them. The maximum is taken before dropout and
    has no gradient. bias [B, 1, 1, N] is added to the logits.
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
            # filled in place: concatenating would hold [B, N, N] twice
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
    """(output [B, n, H, D], maximum [B, n, N]) for the queries q [B, H, n, D].

    In this layout of the output the heads are joined without a copy.
    """
    # in inference mode buffers can be reused: nothing is differentiated, traced or exported
    plain = not torch.compiler.is_compiling() and q.is_inference()
    if plain and not dropout and not torch.is_autocast_enabled(q.device.type):
        # by image if that stores no more weights at a time; GPUs prefer few large products
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
            # the maximum is updated in place, and the backward pass reads the weights
            peak = weights.detach().clone() if weights.requires_grad else weights
        else:
            torch.maximum(peak, weights.detach(), out=peak)
    return torch.stack(out, dim=2), cast(Tensor, peak)


def _attend_rows_reusing(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_attend_rows` in inference mode, with three buffers reused for all heads: a quarter less
    time on a CPU.
    """
    batch, heads, rows, _ = q.shape
    out = v.new_empty(batch, rows, heads, v.shape[3])
    logits, weights, peak = (q.new_empty(batch, rows, k.shape[2]) for _ in range(3))
    # with beta = 0 `added` is not read
    added, beta = (logits, 0) if bias is None else (bias[:, 0].expand_as(logits), 1)
    for head in range(heads):
        keys = k[:, head].transpose(-2, -1)
        torch.baddbmm(added, q[:, head], keys, beta=beta, alpha=scale, out=logits)
        current = weights if head else peak
        torch.softmax(logits, dim=-1, out=current)
        torch.bmm(current, v[:, head], out=out[:, :, head])
        if head:
            torch.maximum(peak, current, out=peak)
    return out, peak


def _attend_images_reusing(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_attend_rows_reusing` image by image instead of head by head: an image's weights [H, n, N]
    stay in a core's cache until the maximum has read them.
    """
    batch, heads, rows, _ = q.shape
    out = v.new_empty(batch, heads, rows, v.shape[3])
    peak = q.new_empty(batch, rows, k.shape[2])
    logits, weights = (q.new_empty(heads, rows, k.shape[2]) for _ in range(2))
    beta = 0 if bias is None else 1  # with 0 `added` is not read
    for image in range(batch):
        added = logits if bias is None else bias[image].expand_as(logits)
        keys = k[image].transpose(-2, -1)
        torch.baddbmm(added, q[image], keys, beta=beta, alpha=scale, out=logits)
        torch.softmax(logits, dim=-1, out=weights)
        torch.bmm(weights, v[image], out=out[image])
        torch.amax(weights, dim=0, out=peak[image])
    return out.transpose(1, 2), peak
