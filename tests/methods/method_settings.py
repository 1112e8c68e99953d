"""The settings every registered method is tested at: one table. A method missing here breaks
collection, so that none goes untested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from tests.methods.tiny_models import MODELS, dense, images, peak
from vitpareto import methods
from vitpareto.methods import ModelShape


@dataclass(frozen=True)
class Case:
    """One setting, given the dense model's shape. per_image: each image decides its count."""

    method: str
    label: str
    params: Callable[[ModelShape], dict[str, Any]]
    per_image: bool = False

    def __str__(self) -> str:
        return f"{self.method}-{self.label}"

    def build(self, model: nn.Module) -> nn.Module:
        """The pruned model; calibrated on images that no test prunes, trained parts drawn."""
        declared = methods.get(self.method)
        params = self.params(methods.model_shape(model))
        needs = declared.needs_calibration(declared.check(params))
        calibration = images(model, 6, seed=99) if needs else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", methods.Untrained)
            built = methods.prune(model, self.method, calibration=calibration, **params)
        # what ReViT builds is fresh as a whole
        peak(built if self.method == "revit" else built.get_submodule("reduction"), seed=77)
        return built


def _fixed(**params: Any) -> Callable[[ModelShape], dict[str, Any]]:
    return lambda _: params


_STAGED = {
    "staged": _fixed(keep_rate=0.6, prune_layers=(0, 1)),
    "counts": lambda s: {"counts": [s.patches - 1 - b for b in range(s.depth)]},
}
_RAJNI = {"gamma": 1.0, "min_tokens": 2}

SETTINGS: dict[str, dict[str, Callable[[ModelShape], dict[str, Any]]]] = {
    "dense": {"": _fixed()},
    "resize": {"smaller": lambda s: {"size": (s.grid[0] - 1) * s.patch[0]}},
    "random": {"staged": _STAGED["staged"]},
    "centre": {"staged": _STAGED["staged"]},
    "topk": _STAGED,
    "tome": {
        "constant": _fixed(r=3),
        "decreasing": _fixed(r=2, inflection=-1.0, prop_attn=False),
        "list": lambda s: {"r": [0, 4] + [1] * (s.depth - 2)},
        "counts": lambda s: {"counts": [s.patches - 2 - b for b in range(s.depth)]},
    },
    "rajni": {
        "image": _fixed(**_RAJNI, budget="image"),
        "image-jacobian": _fixed(**_RAJNI, budget="image", score="jacobian"),
        "image-layers": _fixed(gamma=1.5, min_tokens=1, budget="image", prune_layers=(0, 1)),
        "calibrated": _fixed(**_RAJNI),
        "calibrated-jacobian": _fixed(**_RAJNI, score="jacobian"),
        "counts": lambda s: {"counts": [s.patches - 1 - b for b in range(s.depth)]},
    },
    "tram": {**_STAGED, "late": _fixed(keep_rate=0.5, prune_layers=(2,))},
    "evit": {
        "fuse": _STAGED["staged"],
        "drop": _fixed(keep_rate=0.6, prune_layers=(0, 1), fuse=False),
        "counts": _STAGED["counts"],
    },
    "ats": {
        "caps": _fixed(prune_layers=(0, 2), max_tokens=(7, 3)),
        "every block": _fixed(prune_layers=(0, 1, 2)),
        "cap": _fixed(prune_layers=(0, 1), max_tokens=5),
    },
    "ppt": {
        # near the middle of what these models have: some images merge, some drop
        "mixed": lambda s: {
            "r": 3,
            "prune_layers": (0, 1, 2),
            "threshold": (4.2 if s.class_token else 0.6) / s.patches**2,
        },
        "merges": _fixed(r=4, prune_layers=(0, 1), threshold=1e9),
        "drops": _fixed(r=4, prune_layers=(0, 1), threshold=0.0),
        "counts": lambda s: {"counts": [s.patches - 2 - b for b in range(s.depth)]},
    },
    "nvit": {"target": _fixed(target=0.6)},
    "revit": {"": _fixed(embedding=24)},
    "patchmerger": {
        "list": _fixed(prune_layers=(0, 1), num_tokens=(7, 3)),
        "number": _fixed(prune_layers=(1, 2), num_tokens=5),
        "as many": lambda s: {"prune_layers": (0, 2), "num_tokens": (s.patches, 4)},
    },
    "dynamicvit": {
        "staged": _fixed(prune_layers=(1, 2), keep_rates=(0.6, 0.3)),
        "stage that drops nothing": _fixed(prune_layers=(1, 2), keep_rates=(1.0, 0.5)),
    },
    "tnt": {
        "several-similar": _fixed(prune_layers=(0, 2), keep_rates=(0.7, 0.6), similarity_prune=5),
        "several": _fixed(prune_layers=(0, 1), keep_rates=(0.7, 0.7)),
        "single": _fixed(prune_layers=(1,), keep_rates=(0.6,)),
        "single-similar": _fixed(prune_layers=(1,), keep_rates=(0.5,), similarity_prune=3),
    },
}

_MISSING = set(methods.names()) - set(SETTINGS)
if _MISSING:
    raise LookupError(f"no settings to test {', '.join(sorted(_MISSING))}: add them to SETTINGS")

#: settings whose counts each image decides: the method, and what their labels start with
_PER_IMAGE = {"ats": "", "rajni": "image"}
CASES = [
    Case(name, label, params, name in _PER_IMAGE and label.startswith(_PER_IMAGE[name]))
    for name, settings in SETTINGS.items()
    for label, params in settings.items()
]

#: kinds of model that a method refuses, each with the part at fault
REFUSED: dict[str, dict[str, str]] = {
    "revit": {"map": "embedding", "map_class": "embedding", "simple": "embedding"},
}


def _pairs(kinds: Iterable[str], cases: list[Case]) -> list[tuple[str, Case]]:
    return [(k, c) for k in kinds for c in cases if k not in REFUSED.get(c.method, {})]


EVERY = _pairs(MODELS, CASES)
#: each method's first setting on every kind of model, every setting on two
FIRST = list({case.method: case for case in reversed(CASES)}.values())
PAIRS = _pairs(MODELS, FIRST)
PAIRS += _pairs(("class", "map"), [case for case in CASES if case not in FIRST])


def _covering() -> list[tuple[str, Case]]:
    kinds, pairs = list(MODELS), []
    for index, case in enumerate(CASES):
        turn = [kinds[(index + step) % len(kinds)] for step in range(len(kinds))]
        pairs.append(next((k, case) for k in turn if k not in REFUSED.get(case.method, {})))
    assert {kind for kind, _ in pairs} == set(kinds)
    return pairs


#: every setting once and every kind of model at least once: for what costs time
COVERING = _covering()


def pairs(every: list[tuple[str, Case]], fast: list[tuple[str, Case]]) -> pytest.MarkDecorator:
    """Parametrizes `kind, case` over `fast` and `every`; those not in `fast` are marked slow."""
    rest = [pair for pair in every if pair not in fast]
    return pytest.mark.parametrize(
        "kind, case",
        [pytest.param(kind, case, id=f"{kind}-{case}") for kind, case in fast]
        + [pytest.param(k, c, id=f"{k}-{c}", marks=pytest.mark.slow) for k, c in rest],
    )


#: where the identity depends on the model, so that it cannot be a constant of the class
IDENTITY: dict[str, Callable[[ModelShape], dict[str, Any]]] = {
    "resize": lambda s: {"size": s.image[0]},
}


def identity(method: str, shape: ModelShape) -> dict[str, Any] | None:
    """Parameters at which the method leaves the model dense; None where there are none."""
    if method in IDENTITY:
        return IDENTITY[method](shape)
    return methods.get(method).identity


@cache
def pruned(kind: str, case: Case) -> nn.Module:
    """The tiny model of that kind, float64, at that setting. Shared: no changes."""
    return case.build(dense(kind))


def logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(batch)


def recorded(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, methods.Trace]:
    """Logits and trace, without gradients."""
    with torch.no_grad():
        return model(batch, trace=True)
