"""The dimensions of a ViT, and its multiply-accumulates (MACs) in closed form.

`ModelShape` holds what a method needs to know of a model, and the cost of the dense parts of the
reduced forward for given token counts. The convention is fvcore's: a multiply-add counts 1,
LayerNorm and group norm 5 per element (4 without weights), batch norm 2 (1), and softmax, GELU, RMS
norm, additions, gathers and scatters 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitpareto.methods.engine.reduced_model import check_supported
from vitpareto.methods.engine.sliced_block import SlicedAttention


def norm_cost(module: nn.Module) -> int:
    """MACs per normalised element, as fvcore counts them."""
    if isinstance(module, nn.LayerNorm):
        return 5 if module.weight is not None else 4
    return 0


def _linear_cost(module: nn.Module) -> int:
    """MACs per token of all Linear layers in `module`."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _inner_norms(module: nn.Module) -> int:
    """MACs per token of all LayerNorms in `module`."""
    return sum(
        norm_cost(m) * m.normalized_shape[-1]
        for m in module.modules()
        if isinstance(m, nn.LayerNorm)
    )


@dataclass(frozen=True)
class BlockShape:
    """The dimensions and costs of one block.

    Attributes:
        heads: number of heads.
        qk, v: width of q and k, and of v, per head.
        attn, mlp: MACs per token of linear layers and norms before and after the mid-block site,
            without the N² terms of attention itself.
    """

    heads: int
    qk: int
    v: int
    attn: int
    mlp: int

    def macs(self, before: int, after: int) -> int:
        """MACs with `before` tokens in attention and `after` tokens in the MLP, prefix included."""
        pairs = before * before * self.heads * (self.qk + self.v)
        return before * self.attn + pairs + after * self.mlp


@dataclass(frozen=True)
class ModelShape:
    """A model's dimensions and costs.

    `search.models.loading.fingerprint` hashes the repr, so the names of the fields and their order
    are part of what studies store.

    Attributes:
        depth: number of blocks.
        grid: patches (rows, columns).
        image: input (height, width) in pixels.
        patch: patch (height, width) in pixels.
        prefix: number of prefix tokens.
        class_token: whether token 0 is a class token.
        dim: width of the embedding.
        blocks: one entry per block.
        stem, tail: MACs per image before and after the blocks.
        final: MACs per token of the final norm.
        pooled: MACs per token of MAP pooling.
        pooled_prefix: number of prefix tokens that are pooled.
    """

    depth: int
    grid: tuple[int, int]
    image: tuple[int, int]
    patch: tuple[int, int]
    prefix: int
    class_token: bool
    dim: int
    blocks: tuple[BlockShape, ...]
    stem: int
    tail: int
    final: int
    pooled: int
    pooled_prefix: int

    @property
    def patches(self) -> int:
        """The number of patch tokens of the dense model."""
        return self.grid[0] * self.grid[1]

    def dense_counts(self) -> tuple[int, ...]:
        """Patches left after each block of the dense model."""
        return (self.patches,) * self.depth

    def macs(self, counts: Sequence[int], site: str, entering: int | None = None) -> int:
        """MACs per image, without the method's own arithmetic (`Method.extra_macs`).

        Args:
            counts: patches left after each block.
            site: where the method reduces.
            entering: patches that enter block 0 (default: all).
        """
        total, n = self.stem, self.patches if entering is None else entering
        for block, after in zip(self.blocks, counts, strict=True):
            in_mlp = after if site == "mid-block" else n
            total += block.macs(n + self.prefix, in_mlp + self.prefix)
            n = after
        total += (n + self.prefix) * self.final + (n + self.pooled_prefix) * self.pooled
        return total + self.tail

    def row_macs(self, block: int, patches: int) -> int:
        """MACs of `Attended.class_row` in `block` with `patches` patches."""
        b = self.blocks[block]
        queries = 1 if self.class_token else patches
        return queries * (patches + self.prefix) * b.heads * b.qk


def block_shape(block: Block) -> BlockShape:
    """The dimensions and costs of timm's block, or of a sliced one."""
    attn = cast(Attention, block.attn)
    heads, qk = attn.num_heads, attn.head_dim
    v = attn.v_dim if isinstance(attn, SlicedAttention) else qk
    dim = attn.qkv.in_features
    before = norm_cost(block.norm1) * dim + _linear_cost(attn)
    before += norm_cost(attn.norm) * attn.attn_dim
    before += (norm_cost(attn.q_norm) + norm_cost(attn.k_norm)) * heads * qk
    after = norm_cost(block.norm2) * dim + _linear_cost(block.mlp) + _inner_norms(block.mlp)
    return BlockShape(heads, qk, v, before, after)


def model_shape(model: nn.Module) -> ModelShape:
    """The dimensions of a dense or reduced model. Raises UnsupportedModel."""
    check_supported(model)
    vit = cast(VisionTransformer, model)
    embed = vit.patch_embed
    grid = cast("tuple[int, int]", tuple(embed.grid_size))
    patches = grid[0] * grid[1]
    # a resized model takes images of any size and resizes them itself; resizing is not counted
    image = cast("tuple[int, int]", tuple(embed.img_size))
    # in pixels; the patch_size of a hybrid stem is in cells of its feature map
    patch = cast("tuple[int, int]", tuple(embed.feat_ratio(as_scalar=False)))
    stem = _stem_macs(embed, image, patches)
    stem += norm_cost(vit.norm_pre) * (patches + vit.num_prefix_tokens) * vit.embed_dim
    pooled = 0
    tail = norm_cost(vit.fc_norm) * vit.embed_dim + _linear_cost(vit.head)
    if hasattr(vit, "head_dist"):
        tail += _linear_cost(cast(nn.Module, vit.head_dist))
    if vit.attn_pool is not None:
        pool = cast(AttentionPoolLatent, vit.attn_pool)
        width = pool.num_heads * pool.head_dim
        pooled += _linear_cost(pool.kv) + 2 * pool.latent_len * width
        pooled += norm_cost(pool.k_norm) * width
        rest = _linear_cost(pool.q) + _linear_cost(pool.proj) + norm_cost(pool.norm) * width
        rest += norm_cost(pool.q_norm) * width
        tail += pool.latent_len * (rest + (_linear_cost(pool.mlp) if pool.mlp is not None else 0))
    return ModelShape(
        depth=len(vit.blocks),
        grid=grid,
        image=image,
        patch=patch,
        prefix=vit.num_prefix_tokens,
        class_token=vit.cls_token is not None,
        dim=vit.embed_dim,
        blocks=tuple(block_shape(cast(Block, b)) for b in vit.blocks),
        stem=stem,
        tail=tail,
        final=norm_cost(vit.norm) * vit.embed_dim,
        pooled=pooled,
        pooled_prefix=vit.num_prefix_tokens if vit.pool_include_prefix else 0,
    )


def _stem_macs(embed: nn.Module, image: tuple[int, int], patches: int) -> int:
    """MACs per image of the patch embedding: one convolution, or a hybrid stem.

    A hybrid stem runs on the meta device and its operations are counted. Weight standardisation
    runs once per forward and is counted as for a batch of one.
    """
    if type(embed) is PatchEmbed:
        conv = cast(nn.Conv2d, embed.proj)
        area = conv.kernel_size[0] * conv.kernel_size[1]
        macs = patches * conv.out_channels * conv.in_channels // conv.groups * area
        return macs + norm_cost(cast(nn.Module, embed.norm)) * patches * conv.out_channels
    meta = copy.deepcopy(embed).to("meta").eval()
    reference = next(meta.parameters())
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NORMS) as counter:
        meta(reference.new_empty(1, 3, *image))
    return int(counter.get_total_flops()) // 2


def _norm_flops(x: torch.Size, *args: Any, **_: Any) -> int:
    """Flops of layer norm, group norm or batch norm by batch statistics, with input shape x."""
    affine = any(isinstance(a, torch.Size) for a in args)
    return 2 * math.prod(x) * (5 if affine else 4)


def _batch_norm_flops(
    x: torch.Size, weight: Any, bias: Any, mean: Any, var: Any, own: bool, *_: Any, **__: Any
) -> int:
    """Flops of batch norm: by batch statistics if `own`, as in weight standardisation, otherwise a
    scale and a shift by running statistics.
    """
    if own:
        return _norm_flops(x, weight)
    return 2 * math.prod(x) * (2 if weight is not None else 1)


#: what fvcore counts and torch's FlopCounterMode does not, in flops (two per multiply-add)
_NORMS = {
    torch.ops.aten.native_batch_norm: _batch_norm_flops,
    torch.ops.aten.native_group_norm: _norm_flops,
    torch.ops.aten.native_layer_norm: _norm_flops,
}
