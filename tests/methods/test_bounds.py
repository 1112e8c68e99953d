"""Values outside the bounds of parameters are refused; no schedule drops all patches."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.method_settings import REFUSED, SETTINGS, Case, recorded
from tests.methods.tiny_models import dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import BadInput, Code
from vitpareto.methods.engine.parameters import Choice, Counts, Float, Int, IntOrList, Layers, Rates
from vitpareto.methods.structure.nvit import WidthsParameter


def outside(parameter, shape):
    """Values that this parameter refuses, by its type and bounds."""
    match parameter:
        case Int() | Float():
            step = 1 if isinstance(parameter, Int) else 1e-9
            yield from (float("nan"), float("inf"), "many", None, True, [1])
            if isinstance(parameter, Int):
                yield parameter.low + 0.5
            yield parameter.low - step
            if isinstance(parameter, Float) and parameter.open_low:
                yield parameter.low
            if parameter.high < math.inf:
                yield parameter.high + step
        case Choice():
            yield from (None, "none such", 2)
        case Layers():
            last = shape.depth - 1
            yield from ([last, last + 1], [-1], [1, 1], [1, 0], [0.5], 1, "1", [None])
        case Counts():
            n = shape.patches
            yield from ([n] * (shape.depth - 1), [n + 1] * shape.depth, [0] * shape.depth)
            yield from ([n - 1] * (shape.depth - 1) + [n], [n - 0.5] * shape.depth, n, [], "9999")
        case Rates():
            yield from ([0.0, 0.0], [1.1, 0.5], [0.5, -0.5], [float("nan"), 0.5], ["1", "1"], 0.5)
        case IntOrList():
            low = parameter.low - 1
            yield from (low, [low] * 4, 1.5, [1.5] * 4, "2", [], [2] * 9, float("inf"), True)
        case WidthsParameter():
            own = {"embedding": 16, "blocks": [[2, 8, 8, 16]] * shape.depth}
            yield from ([], {}, 16, "16", {"embedding": 16}, {**own, "head": 1})
            yield from ({**own, "embedding": e} for e in (0, -16, 16.0, True, "16", shape.dim + 1))
            yield from ({**own, "blocks": b} for b in ([], 2, "2222", own["blocks"][1:], [[2, 8]]))
            for wrong in (0, 8.5, "8", 4096):
                yield from (
                    {**own, "blocks": [*own["blocks"][1:], [*[8] * part, wrong, *[8] * (3 - part)]]}
                    for part in range(4)
                )
        case _:
            raise LookupError(f"add values that {type(parameter).__name__} refuses here")


def valid_except(name, parameter, shape):
    """A valid setting without this parameter."""
    if isinstance(parameter, (Counts, WidthsParameter)):
        return {}
    given = next(params(shape) for label, params in SETTINGS[name].items() if label != "counts")
    return {k: v for k, v in given.items() if k != parameter.name}


OUTSIDE = [
    (name, parameter.name, value)
    for name in methods.names()
    for parameter in methods.get(name).parameters
    for value in outside(parameter, methods.model_shape(dense("class")))
    # None may mean the default
    if value is not None or parameter.default is not None
]


@pytest.mark.parametrize("name, which, value", OUTSIDE, ids=[f"{n}-{p}-{v}" for n, p, v in OUTSIDE])
def test_values_outside_the_bounds_are_refused(name, which, value):
    """Every parameter of every method is checked before a calibration image is read."""

    def images_read():
        raise AssertionError("an image was read")
        yield

    model = dense("class")
    declared, shape = methods.get(name), methods.model_shape(model)
    (parameter,) = (p for p in declared.parameters if p.name == which)
    params = {**valid_except(name, parameter, shape), which: value}
    with pytest.raises(BadInput) as caught:
        methods.prune(model, name, calibration=images_read(), **params)
    assert caught.value.details["name"] == which
    assert caught.value.details["where"] == name
    codes = (Code.WRONG_TYPE, Code.OUT_OF_RANGE, Code.MISMATCH, Code.MISSING)
    assert caught.value.code in codes


ALL = [0, 1, 2, 3]
EMPTY = {
    **dict.fromkeys(("topk", "tram", "random", "centre"), {"keep_rate": 0.3, "prune_layers": ALL}),
    "dynamicvit": {"prune_layers": [1, 2], "keep_rates": [0.5, 0.06]},
    "tnt": {"prune_layers": ALL, "keep_rates": [0.3] * 4},
}
#: methods whose schedules stop by themselves, at their strongest setting on 16 patches
FLOORED = {
    "dense": {},
    "resize": {"size": 8},
    "tome": {"r": 99},
    "evit": {"keep_rate": 1e-9, "prune_layers": ALL},
    "ats": {"max_tokens": 1, "prune_layers": ALL},
    "ppt": {"r": 99, "prune_layers": ALL, "threshold": 0},
    "rajni": {"gamma": 10, "min_tokens": 1, "budget": "image"},
    "patchmerger": {"prune_layers": ALL, "num_tokens": 1},
    # no tokens are dropped
    "nvit": {"target": 0.4},
    "revit": {"embedding": 1},
}


@pytest.mark.parametrize("name", methods.names())
def test_no_schedule_leaves_an_image_without_patches(name):
    """Such schedules are refused with the block at fault, or cannot be expressed."""
    model = dense("class")
    if name in EMPTY:
        with refused(Code.EMPTY, where=name) as caught:
            methods.prune(model, name, **EMPTY[name])
        assert caught.value.details["block"] in (2, 3)
        return
    case = Case(name, "floored", lambda _: FLOORED[name])
    for kind in {"class", "map"} - set(REFUSED.get(name, {})):
        logits, trace = recorded(case.build(dense(kind)), images(dense(kind)))
        assert logits.isfinite().all()
        assert (torch.stack(trace.tokens) >= dense(kind).num_prefix_tokens + 1).all()
