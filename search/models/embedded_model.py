"""The embedded model: a small timm VisionTransformer and its shipped weights.

It classifies the embedded images (`search.data.embedded_images`). `search.training.embedded` trains
the shipped weights.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import safetensors.torch
from timm.models.vision_transformer import VisionTransformer

from vitpareto.search.data.embedded_images import CLASSES, MEAN, PATCH, SIZE, STD

#: the model's name, wherever a model is named
NAME = "digits"
#: channels of a token, and blocks
WIDTH, DEPTH = 64, 12

_HEADS, _MLP_RATIO = 4, 2.0


def build(pretrained: bool = True) -> VisionTransformer:
    """The embedded model in eval mode: 12 blocks, class token, 64 patches, 10 classes.

    Its `pretrained_cfg` gives `timm.data.resolve_model_data_config` its input size, mean and
    standard deviation. With `pretrained=False` its weights are fresh, from torch's global seed.
    """
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        num_classes=len(CLASSES),
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=_HEADS,
        mlp_ratio=_MLP_RATIO,
    )
    config: Any = {
        "architecture": NAME,
        "input_size": (3, SIZE, SIZE),
        "num_classes": len(CLASSES),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    model.pretrained_cfg = model.default_cfg = config
    if pretrained:
        folder = files("vitpareto.search.models").joinpath("weights")
        stored = folder.joinpath("digits_vit.safetensors").read_bytes()
        model.load_state_dict(safetensors.torch.load(stored))
    return model.eval()
