"""What a pruned model does to single images: which patches are kept, merged or dropped in each
block. `dashboards.token_picture` draws it. Measures neither accuracy nor cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, Recipe, Trace
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.measure.accuracy import NonFiniteLogits

#: What a token that holds several patches is: their mean, a sum weighted by attention in which
#: dropped patches end, or a mixture of all patches that weighs these most.
MergeKind = Literal["merged", "fused", "mixed"]


@dataclass(frozen=True)
class Prediction:
    """A model's first choice: its class and the softmax's probability, 0 to 1."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class ImageTrace:
    """One image. pixels: uint8 [h, w, 3], what the model cuts into patches (after preprocessing
    and a `resize`). patches [depth]: left after each block. group [depth, n0]: `Trace.group`.
    figures: the method's own numbers after each block. truth: the class, where it is known.
    """

    name: str
    pixels: NDArray[np.uint8]
    patches: tuple[int, ...]
    group: NDArray[np.int64]
    figures: tuple[dict[str, float], ...]
    dense: Prediction
    pruned: Prediction
    truth: str | None = None

    def stages(self) -> list[int]:
        """The blocks after which something had become of a patch."""
        before = np.vstack([np.arange(self.group.shape[1]), self.group[:-1]])
        moved = (before != self.group).any(axis=1)
        # the last patch fused alone stays where it was, and is no longer what it was
        fuses = np.array([figures.get("fused", 0) > 0 for figures in self.figures])
        return np.flatnonzero(moved | fuses).tolist()

    def fused(self) -> NDArray[np.bool_]:
        """Which original patches are in a fused token after each block, [depth, n0]: from a block
        that says in its figures that it fused some into its last token, on.
        """
        out = np.zeros(self.group.shape, dtype=np.bool_)
        rows = zip(self.group, self.patches, self.figures, strict=True)
        for block, (group, left, figures) in enumerate(rows):
            if figures.get("fused", 0) > 0:
                out[block:] |= group == left - 1
        return out & (self.group >= 0)

    def joined(self, together: MergeKind) -> NDArray[np.bool_]:
        """Which original patches are no token of their own any more, and not dropped: [depth, n0].
        A patch that was fused alone is not its own either: it became its weighted self.
        """
        if together == "fused":
            return self.fused()
        if together == "mixed":  # once anything is mixed, everything is
            own = (self.group == np.arange(self.group.shape[1])).all(axis=1)
            return ~own[:, None] & (self.group >= 0)
        rows = []
        for group in self.group:
            members = np.bincount(group[group >= 0], minlength=1)
            rows.append((group >= 0) & (members[group.clip(min=0)] > 1))
        return np.array(rows)


@dataclass(frozen=True)
class TokenTrace:
    """A recipe's way with some images. grid: patches (rows, columns); patch: pixels (height,
    width); recipe: with what calibration found; notes: what a reader has to know besides.
    """

    model: str
    recipe: Recipe
    grid: tuple[int, int]
    patch: tuple[int, int]
    together: MergeKind
    images: tuple[ImageTrace, ...]
    notes: tuple[str, ...] = ()

    def stages(self) -> list[int]:
        """The blocks after which something had become of a patch of any image."""
        return sorted({block for image in self.images for block in image.stages()})


@torch.inference_mode()
def trace_tokens(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    *,
    model: str = "",
    names: Sequence[str] = (),
    truths: Sequence[str | None] = (),
    classes: Sequence[str] | None = None,
    head_indices: Sequence[int] | None = None,
    notes: Sequence[str] = (),
) -> TokenTrace:
    """Run both models over normalised images [B, 3, H, W] and keep what became of each patch.

    pruned: what `methods.prune` or `Recipe.build` made of `dense`. classes: the names of the
    logits, or of those at `head_indices`. Raises BadInput for a batch without images, and
    NonFiniteLogits, naming the image.
    """
    if not len(images):
        raise BadInput("there is no image to follow")
    recipe: Recipe = cast(Any, pruned).recipe
    shape = methods.model_shape(pruned)
    preprocess = Preprocess.of(dense)
    found = []
    for i, image in enumerate(images.split(1)):
        name = names[i] if i < len(names) else f"image {i}"
        cut: list[Tensor] = []
        # what is cut into patches, taken where that happens: a `resize` is inside the model
        hook = cast(nn.Module, pruned.patch_embed).register_forward_pre_hook(
            lambda _, inputs, cut=cut: cut.append(inputs[0])
        )
        try:
            logits, trace = pruned(image, trace=True)
        finally:
            hook.remove()
        guesses = [_guess(name, x, classes, head_indices) for x in (dense(image), logits)]
        found.append(
            ImageTrace(
                name,
                denormalised(cut[0][0], preprocess),
                tuple(int(t) - shape.prefix for t in trace.tokens),
                torch.cat(trace.group).cpu().numpy(),
                _figures(trace),
                guesses[0],
                guesses[1],
                truths[i] if i < len(truths) else None,
            )
        )
    return TokenTrace(
        model, recipe, shape.grid, shape.patch, merge_kind(recipe), tuple(found), tuple(notes)
    )


def merge_kind(recipe: Recipe) -> MergeKind:
    """What a token of this recipe is that holds several patches."""
    if recipe.tokens is None:
        return "merged"
    if recipe.tokens.declared.mixes:
        return "mixed"
    return "fused" if recipe.tokens.params.get("fuse") else "merged"


def denormalised(image: Tensor, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The model's input [3, H, W] as pixels again, uint8 [H, W, 3]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    scaled = image.detach().cpu().float() * std + mean
    return (255 * scaled.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _guess(
    name: str, logits: Tensor, classes: Sequence[str] | None, head: Sequence[int] | None
) -> Prediction:
    logits = logits[0].float()
    if head is not None:
        logits = logits[list(head)]
    if not bool(logits.isfinite().all()):
        raise NonFiniteLogits(f"non-finite logits for {name}")
    probability, label = (v.item() for v in logits.softmax(dim=0).max(dim=0))
    return Prediction(int(label), classes[int(label)] if classes else f"class {label}", probability)


def _figures(trace: Trace) -> tuple[dict[str, float], ...]:
    return tuple({k: float(v[0]) for k, v in block.items()} for block in trace.figures)
