"""MACs of a dense or pruned model in closed form, from its shapes and token counts.

MACs are multiply-accumulates per image (1 multiply-add = 1) in fvcore's convention with attention
counted: fvcore itself counts nothing for scaled_dot_product_attention, so that DeiT-S would be
4.251 G instead of 4.608 G. Nothing here runs a model, except `macs` where images decide the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, ModelShape, Recipe, recipe_of


def schedule_macs(recipe: Recipe, shape: ModelShape, counts: Sequence[int]) -> int:
    """MACs of one image: the dense parts of the forward plus the method's own arithmetic.

    Args:
        shape: the model's shape after the structural step.
        counts: patches left after each block.
    """
    counts = tuple(counts)
    if recipe.tokens is None:
        return shape.macs(shape.dense_counts(), "mid-block")
    declared = recipe.tokens.declared
    params = declared.check(recipe.tokens.params, shape)
    dense_parts = shape.macs(counts, declared.site, declared.entering(params, shape))
    return dense_parts + declared.extra_macs(params, shape, counts)


def recipe_macs(recipe: Recipe, shape: ModelShape) -> tuple[int, int]:
    """The fewest and the most MACs of one image; equal unless images decide the token counts."""
    if recipe.tokens is None:
        dense = schedule_macs(recipe, shape, shape.dense_counts())
        return dense, dense
    declared = recipe.tokens.declared
    low, high = declared.bounds(declared.check(recipe.tokens.params, shape), shape)
    return schedule_macs(recipe, shape, low), schedule_macs(recipe, shape, high)


def macs(model: nn.Module, images: Tensor | None = None) -> float:
    """Multiply-accumulates per image of a dense or pruned model.

    Args:
        model: a timm Vision Transformer, or what `vitpareto.prune` returned.
        images: normalised images [B, 3, H, W]. Required where images decide the token counts; the
            result then is the cost as run on this batch, padding included.

    Raises:
        BadInput: `images` are required and missing.
    """
    recipe, shape = recipe_of(model), methods.model_shape(model)
    low, high = recipe_macs(recipe, shape)
    counts = None
    if recipe.tokens is not None:
        counts = recipe.tokens.declared.counts(recipe.tokens.params, shape)
    if counts is not None or low == high:
        return float(high if counts is None else schedule_macs(recipe, shape, counts))
    if images is None:
        raise BadInput(
            f"images are required because the cost of {recipe} depends on them: "
            "call macs(model, images=batch)",
            Code.MISSING,
            name="images",
            recipe=str(recipe),
        )
    with torch.inference_mode():
        _, trace = model(images, trace=True)
    return float(schedule_macs(recipe, shape, padded_counts(trace.tokens, shape.prefix)))


def padded_counts(tokens: Sequence[Tensor], prefix: int) -> tuple[int, ...]:
    """Patches per block that a batch computes: the maximum over its images.

    Args:
        tokens: tokens of each image after each block, [depth] tensors of [B], prefix included.
        prefix: number of prefix tokens, which are not patches.
    """
    return tuple(int(t.max()) - prefix for t in tokens)
