"""Counting conventions of published sources, one small function per tool.

The "GFLOPs" of a model depend on the tool that counts them. A published figure is compared with
ours in the convention of its source only (`search.compare.published`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vitpareto.methods import BadInput, Code, Recipe, model_shape


@dataclass(frozen=True)
class Work:
    """Arithmetic of the forward of one image, by kind.

    Attributes:
        layers: multiply-accumulates of linear and convolutional layers, without biases.
        products: multiply-accumulates of the two products of attention, QK^T and AV.
        norms: elements that LayerNorms normalise.
        scores: elements of the attention maps, over all heads and blocks.
        own: arithmetic of the method itself (`Method.extra_macs`).
    """

    layers: int
    products: int
    norms: int
    scores: int
    own: int


def work(recipe: Recipe, model: nn.Module) -> Work:
    """The work of `recipe` on a dense `model`, which may be on the meta device. Runs no image.

    Raises BadInput if images decide the token counts, or if a LayerNorm has no weights, for which
    no source has a convention.
    """
    shape, model = recipe.reshape(model_shape(model), model)
    bare = model_shape(_without_norms(model))
    counts, site, entering, own = shape.dense_counts(), "mid-block", shape.patches, 0
    if recipe.tokens is not None:
        declared = recipe.tokens.declared
        params = declared.check(recipe.tokens.params, shape)
        fixed = declared.counts(params, shape)
        if fixed is None:
            raise BadInput(
                f"the cost of {recipe} depends on images, so it has no published convention",
                Code.UNSUPPORTED,
                recipe=str(recipe),
            )
        counts = fixed
        site, entering = declared.site, declared.entering(params, shape)
        own = declared.extra_macs(params, shape, counts)
    products = scores = 0
    for block, patches in zip(shape.blocks, (entering, *counts[:-1]), strict=True):
        pairs = (patches + shape.prefix) ** 2 * block.heads
        scores += pairs
        products += pairs * (block.qk + block.v)
    without_norms = bare.macs(counts, site, entering)
    # fvcore's 5 an element is what `ModelShape` counts
    norms, rest = divmod(shape.macs(counts, site, entering) - without_norms, 5)
    if rest:
        raise BadInput(
            "the LayerNorms of the model must have weights; no counting convention covers others",
            Code.UNSUPPORTED,
            name="norms",
            model=type(model).__name__,
        )
    return Work(without_norms - products, products, norms, scores, own)


def _without_norms(model: nn.Module) -> nn.Module:
    """A copy of the model in which every LayerNorm is the identity."""
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    return bare


@dataclass(frozen=True)
class Counter:
    """A convention: `description` says what counts, `count` applies it to a forward's work."""

    name: str
    description: str
    count: Callable[[Work], int]


#: the accepted values of `counter` in published.json. None of them counts elementwise additions,
#: GELU or gathers
COUNTERS: dict[str, Counter] = {
    c.name: c
    for c in (
        Counter(
            "fvcore",
            "layers, both products of attention, 5 per LayerNorm element, the method's own "
            "products",
            lambda w: w.layers + w.products + 5 * w.norms + w.own,
        ),
        Counter(
            "fvcore, backbone",
            "as fvcore, without the method's own arithmetic",
            lambda w: w.layers + w.products + 5 * w.norms,
        ),
        # thop counts modules, so the products of attention and a method's scores are missed; a
        # LayerNorm with weights is 4 per element, a softmax module 3
        Counter(
            "thop",
            "layers, 4 per LayerNorm element, 3 per softmax element; not the products of attention",
            lambda w: w.layers + 4 * w.norms + 3 * w.scores,
        ),
        # each multiplication counts, including that of the scores by 1 / sqrt(D)
        Counter(
            "torchprofile",
            "layers, both products of attention and their scaling, 1 per LayerNorm element, the "
            "method's own products",
            lambda w: w.layers + w.products + w.scores + w.norms + w.own,
        ),
    )
}


def counter(name: str) -> Counter:
    """The convention of this name. Raises BadInput for an unknown one."""
    if name not in COUNTERS:
        raise BadInput.unknown(
            f"counter {name!r} does not exist",
            name,
            COUNTERS,
            name=name,
            accepted=tuple(COUNTERS),
        )
    return COUNTERS[name]
