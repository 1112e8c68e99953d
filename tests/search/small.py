"""What the search tests share: a small ViT of the embedded model's size, and images for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitpareto.search.data.datasets import Data, open_data
from vitpareto.search.data.preprocess import Preprocess

PREPROCESS = Preprocess((3, 64, 64), (0.2, 0.2, 0.2), (0.25, 0.25, 0.25), "bicubic", 1.0, "center")


@cache
def vit(classes: int = 10) -> VisionTransformer:
    """12 blocks, 64 patches; weights from a fixed seed, large enough that attention differs from
    patch to patch. Shared: no changes.
    """
    draw = torch.Generator().manual_seed(classes)
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=4, mlp_ratio=2,
        num_classes=classes,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if p.dim() == 1:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                p.copy_(noise * (2.0 if "qkv" in name else 1.0) / p[0].numel() ** 0.5)
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Normalised images [count, 3, 64, 64]."""
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def image_folder(root: Path, classes: tuple[str, ...], each: int) -> Path:
    """ROOT/CLASS/NNN.png: coloured noise, no two images alike."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 200, (64, 64, 3)) + np.array([label, 2 * label, i]) % 56
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


def opened(folder: Path, cache: Path) -> Data:
    """The folder as a study would open it, for `vit`."""
    return open_data(str(folder), PREPROCESS, cache=cache)
