"""What a token method is inside the forward: `Reduction`, and the `Trace` of what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.tokens import Tokens


class Reduction(nn.Module):
    """A token step inside the forward. `site`: "mid-block" (after the attention residual, before
    the MLP) or "after-block" (after the MLP residual). `proportional`: attention adds log size.
    """

    site = "mid-block"
    proportional = False

    def begin(self, images: Tensor, tokens: Tokens) -> Tokens:
        """Before block 0: set up per-image state. images: the normalised input [B, 3, H, W]."""
        return tokens

    def needs_peak(self, block: int) -> bool:
        """Whether `observe` reads `attended.peak` in this block: attention then runs head by head
        instead of in the fused kernel, for about the same time.
        """
        return False

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Any:
        """What this reduction reads off the block's attention, after its residual; None: nothing.

        Called before the MLP whatever the site, so that q, k and v (three times the tokens) are
        not kept alive through it: return scores, not `attended` itself.
        """
        return None

    def reduce(self, block: int, tokens: Tokens, seen: Any) -> Tokens:
        """At this reduction's site of `block`, with what `observe` returned there; returning
        `tokens` unchanged is the identity.
        """
        return tokens

    def penalty(self, tokens: Tokens) -> Tensor | None:
        """What training adds to the loss, weighted, given the tokens after the last block: a
        scalar; None: nothing.
        """
        return None


@dataclass(frozen=True)
class Trace:
    """What became of the tokens. tokens[b] [B]: tokens of each image after block b, prefix
    included; group[b] [B, n0]: the patch token that holds each original patch, -1 once dropped;
    figures[b]: the method's own numbers, each [B].
    """

    tokens: list[Tensor]
    group: list[Tensor]
    figures: list[dict[str, Tensor]]
