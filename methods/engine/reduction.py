"""The interface of a token method inside the forward: `Reduction`, and the `Trace` of a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.tokens import Tokens


class Reduction(nn.Module):
    """A token step inside the forward; this base class leaves the model dense.

    Attributes:
        site: "mid-block" (after the attention residual, before the MLP) or "after-block" (after
            the MLP residual).
        proportional: attention adds the log of each token's size to its logits (ToMe, eq. 1).
    """

    site = "mid-block"
    proportional = False

    def begin(self, images: Tensor, tokens: Tokens) -> Tokens:
        """Called before block 0 to set up state. images: the normalised input [B, 3, H, W]."""
        return tokens

    def needs_peak(self, block: int) -> bool:
        """Whether `observe` reads `attended.peak` in this block. Attention then runs head by head
        instead of in the fused kernel, at about the same speed.
        """
        return False

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Any:
        """What `reduce` needs of the block's attention, for example scores; None for nothing.

        Called before the MLP at either site, so that q, k and v are not kept alive through it:
        return scores, not `attended` itself.
        """
        return None

    def reduce(self, block: int, tokens: Tokens, seen: Any) -> Tokens:
        """The tokens after the reduction, called at its site of `block`.

        seen: the value that `observe` returned in this block.
        """
        return tokens

    def penalty(self, tokens: Tokens) -> Tensor | None:
        """A scalar that training adds to the loss, or None. tokens: those after the last block."""
        return None


@dataclass(frozen=True)
class Trace:
    """What a forward did to the tokens, block by block.

    Attributes:
        tokens: tokens[b] [B] is the number of tokens of each image after block b, prefix included.
        group: group[b] [B, n0] is the index of the patch token that holds each original patch, -1
            once it is dropped.
        figures: figures[b] holds the method's own numbers by name, each [B].
    """

    tokens: list[Tensor]
    group: list[Tensor]
    figures: list[dict[str, Tensor]]
