"""Tiny ones of every kind of model `methods` accepts: real timm classes, random but peaked weights.

Peaked: attention that differs between patches, so that a wrong index or a missing rescale shows.
A new kind of model is one line in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from timm.layers import GroupNormAct, HybridEmbed, RmsNorm, StdConv2dSame, build_sincos2d_pos_embed
from timm.layers.attention import Attention
from timm.layers.mlp import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.slicing.sliced_model import BlockWidths, Widths, sliced_model


def vit(kind: type[VisionTransformer] = VisionTransformer, **settings: Any) -> VisionTransformer:
    """A tiny one with these settings of timm's."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return kind(**{**small, "num_classes": 7, **settings})


def _gated() -> VisionTransformer:
    model = vit()
    for block in model.blocks:
        block.attn = Attention(32, num_heads=2, qkv_bias=True, gated=True)
    return model


def _simple() -> VisionTransformer:
    """SimpleViT's form: fixed sin-cos positions, no class token, average pooling."""
    model = vit(class_token=False, global_pool="avg")
    fixed = build_sincos2d_pos_embed([4, 4], 32)[None]
    model.pos_embed = nn.Parameter(fixed, requires_grad=False)
    return model


def hybrid(**stem: Any) -> VisionTransformer:
    """timm's R+ViT: a convolutional stem with group norm and standardised weights (`stem`: others),
    to 8 x 8 cells, then patches of 2 x 2 cells.
    """
    small = {"layers": (1,), "channels": (16,), "stem_chs": 8, "stem_type": "same"}
    layers = {
        "norm_layer": partial(GroupNormAct, num_groups=4),
        "conv_layer": partial(StdConv2dSame, eps=1e-8),
    }
    settings = {**small, **layers, "preact": False, "num_classes": 0, "global_pool": "", **stem}
    embed = partial(HybridEmbed, backbone=ResNetV2(**settings))
    return vit(embed_layer=embed, patch_size=2, depth=3)


def sliced() -> VisionTransformer:
    """Every block of another size, none the size of timm's: q/k wider and narrower than v."""
    blocks = ((3, 8, 16, 48), (2, 16, 8, 80), (4, 8, 8, 64), (2, 8, 24, 40))
    widths = Widths(48, tuple(BlockWidths(*block) for block in blocks))
    return cast(VisionTransformer, sliced_model(vit(), widths))


MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "class": vit,
    "distilled": lambda: vit(VisionTransformerDistilled, num_heads=4),
    "registers": lambda: vit(reg_tokens=3, no_embed_class=True, init_values=0.5),
    "avg": lambda: vit(class_token=False, global_pool="avg", img_size=40),
    "map": lambda: vit(class_token=False, global_pool="map"),
    "class_avg": lambda: vit(global_pool="avg", fc_norm=True),
    "qk_norm": lambda: vit(qk_norm=True, qkv_bias=False),
    "pre_norm": lambda: vit(pre_norm=True, norm_layer=nn.LayerNorm),
    "layer_scale": lambda: vit(no_embed_class=True, init_values=0.5, depth=3, num_heads=4),
    "pool_prefix": lambda: vit(global_pool="avg", reg_tokens=2, pool_include_prefix=True),
    "scale_norm": lambda: vit(scale_attn_norm=True, scale_mlp_norm=True),
    "gated": _gated,
    "dynamic": lambda: vit(dynamic_img_size=True),
    "oblong": lambda: vit(img_size=(48, 24), embed_dim=48, num_heads=3),
    "swiglu": lambda: vit(mlp_layer=SwiGLU, act_layer=nn.SiLU, norm_layer=RmsNorm, mlp_ratio=3),
    "registers_avg": lambda: vit(class_token=False, reg_tokens=4, global_pool="avg"),
    "map_class": lambda: vit(global_pool="map", pool_include_prefix=True),
    "no_position": lambda: vit(pos_embed="none", class_token=False, global_pool="avg"),
    "simple": _simple,
    "hybrid": hybrid,
    "sliced": sliced,
}


def peak(model: nn.Module, seed: int) -> None:
    """Fill all weights that train at random, large enough that attention is far from uniform."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
            if p.dim() == 1:
                centre = 1.0 if name.endswith(("weight", "gamma")) else 0.0
                p.copy_(centre + 0.2 * noise)
            elif p.dim() == 2:
                # PatchMerger scales its queries' scores itself
                fan_in = 1 if name.endswith("queries") else p.shape[1]
                gain = 2.0 if "qkv" in name else 1.0
                p.copy_(gain * noise / fan_in**0.5)
            else:
                p.copy_(0.3 * noise)


def fresh(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A new model of that kind, in eval mode, equal to `dense(kind)`."""
    model = MODELS[kind]().eval()
    peak(model, seed=1 + list(MODELS).index(kind))
    return model.to(dtype)


_dense = cache(fresh)


def dense(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of that kind, in eval mode, weights drawn from a fixed seed. Shared: no changes."""
    return _dense(kind, dtype)


def images(model: nn.Module, count: int = 4, seed: int = 0) -> Tensor:
    """Random normalised images that fit the model, in its dtype."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 3, *model.patch_embed.img_size, generator=draw, dtype=torch.float64)
    return drawn.to(next(model.parameters()).dtype)
