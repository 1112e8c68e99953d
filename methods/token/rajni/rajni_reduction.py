"""RAJNI inside the forward: with counts frozen by calibration, or with counts per image."""

from __future__ import annotations

from dataclasses import replace

import torch

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.tokens import Tokens, keep, keep_padded, top_k
from vitpareto.methods.token.rajni.scores import Reading, keep_ratio, ranking, read


class RajniReduction(Reduction):
    """Keeps the most important patches after the blocks that reduce.

    Figures of a trace are rho, eta and keep_ratio [B], independent of the batch. With frozen counts
    they exist at the blocks that drop, and keep_ratio is that of the counts. Otherwise they exist
    at every prune layer, keep_ratio is the image's before `min_tokens` and rounding, and all are
    NaN once the image has at most `min_tokens` patches.

    Args:
        score: "standardized" or "jacobian".
        counts: patches left after each block, frozen by calibration; None: each image decides.
        gamma, min_tokens, layers: strength, smallest number of patches and prune layers, if each
            image decides.
    """

    site = "after-block"

    def __init__(
        self,
        score: str,
        counts: tuple[int, ...] | None,
        gamma: float,
        min_tokens: int,
        layers: tuple[int, ...],
    ):
        super().__init__()
        self.score, self.counts = score, counts
        self.gamma, self.min_tokens, self.layers = gamma, min_tokens, layers

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Reading | None:
        if self.counts is not None:
            reads = self.counts[block] < tokens.patches
        else:
            reads = block in self.layers and int(tokens.counts().max()) > (
                self.min_tokens + tokens.prefix
            )
        return read(tokens, attended, self.score) if reads else None

    def reduce(self, block: int, tokens: Tokens, seen: Reading | None) -> Tokens:
        if seen is None:
            if self.counts is not None or block not in self.layers:
                return tokens
            unread = tokens.x.new_full((tokens.x.shape[0],), float("nan"))
            return replace(tokens, figures={"rho": unread, "eta": unread, "keep_ratio": unread})
        if self.counts is not None:
            count = self.counts[block]
            ratio = torch.full_like(seen.eta, count / tokens.patches)
            figures = {"rho": seen.rho, "eta": seen.eta, "keep_ratio": ratio}
            tokens = replace(tokens, figures=figures)
            return keep(tokens, top_k(ranking(seen.importance), count))
        return self._reduce_by_image(tokens, seen)

    def _reduce_by_image(self, tokens: Tokens, found: Reading) -> Tokens:
        n = tokens.counts() - tokens.prefix
        active = n > self.min_tokens
        before = tokens.per_image.get("eta")
        ratio = torch.ones_like(found.eta)
        if before is not None:
            ratio = keep_ratio(found.rho, found.eta, before, self.gamma)
        eta = found.eta if before is None else torch.where(active, found.eta, before)
        figures = {"rho": found.rho, "eta": found.eta, "keep_ratio": ratio}
        tokens = replace(
            tokens,
            per_image={**tokens.per_image, "eta": eta},
            # alone, an image that takes no part any more would have no figures
            figures={k: v.masked_fill(~active, float("nan")) for k, v in figures.items()},
        )
        # at least float32, so that n times 1 is n for every dtype of the model
        exact = torch.promote_types(ratio.dtype, torch.float32)
        wanted = (n.to(exact) * ratio.to(exact)).to(torch.int64).clamp(min=self.min_tokens)
        wanted = torch.where(active, torch.minimum(wanted, n), n)
        if bool((wanted == n).all()):
            return tokens
        return keep_padded(tokens, ranking(found.importance), wanted)
