"""The significance of a patch: what ATS samples by and PPT prunes by (ATS, "Token Scoring")."""

from __future__ import annotations

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.tokens import Tokens


def significance(tokens: Tokens, attended: Attended) -> Tensor:
    """What the class token attends to, weighed by how much there is to see: `(sum_h a_j^h) |v_j|`.

    |v_j|: the norm over all heads' channels. Normalised over the patches of each image: [B, n] of
    sum 1, 0 for padding, in at least float32, since small shares decide and are summed up.
    Costs what the class row costs (`ModelShape.row_macs`).
    """
    exact = torch.promote_types(tokens.x.dtype, torch.float32)
    row = attended.class_row()[..., tokens.prefix :].to(exact).sum(dim=1)
    value = attended.v[:, :, tokens.prefix :]
    share = row * torch.linalg.vector_norm(value, dim=(1, 3), dtype=exact)
    if tokens.valid is not None:
        share = share.masked_fill(~tokens.valid, 0.0)
    total = share.sum(dim=1, keepdim=True)
    return share / total.clamp(min=torch.finfo(exact).tiny)
