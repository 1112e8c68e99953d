"""RAJNI's formulas (README and published code): sensitivity, mass, importance, keep ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.tokens import Tokens


@dataclass(frozen=True)
class Reading:
    """RAJNI's quantities in one block.

    Attributes:
        rho: sensitivity [B].
        eta: mass [B], the sum of the importance.
        importance: [B, n], 0 for padding.
    """

    rho: Tensor
    eta: Tensor
    importance: Tensor


def read(tokens: Tokens, attended: Attended, score: str) -> Reading:
    """Sensitivity, mass and importance from one block's attention and values.

    score: "standardized" or "jacobian". Without a class token, rho is 1 + the mean over the patch
    queries of self-attention times value norm.
    """
    prefix, valid = tokens.prefix, tokens.valid
    value = attended.v.mean(dim=1)
    norms = value.norm(dim=-1)
    if attended.class_token:
        heads = attended.class_row()
        row = heads.mean(dim=1)
        rho = 1 + row[:, 0] * norms[:, 0]
    else:
        heads, own = attended.patch_rows()
        row = heads.mean(dim=1)
        rho = 1 + masked_mean(own.mean(dim=1) * norms[:, prefix:], valid)
    if score == "jacobian":
        importance = (heads[..., prefix:] * attended.v[:, :, prefix:].norm(dim=-1)).sum(dim=1)
    else:
        patches = value[:, prefix:]
        weight = None if valid is None else valid.to(patches.dtype)[..., None]
        if weight is None:
            centre = patches.mean(dim=1, keepdim=True)
        else:
            centre = (patches * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        length = (patches - centre).norm(dim=-1)
        mean = masked_mean(length, valid)[:, None]
        z = (length - mean) / (masked_std(length, valid)[:, None] + 1e-6)
        importance = row[:, prefix:] * z.relu()
    if valid is not None:
        importance = importance.masked_fill(~valid, 0.0)
    return Reading(rho, importance.sum(dim=1), importance)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid entries of values [B, n]: [B]."""
    if valid is None:
        return values.mean(dim=1)
    return values.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1)


def masked_std(values: Tensor, valid: Tensor | None) -> Tensor:
    """Unbiased standard deviation over the valid entries of values [B, n]: [B]."""
    if valid is None:
        return values.std(dim=1)
    off = (values - masked_mean(values, valid)[:, None]).masked_fill(~valid, 0.0)
    return (off.square().sum(dim=1) / (valid.sum(dim=1) - 1)).sqrt()


def keep_ratio(rho: Tensor, eta: Tensor, before: Tensor, gamma: float) -> Tensor:
    """min(1, clamp(rho * eta / (eta_prev + 1e-6), 0.25, 4) ** -gamma), elementwise."""
    return (rho * eta / (before + 1e-6)).clamp(0.25, 4.0).pow(-gamma).clamp(max=1.0)


def ranking(importance: Tensor) -> Tensor:
    """Importance [B, n] with its zeros (about half, from the relu) replaced by distinct negative
    values in order of position.

    A top-k breaks ties arbitrarily; without ties every runtime picks the same patches.
    """
    # at least float32: bfloat16 does not hold every integer above 256
    importance = importance.to(torch.promote_types(importance.dtype, torch.float32))
    position = torch.arange(importance.shape[1], device=importance.device, dtype=importance.dtype)
    return torch.where(importance > 0, importance, -(position + 1))
