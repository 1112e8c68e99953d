"""ImageNet-1k's class names: which logits of an ImageNet-1k head stand for a dataset's classes."""

from __future__ import annotations

import re
from functools import lru_cache

from timm.data import ImageNetInfo

#: classes of an ImageNet-1k head
IMAGENET_CLASSES = 1000


@lru_cache(maxsize=1)
def _positions() -> dict[str, int]:
    return {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def imagenet_indices(classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The positions of WordNet classes (n01440764, …) in an ImageNet-1k head; None unless all of
    them are ImageNet-1k's.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return None
    positions = _positions()
    if not all(name in positions for name in classes):
        return None
    return tuple(positions[name] for name in classes)
