"""The reduced forward of timm's VisionTransformer.

It carries the tokens' state explicitly through the blocks and lets a `Reduction` act mid-block or
after a block. Nothing is set on a module during forward, so a model exports, pickles and runs in
several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitpareto.methods.engine.attention import Attended, attend
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.reduction import Reduction, Trace
from vitpareto.methods.engine.timm_embedding import embed_images
from vitpareto.methods.engine.tokens import Tokens


class ReducedForward(VisionTransformer):
    """The forward of every reduced model. It has no constructor: `reduced` sets a copy's class.

    Attributes:
        reduction: the token step; a plain `Reduction` leaves the model dense.
        resize_to: (height, width) in pixels that images are resized to; None: not resized.
        recipe: the `Recipe` that the model was built from, or None.
    """

    reduction: Reduction
    resize_to: tuple[int, int] | None
    recipe: Any

    def embed(self, images: Tensor, trace: bool = False) -> Tokens:
        """The tokens before block 0 of normalised images [B, 3, H, W]."""
        inputs = images
        if self.resize_to is not None:
            # at least float32: CPUs have no bicubic resize in half precision
            wide = images.to(torch.promote_types(images.dtype, torch.float32))
            inputs = F.interpolate(
                wide, size=self.resize_to, mode="bicubic", antialias=True, align_corners=False
            ).to(images.dtype)
        tokens = Tokens(embed_images(self, inputs), self.num_prefix_tokens)
        rows, columns = cast("tuple[int, int]", tuple(self.patch_embed.grid_size))
        if tokens.patches != rows * columns and type(self.reduction) is not Reduction:
            # timm's dynamic_img_size accepts other sizes, a schedule is for one number of patches
            raise BadInput(
                f"images must have {rows} x {columns} patches, the size that the model is pruned "
                f"for (got {tokens.patches} patches); call set_input_size before pruning",
                Code.MISMATCH,
                name="images",
                got=tokens.patches,
                expected=rows * columns,
            )
        if trace:
            index = torch.arange(tokens.patches, device=images.device)
            tokens = replace(tokens, group=index.repeat(images.shape[0], 1))
        return self.reduction.begin(images, tokens)

    def run_block(
        self,
        index: int,
        tokens: Tokens,
        observe: Callable[[int, Tokens, Attended], Any] | None = None,
    ) -> Tokens:
        """Block `index`, with the reduction at its site.

        observe: replaces the reduction's own `observe`; calibration reads the attention with it.
        """
        block = cast(Block, self.blocks[index])
        y, attended = attend(
            cast(Attention, block.attn),
            block.norm1(tokens.x),
            tokens,
            self.cls_token is not None,
            self.reduction.proportional,
            self.reduction.needs_peak(index),
        )
        tokens = replace(tokens, x=tokens.x + block.drop_path1(block.ls1(y)))
        del y
        seen = (observe or self.reduction.observe)(index, tokens, attended)
        del attended
        if self.reduction.site == "mid-block":
            tokens = self.reduction.reduce(index, tokens, seen)
        y = block.mlp(block.norm2(tokens.x))
        tokens = replace(tokens, x=tokens.x + block.drop_path2(block.ls2(y)))
        if self.reduction.site == "after-block":
            tokens = self.reduction.reduce(index, tokens, seen)
        return tokens

    def _run_checkpointed(self, index: int, tokens: Tokens) -> Tokens:
        """`run_block` with gradient checkpointing: the backward pass recomputes its activations."""

        def block(x: Tensor) -> Tokens:
            return self.run_block(index, replace(tokens, x=x))

        # checkpoint restores the random state of the devices of its tensor arguments
        return cast(Tokens, checkpoint(block, tokens.x, use_reentrant=False))

    def run(self, images: Tensor, trace: bool = False) -> tuple[Tokens, Trace]:
        """The tokens after the last block, before the final norm, and the trace (empty lists unless
        `trace`).
        """
        tokens = self.embed(images, trace)
        record = Trace([], [], [])
        step: Callable[[int, Tokens], Tokens] = self.run_block
        if self.grad_checkpointing and torch.is_grad_enabled():
            step = self._run_checkpointed
        for index in range(len(self.blocks)):
            tokens = step(index, tokens)
            if trace:
                record.tokens.append(tokens.counts())
                record.group.append(cast(Tensor, tokens.group))
                record.figures.append(tokens.figures)
                tokens = replace(tokens, figures={})
        return tokens, record

    def classify(self, tokens: Tokens) -> Tensor:
        """Logits [B, classes]: final norm, pooling (weighted by size, without padding) and head."""
        x = self.norm(tokens.x)
        weight = tokens.pool_weight()
        if weight is None or self.global_pool == "token":
            return super().forward_head(x)
        if self.pool_include_prefix:
            weight = torch.cat([weight.new_ones(x.shape[0], tokens.prefix), weight], dim=1)
        else:
            x = x[:, tokens.prefix :]
        if self.global_pool == "map":
            bias = weight.log().to(x.dtype)[:, None, None, :]
            pooled = cast(AttentionPoolLatent, self.attn_pool)(x, attn_mask=bias)
        else:
            # normalised first: a sum over all patches could overflow in half precision
            share = (weight / weight.sum(dim=1, keepdim=True)).to(x.dtype)[..., None]
            # where() besides the product: padding may hold inf, and 0 * inf is not 0
            pooled = torch.where(share > 0, x * share, x.new_zeros(())).sum(dim=1)
        return self.head(self.head_drop(self.fc_norm(pooled)))

    def forward_features(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Normalised tokens after the last block [B, N, C], padding included."""
        return self.norm(self.run(images)[0].x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's if it reads only the class token. Raises NotImplementedError if it pools the
        patches of a reduced model, because `forward_features` returns neither sizes nor padding.
        """
        if self.global_pool != "token" and type(self.reduction) is not Reduction:
            raise NotImplementedError(
                f"forward_head is not available for a reduced model with {self.global_pool!r} "
                "pooling, which weights patches by their sizes; call the model itself"
            )
        return super().forward_head(x, pre_logits)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's on a dense model. Raises BadInput on a pruned one, whose schedule is fixed."""
        if type(self.reduction) is not Reduction or self.resize_to is not None:
            raise BadInput(
                f"set_input_size must be called on a dense model (got a model reduced by "
                f"{self.recipe}); call it before pruning",
                Code.CONFLICT,
                name="model",
                got=str(self.recipe),
            )
        super().set_input_size(*args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: timm's own would run the blocks without the reduction."""
        raise NotImplementedError(
            "forward_intermediates is not available for a reduced model, whose tokens are not a "
            "grid; use trace=True or the dense model"
        )

    def forward(self, images: Tensor, trace: bool = False) -> Any:  # type: ignore[override]
        """Logits [B, classes] of images [B, 3, H, W]; with trace=True (logits, Trace)."""
        tokens, record = self.run(images, trace)
        logits = self.classify(tokens)
        return (logits, record) if trace else logits


class ReducedVisionTransformer(ReducedForward, VisionTransformer):
    """timm's VisionTransformer with a reduction."""


class ReducedVisionTransformerDistilled(ReducedForward, VisionTransformerDistilled):
    """DeiT's distilled VisionTransformer with a reduction."""
