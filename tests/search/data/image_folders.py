"""Small image folders for the tests of this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitpareto.search.data.datasets import Data
from vitpareto.search.data.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[3]
SMALL = Preprocess((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.9, "center")
EVALUATION = ("calibration", "search", "held-out")


def make_folder(root: Path, counts: dict[str, int], seed: int = 0, suffix: str = ".png") -> Path:
    """ROOT/CLASS/NNN.png: noise, no two images alike."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}{suffix}")
    return root


def members(data: Data, name: str) -> list[str]:
    return list(data._listed[name].paths)  # type: ignore[attr-defined]


def decoded_folders(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "decoded").iterdir() if p.is_dir())
