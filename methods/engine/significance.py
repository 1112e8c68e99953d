"""The significance score of ATS ("Token Scoring"), which PPT uses too."""

from __future__ import annotations

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.tokens import Tokens


def significance(tokens: Tokens, attended: Attended) -> Tensor:
    """`(sum_h a_j^h) |v_j|` of each patch j: class attention times the norm of its value.

    |v_j| is the norm over the channels of all heads. The scores are normalised over the patches of
    each image: [B, n] with sum 1, 0 for padding, in at least float32. The cost is that of the class
    row (`ModelShape.row_macs`).
    """
    exact = torch.promote_types(tokens.x.dtype, torch.float32)
    row = attended.class_row()[..., tokens.prefix :].to(exact).sum(dim=1)
    value = attended.v[:, :, tokens.prefix :]
    share = row * torch.linalg.vector_norm(value, dim=(1, 3), dtype=exact)
    if tokens.valid is not None:
        share = share.masked_fill(~tokens.valid, 0.0)
    total = share.sum(dim=1, keepdim=True)
    return share / total.clamp(min=torch.finfo(exact).tiny)
