"""The one place that knows timm's VisionTransformer, Block and Attention: the reduced forward.

`reduced(model, reduction)` swaps the class of a copied timm model for one whose forward carries the
tokens' state explicitly through the blocks and lets a `Reduction` act mid-block or after a block.
Parameter names stay timm's; what a method adds sits under `reduction.`. Nothing is set on a module
during forward, so that a model exports, pickles and runs in several threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.head_maximum import attend_by_head
from vitpareto.methods.engine.sliced_block import SlicedAttention, SlicedBlock, fused_attention
from vitpareto.methods.engine.tokens import Tokens

POOLS = ("token", "avg", "map")
#: patch queries whose attention `Attended.patch_rows` holds at a time
ROWS = 64
#: what a block may be, each with the attention that it holds
_BLOCKS: dict[type, type] = {Block: Attention, SlicedBlock: SlicedAttention}


class UnsupportedModel(BadInput):
    """The model is not one whose tokens can be reduced correctly; the message says which part."""


@dataclass(frozen=True)
class Attended:
    """What a block's attention saw: q, k, v [B, H, N, D] after any q/k-norm, and the key bias. In a
    sliced block v has a width of its own.

    peak [B, N, N]: the attention's maximum over heads, without a gradient, query by key; None
    where the reduction did not ask for it (`Reduction.needs_peak`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    prefix: int
    class_token: bool
    valid: Tensor | None
    peak: Tensor | None = None

    def attention(self, first: int, last: int) -> Tensor:
        """Attention of the queries first..last-1 over all tokens: [B, H, last - first, N]."""
        logits = (self.q[:, :, first:last] * self.scale) @ self.k.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        return logits.softmax(dim=-1)

    def class_row(self) -> Tensor:
        """The class token's attention over all tokens, [B, H, N]; N * C multiply-accumulates.

        Without a class token: the mean over the patch queries (padding left out), n * N * C.
        """
        if self.class_token:
            return self.attention(0, 1)[:, :, 0]
        return self.patch_rows()[0]

    def patch_rows(self) -> tuple[Tensor, Tensor]:
        """The mean over the patch queries of their attention, padding left out, [B, H, N], and what
        each patch pays itself, [B, H, n].

        Some queries at a time: [B, H, n, N] is more memory than a dense model needs. Summed in at
        least float32: a half precision's sum of many small shares drifts.
        """
        total, dtype = self.q.shape[2], self.q.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sums, own = [], []
        for first in range(self.prefix, total, ROWS):
            last = min(first + ROWS, total)
            rows = self.attention(first, last)
            # a copy: a view would keep all of `rows` alive
            own.append(rows[..., first:last].diagonal(dim1=-2, dim2=-1).clone())
            if self.valid is not None:
                counted = self.valid[:, first - self.prefix : last - self.prefix]
                rows = rows.masked_fill(~counted[:, None, :, None], 0.0)
            sums.append(rows.sum(dim=2, dtype=wide))
        count: Tensor | int = total - self.prefix
        if self.valid is not None:
            count = self.valid.sum(dim=1)[:, None, None]
        return (torch.stack(sums).sum(dim=0) / count).to(dtype), torch.cat(own, dim=-1)


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


def attend(
    attn: Attention,
    x: Tensor,
    tokens: Tokens,
    class_token: bool,
    proportional: bool,
    needs_peak: bool = False,
) -> tuple[Tensor, Attended]:
    """Attention over x [B, N, C] with everything timm's has: q/k-norm, gate, scale norm, dropout.

    Returns (output [B, N, C], Attended). No mask is passed before the first merge or padding: a
    mask costs the flash kernel on CUDA.
    """
    batch, total, _ = x.shape
    if isinstance(attn, SlicedAttention):
        q, k, v = attn.split(attn.qkv(x))
    else:
        qkv = attn.qkv(x).view(batch, total, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = tokens.key_bias(proportional)
    dropout = attn.attn_drop.p if attn.training else 0.0
    peak = None
    if needs_peak:
        out, peak = attend_by_head(q, k, v, attn.scale, bias, dropout)
    elif attn.fused_attn:
        out = fused_attention(q, k, v, bias, dropout)
    else:
        weights = (q * attn.scale) @ k.transpose(-2, -1)
        if bias is not None:
            weights = weights + bias
        out = F.dropout(weights.softmax(dim=-1), dropout, attn.training) @ v
    out = attn.norm(out.transpose(1, 2).reshape(batch, total, attn.attn_dim))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    seen = Attended(q, k, v, attn.scale, bias, tokens.prefix, class_token, tokens.valid, peak)
    return out, seen


class _Reduced(VisionTransformer):
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
                f"the images give {tokens.patches} patches: this model is pruned for {rows} x "
                f"{columns}; call set_input_size before pruning"
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


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    """timm's VisionTransformer with a reduction."""


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    """DeiT's distilled VisionTransformer with a reduction."""


_REDUCED: dict[type, type] = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
    ReducedVisionTransformer: ReducedVisionTransformer,
    ReducedVisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


def check_supported(model: nn.Module) -> None:
    """UnsupportedModel, naming the part and the reason, unless the reduced forward is exact for it.

    Types are compared exactly: a subclass may compute anything, and would be silently wrong.
    """

    def refuse(part: str, module: object, accepted: str) -> UnsupportedModel:
        kind = type(module)
        return UnsupportedModel(
            f"{type(model).__name__} cannot be pruned: its {part} is "
            f"{kind.__module__}.{kind.__name__}, accepted is {accepted}"
        )

    if type(model) not in _REDUCED:
        accepted = "timm's VisionTransformer or VisionTransformerDistilled itself"
        raise refuse("class", model, accepted)
    vit = cast(VisionTransformer, model)
    for index, block in enumerate(vit.blocks):
        if type(block) not in _BLOCKS:
            accepted = "timm.models.vision_transformer.Block, or vitpareto's SlicedBlock"
            raise refuse(f"block {index}", block, accepted)
        attention = _BLOCKS[type(block)]
        if type(block.attn) is not attention:
            accepted = f"{attention.__module__}.{attention.__name__}"
            raise refuse(f"attention in block {index}", block.attn, accepted)
    if not isinstance(vit.patch_drop, nn.Identity):
        raise refuse("patch_drop", vit.patch_drop, "none (patch_drop_rate=0)")
    if vit.global_pool not in POOLS:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be pruned: its pooling is {vit.global_pool!r}, "
            f"accepted is one of {', '.join(repr(p) for p in POOLS)}"
        )
    if vit.attn_pool is not None:
        if type(vit.attn_pool) is not AttentionPoolLatent:
            raise refuse("pooling", vit.attn_pool, "AttentionPoolLatent")
        if vit.attn_pool.pos_embed is not None:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be pruned: its pooling adds a position to every "
                "token slot, which has no meaning once tokens are gone"
            )


def reduced(model: nn.Module, reduction: Reduction | None, recipe: Any = None) -> _Reduced:
    """A copy of `model` whose forward applies `reduction` (None: dense); `model` stays as is."""
    check_supported(model)
    out = copy.deepcopy(model)
    out.__class__ = _REDUCED[type(model)]
    made = cast(_Reduced, out)
    if not hasattr(made, "resize_to"):
        made.resize_to = None
    made.reduction = reduction if reduction is not None else Reduction()
    made.reduction.train(model.training)
    made.recipe = recipe
    return made
