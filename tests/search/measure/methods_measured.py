"""Small pruned models, one per training-free method, shared by the tests of this folder."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from tests.search.small import images, vit
from vitpareto import methods

#: a setting that reduces, for every method that needs no gradient training
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {"keep_rate": 0.7, "prune_layers": (2, 5)},
    "centre": {"keep_rate": 0.7, "prune_layers": (2, 5)},
    "resize": {"size": 40},
    "topk": {"keep_rate": 0.6, "prune_layers": (0, 3, 7)},
    "tram": {"keep_rate": 0.6, "prune_layers": (2, 5)},
    "evit": {"keep_rate": 0.6, "prune_layers": (2, 5)},
    "tome": {"r": 4},
    "rajni": {"gamma": 0.5, "min_tokens": 5},
    "ats": {"prune_layers": (2, 5), "max_tokens": (40, 20)},
    "ppt": {"r": 10, "prune_layers": (2, 5, 6)},
}
TRAINING_FREE = [n for n in methods.names() if methods.get(n).training != "required"]
#: a setting whose token counts depend on the image
ADAPTIVE: dict[str, Any] = {"gamma": 0.5, "min_tokens": 5, "budget": "image"}


@cache
def pruned(name: str) -> nn.Module:
    return methods.prune(vit(), name, calibration=images(4, seed=9), **SETTINGS[name])
