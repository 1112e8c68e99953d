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
from vitpareto.methods.engine.errors import BadInput, Code
from vitpareto.methods.engine.reduction import Reduction, Trace
from vitpareto.methods.engine.tokens import Tokens


class ReducedForward(VisionTransformer):
    """The forward shared by every reduced model. Never constructed: a copied model becomes one."""

    reduction: Reduction
    resize_to: tuple[int, int] | None
    recipe: Any

    def embed(self, images: Tensor, trace: bool = False) -> Tokens:
        """Images [B, 3, H, W] -> tokens before block 0."""
        seen = images
        if self.resize_to is not None:
            # at least float32: CPUs have no bicubic resize in half precision
            wide = images.to(torch.promote_types(images.dtype, torch.float32))
            seen = F.interpolate(
                wide, size=self.resize_to, mode="bicubic", antialias=True, align_corners=False
            ).to(images.dtype)
        x = self.norm_pre(self._pos_embed(self.patch_embed(seen)))
        tokens = Tokens(x, self.num_prefix_tokens)
        rows, columns = cast("tuple[int, int]", tuple(self.patch_embed.grid_size))
        if tokens.patches != rows * columns and type(self.reduction) is not Reduction:
            # dynamic_img_size: the schedule's counts would be those of another image
            raise BadInput(
                f"images must have {rows} x {columns} patches, the size that the model is pruned "
                f"for (got {tokens.patches} patches); call set_input_size before pruning",
                Code.MISMATCH,
                name="images",
                got=tokens.patches,
                expected=rows * columns,
            )
        if trace:
            place = torch.arange(tokens.patches, device=x.device)
            tokens = replace(tokens, group=place.repeat(x.shape[0], 1))
        return self.reduction.begin(images, tokens)

    def run_block(
        self,
        index: int,
        tokens: Tokens,
        observe: Callable[[int, Tokens, Attended], Any] | None = None,
    ) -> Tokens:
        """Block `index` with the reduction at its site. `observe`: instead of the reduction's own
        (calibration listens in with it).
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

    def _again(self, index: int, tokens: Tokens) -> Tokens:
        """`run_block`, whose activations the backward pass computes a second time."""

        def block(x: Tensor) -> Tokens:
            return self.run_block(index, replace(tokens, x=x))

        # a tensor as argument tells checkpoint whose device's random state it has to restore
        return cast(Tokens, checkpoint(block, tokens.x, use_reentrant=False))

    def run(self, images: Tensor, trace: bool = False) -> tuple[Tokens, Trace]:
        """All blocks, the final norm not applied."""
        tokens = self.embed(images, trace)
        record = Trace([], [], [])
        step: Callable[[int, Tokens], Tokens] = self.run_block
        if self.grad_checkpointing and torch.is_grad_enabled():
            step = self._again
        for index in range(len(self.blocks)):
            tokens = step(index, tokens)
            if trace:
                record.tokens.append(tokens.counts())
                record.group.append(cast(Tensor, tokens.group))
                record.figures.append(tokens.figures)
                tokens = replace(tokens, figures={})
        return tokens, record

    def classify(self, tokens: Tokens) -> Tensor:
        """Final norm, pooling (by size after a merge, padding left out) and head."""
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
            # shares, not sizes: a sum over all patches could leave a half precision's range
            share = (weight / weight.sum(dim=1, keepdim=True)).to(x.dtype)[..., None]
            # where, not only a product: padding may hold anything, and 0 * inf is not 0
            pooled = torch.where(share > 0, x * share, x.new_zeros(())).sum(dim=1)
        return self.head(self.head_drop(self.fc_norm(pooled)))

    def forward_features(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Normalised tokens after the last block, [B, N', C] (padding included)."""
        return self.norm(self.run(images)[0].x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's where the class token is all that it reads; refused where it pools a reduced
        model's patches: what `forward_features` gives says neither sizes nor padding.
        """
        if self.global_pool != "token" and type(self.reduction) is not Reduction:
            raise NotImplementedError(
                f"a reduced model with {self.global_pool!r} pooling has no forward_head: its "
                "patches count by their sizes; call the model itself"
            )
        return super().forward_head(x, pre_logits)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's on a dense model; BadInput on a pruned one: its schedule is for its patches."""
        if type(self.reduction) is not Reduction or self.resize_to is not None:
            raise BadInput(
                f"the model is already reduced ({self.recipe}) for its number of patches: call "
                "set_input_size on the dense model, then prune"
            )
        super().set_input_size(*args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: timm's own would run the blocks without the reduction."""
        raise NotImplementedError(
            "a reduced model has no forward_intermediates: its tokens are not a grid; "
            "use trace=True, or the dense model"
        )

    def forward(self, images: Tensor, trace: bool = False) -> Any:  # type: ignore[override]
        """images [B, 3, H, W] -> logits [B, classes]; with trace=True (logits, Trace)."""
        tokens, record = self.run(images, trace)
        logits = self.classify(tokens)
        return (logits, record) if trace else logits


class ReducedVisionTransformer(ReducedForward, VisionTransformer):
    """timm's VisionTransformer with a reduction."""


class ReducedVisionTransformerDistilled(ReducedForward, VisionTransformerDistilled):
    """DeiT's distilled VisionTransformer with a reduction."""
