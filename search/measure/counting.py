"""How published sources count a forward's arithmetic: each tool's convention, as a small function.

One model at one setting has as many "GFLOPs" as there are tools. A published figure is compared
with ours in the convention of its source, never with another's (`search.compare.published`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vitpareto.methods import BadInput, Recipe, model_shape
from vitpareto.methods.engine.errors import nearest


@dataclass(frozen=True)
class Work:
    """What one image's forward does, by kind.

    layers: multiply-accumulates of linear and convolutional layers, biases left out; products:
    those of the two products of attention, QK^T and AV; norms: elements that LayerNorms normalise;
    scores: elements of the attention maps, all heads and blocks; own: the method's own arithmetic
    (`Method.extra_macs`).
    """

    layers: int
    products: int
    norms: int
    scores: int
    own: int


def work(recipe: Recipe, model: nn.Module) -> Work:
    """The work of `recipe` on a dense `model`, which may be on the meta device; no image is run.

    Raises BadInput where images decide the schedule, or where a LayerNorm has no weights (its
    convention is nobody's published one).
    """
    shape, model = recipe.reshape(model_shape(model), model)
    bare = model_shape(_without_norms(model))
    counts, site, entering, own = shape.dense_counts(), "mid-block", shape.patches, 0
    if recipe.tokens is not None:
        declared = recipe.tokens.declared
        params = declared.check(recipe.tokens.params, shape)
        fixed = declared.counts(params, shape)
        if fixed is None:
            raise BadInput(f"the cost of {recipe} depends on images: no tool counts it without one")
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
        raise BadInput("the model has LayerNorms without weights: no source counts such a model")
    return Work(without_norms - products, products, norms, scores, own)


def _without_norms(model: nn.Module) -> nn.Module:
    """The same model with nothing in its LayerNorms' places."""
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    return bare


@dataclass(frozen=True)
class Counter:
    """A convention: `says` what counts, `count` a forward's work in it."""

    name: str
    says: str
    count: Callable[[Work], int]


#: What `counter` in published.json may be. Elementwise additions, GELU and gathers count nothing in
#: any of them.
COUNTERS: dict[str, Counter] = {
    c.name: c
    for c in (
        Counter(
            "fvcore",
            "layers, both products of attention, 5 a LayerNorm element, the method's own products",
            lambda w: w.layers + w.products + 5 * w.norms + w.own,
        ),
        Counter(
            "fvcore, backbone",
            "as fvcore, without the method's own arithmetic",
            lambda w: w.layers + w.products + 5 * w.norms,
        ),
        # thop counts modules, and what no module does is not seen: not the products of attention,
        # not a method's scores; a LayerNorm with weights is 4 an element, a softmax module 3
        Counter(
            "thop",
            "layers, 4 a LayerNorm element, 3 a softmax element; no product of attention",
            lambda w: w.layers + 4 * w.norms + 3 * w.scores,
        ),
        # every multiplication is one, also that of the scores by 1 / sqrt(D)
        Counter(
            "torchprofile",
            "layers, both products of attention and their scaling, 1 a LayerNorm element, the "
            "method's own products",
            lambda w: w.layers + w.products + w.scores + w.norms + w.own,
        ),
    )
}


def counter(name: str) -> Counter:
    """The convention of that name; BadInput with the nearest one."""
    if name not in COUNTERS:
        raise BadInput(f"unknown counter {name!r}{nearest(name, COUNTERS)}")
    return COUNTERS[name]
