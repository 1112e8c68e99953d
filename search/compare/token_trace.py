"""Token traces: which patches of an image a pruned model keeps, merges or drops in each block.

`dashboards` draws them. Accuracy and cost are not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, Recipe, Trace, recipe_of
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.measure.accuracy import NonFiniteLogits

#: how a token holds several patches: as their mean, as a sum of dropped patches weighted by
#: attention, or as a mixture of all patches that gives these the largest weights
MergeKind = Literal["merged", "fused", "mixed"]


@dataclass(frozen=True)
class Prediction:
    """A model's top class and its softmax probability, 0 to 1."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class ImageTrace:
    """The trace of one image.

    Attributes:
        pixels: uint8 [h, w, 3], the patch embedding's input, after preprocessing and a `resize`.
        patches: [depth], patches left after each block.
        group: [depth, n0], as `Trace.group`.
        figures: the method's own numbers after each block.
        truth: the class of the image, if it is known.
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
        """Blocks that merged, fused or dropped a patch."""
        before = np.vstack([np.arange(self.group.shape[1]), self.group[:-1]])
        moved = (before != self.group).any(axis=1)
        # a patch that is fused alone keeps its group and changes its content
        fuses = np.array([figures.get("fused", 0) > 0 for figures in self.figures])
        return np.flatnonzero(moved | fuses).tolist()

    def fused(self) -> NDArray[np.bool_]:
        """Which original patches are in a fused token after each block, bool [depth, n0].

        A block reports in its figures that it fused patches into its last token.
        """
        out = np.zeros(self.group.shape, dtype=np.bool_)
        rows = zip(self.group, self.patches, self.figures, strict=True)
        for block, (group, left, figures) in enumerate(rows):
            if figures.get("fused", 0) > 0:
                out[block:] |= group == left - 1
        return out & (self.group >= 0)

    def joined(self, together: MergeKind) -> NDArray[np.bool_]:
        """Which original patches share a token with others and are not dropped, bool [depth, n0].

        A patch that was fused alone counts too, because fusing changes its content.
        """
        if together == "fused":
            return self.fused()
        if together == "mixed":  # every token of a mixing block holds all patches
            own = (self.group == np.arange(self.group.shape[1])).all(axis=1)
            return ~own[:, None] & (self.group >= 0)
        rows = []
        for group in self.group:
            members = np.bincount(group[group >= 0], minlength=1)
            rows.append((group >= 0) & (members[group.clip(min=0)] > 1))
        return np.array(rows)


@dataclass(frozen=True)
class TokenTrace:
    """The traces of several images under one recipe.

    Attributes:
        recipe: with calibrated parameters filled in.
        grid: patches (rows, columns).
        patch: size of a patch in pixels (height, width).
        notes: remarks for the reader, for example on calibration.
    """

    model: str
    recipe: Recipe
    grid: tuple[int, int]
    patch: tuple[int, int]
    together: MergeKind
    images: tuple[ImageTrace, ...]
    notes: tuple[str, ...] = ()

    def stages(self) -> list[int]:
        """Blocks that merged, fused or dropped a patch of any image."""
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
    """Run both models on normalised images [B, 3, H, W] and record the trace of each image.

    Args:
        pruned: what `methods.prune` or `Recipe.build` built from `dense`.
        classes: names of the logits, or of those at `head_indices`.

    Raises:
        BadInput: there are no images.
        NonFiniteLogits: the logits of an image are not finite.
    """
    if not len(images):
        raise BadInput("images must have at least one image (got none)", Code.EMPTY, name="images")
    recipe = recipe_of(pruned)
    shape = methods.model_shape(pruned)
    preprocess = Preprocess.of(dense)
    found = []
    for i, image in enumerate(images.split(1)):
        name = names[i] if i < len(names) else f"image {i}"
        logits, trace, embedded = _traced(pruned, image)
        guesses = [_guess(name, x, classes, head_indices) for x in (dense(image), logits)]
        found.append(
            ImageTrace(
                name,
                denormalised(embedded[0], preprocess),
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


def _traced(pruned: nn.Module, image: Tensor) -> tuple[Tensor, Trace, Tensor]:
    """Logits and trace of one image [1, 3, H, W], and the input of the patch embedding.

    A `resize` happens inside the model, so the pixels are taken at the patch embedding.
    """
    inputs: list[Tensor] = []
    hook = cast(nn.Module, pruned.patch_embed).register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0])
    )
    try:
        logits, trace = pruned(image, trace=True)
    finally:
        hook.remove()
    return logits, trace, inputs[0]


def merge_kind(recipe: Recipe) -> MergeKind:
    """How a token of this recipe holds several patches."""
    if recipe.tokens is None:
        return "merged"
    if recipe.tokens.declared.mixes:
        return "mixed"
    return "fused" if recipe.tokens.params.get("fuse") else "merged"


def denormalised(image: Tensor, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The model's input [3, H, W] as pixels, uint8 [H, W, 3]."""
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
        raise NonFiniteLogits(f"non-finite logits for image {name}", name)
    probability, label = (v.item() for v in logits.softmax(dim=0).max(dim=0))
    return Prediction(int(label), classes[int(label)] if classes else f"class {label}", probability)


def _figures(trace: Trace) -> tuple[dict[str, float], ...]:
    return tuple({k: float(v[0]) for k, v in block.items()} for block in trace.figures)
