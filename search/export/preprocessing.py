"""`preprocess.json` of a bundle: the steps from an image file to the programs' input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpareto.search.data.preprocess import Preprocess

FILE = "preprocess.json"


def preprocess_json(preprocess: Preprocess) -> dict[str, Any]:
    """The content of `preprocess.json`; `scale_size` is the size before the crop, as timm's."""
    height, width = preprocess.input_size[1:]
    steps = {
        "size": [height, width],
        "scale_size": [math.floor(side / preprocess.crop_pct) for side in (height, width)],
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_pct,
        "crop_mode": preprocess.crop_mode,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "colour": "RGB",
        "layout": "NCHW",
        "scale": "(pixel / 255 - mean) / std",
    }
    return {**steps, "resize": resize_rule(steps)}


def resize_rule(steps: Mapping[str, Any]) -> str:
    """timm's evaluation resize for this crop mode and size: shorter, cover, fit or exact."""
    if steps["crop_mode"] in ("squash", "border"):
        return {"squash": "exact", "border": "fit"}[steps["crop_mode"]]
    height, width = steps["scale_size"]
    return "shorter" if height == width else "cover"


def normalised(images: NDArray[np.uint8], steps: Mapping[str, Any]) -> Tensor:
    """Decoded images uint8 [M, H, W, 3] as the programs' input, float32 [M, 3, H, W]."""
    mean, std = (np.array(steps[k], dtype=np.float32) for k in ("mean", "std"))
    scaled = (images.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
