"""What a recipe does to the patches of images, as records for JSON. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpareto.methods import Recipe
from vitpareto.search.compare.token_trace import ImageTrace, Prediction, TokenTrace


@dataclass(frozen=True)
class BlockRow:
    """What one block did to the patches of one image.

    `patches` is how many tokens of patches are left, `dropped` how many of the original patches are
    in none of them, `joined` how many are in a token with others. `figures` are the method's own
    numbers of the block, None if not finite.
    """

    block: int
    patches: int
    dropped: int
    joined: int
    figures: Mapping[str, float | None]


@dataclass(frozen=True)
class PatchRow:
    """One image: both predictions, and every block, also those between the drawn columns.

    `together` is how the method joins patches ("merged", "fused" or "mixed").
    """

    image: str
    truth: str | None
    dense: Prediction
    pruned: Prediction
    model: str
    recipe: Recipe
    notes: tuple[str, ...]
    together: str
    blocks: tuple[BlockRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The row as plain values. The count of joined patches has the key `together` names."""
        return {
            "image": self.image,
            "truth": self.truth,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "model": self.model,
            "recipe": self.recipe.to_dict(),
            "notes": list(self.notes),
            "blocks": [
                {
                    "block": b.block,
                    "patches": b.patches,
                    "dropped": b.dropped,
                    self.together: b.joined,
                    "figures": dict(b.figures),
                }
                for b in self.blocks
            ],
        }


def patch_rows(trace: TokenTrace) -> list[PatchRow]:
    """One row per image, for JSON."""
    return [
        PatchRow(
            image=image.name,
            truth=image.truth,
            dense=image.dense,
            pruned=image.pruned,
            model=trace.model,
            recipe=trace.recipe,
            notes=trace.notes,
            together=trace.together,
            blocks=_block_rows(image, image.joined(trace.together).sum(axis=1)),
        )
        for image in trace.images
    ]


def _block_rows(image: ImageTrace, joined: NDArray[np.int64]) -> tuple[BlockRow, ...]:
    return tuple(
        BlockRow(
            block=block,
            patches=patches,
            dropped=int((image.group[block] < 0).sum()),
            joined=int(joined[block]),
            figures={k: v if math.isfinite(v) else None for k, v in figures.items()},
        )
        for block, (patches, figures) in enumerate(zip(image.patches, image.figures, strict=True))
    )


def summary(image: ImageTrace) -> str:
    """The predictions of both models on one line."""

    def text(prediction: Prediction) -> str:
        return f"{prediction.name} ({100 * prediction.probability:.0f} %)"

    truth = "" if image.truth is None else f" (truth: {image.truth})"
    return f"{image.name}{truth}   dense: {text(image.dense)} → pruned: {text(image.pruned)}"
