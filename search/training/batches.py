"""Training batches of every epoch: order, augmentation and mixup.

They follow from (seed, epoch, image) alone, so that an interrupted training continues with the same
batches on any device. Images are decoded already, at the model's size (`search.data.decoding`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F

from vitpareto.methods import Code
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError

#: shift: by up to an eighth of the side, filled with black; crop: a part of the area, scaled to the
#: whole; flip: mirrored.
AUGMENTATIONS = ("none", "shift", "shift-flip", "crop", "crop-flip")
#: "auto" shifts images of up to this side in pixels, as for CIFAR, and crops larger ones, as for
#: ImageNet.
SMALL_SIDE = 96
#: Range of a crop's area and aspect ratio. timm's smallest area is 0.08 of the whole photograph;
#: here the border is cut off already, and the model has been trained before.
CROP_AREA, CROP_RATIO = (0.25, 1.0), (3 / 4, 4 / 3)
SHIFT = 1 / 8


def choose_augmentation(name: str, preprocess: Preprocess, data: str) -> str:
    """The augmentation for "auto": by the image's size, and none for the embedded digits.

    Any other name is returned. Raises UserError for an unknown one.
    """
    if name != "auto":
        if name not in AUGMENTATIONS:
            known = ("auto", *AUGMENTATIONS)
            raise UserError.unknown(
                f"unknown augmentation {name!r}",
                name,
                known,
                name="augment",
                got=name,
            )
        return name
    if data == "digits":
        return "none"
    return "shift-flip" if max(preprocess.input_size[1:]) <= SMALL_SIDE else "crop-flip"


@dataclass(frozen=True)
class AugmentedBatches:
    """The batches of every epoch, for `search.training.loop.fit`: call it with the epoch.

    The last batch of an epoch is left out if it is smaller than the others.

    Attributes:
        classes: number of the model's logits.
        mixup: timm's alpha. Labels are then soft [B, classes], smoothed by `smoothing`; with 0 they
            are [B].
        head_indices: the logits that the data's labels stand for, in order (None: the labels
            themselves).
    """

    split: Split
    preprocess: Preprocess
    classes: int
    batch: int
    seed: int = 0
    augmentation: str = "none"
    mixup: float = 0.0
    smoothing: float = 0.0
    head_indices: tuple[int, ...] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch < 1 or not len(self.split):
            raise UserError(
                f"training needs at least one image and a batch of at least 1 (got "
                f"{len(self.split)} images, batch {self.batch})",
                Code.OUT_OF_RANGE,
                images=len(self.split),
                batch=self.batch,
            )
        if self.mixup < 0:
            raise UserError(
                f"mixup must be 0 or above (got {self.mixup:g})",
                Code.OUT_OF_RANGE,
                name="mixup",
                got=self.mixup,
            )
        if self.mixup > 0 and self.size % 2:
            raise UserError(
                f"the batch must be even with mixup, which pairs its images (got {self.size})",
                Code.OUT_OF_RANGE,
                name="batch",
                got=self.size,
            )

    @property
    def size(self) -> int:
        """Images in a batch."""
        return min(self.batch, len(self.split))

    def __call__(self, epoch: int) -> EpochBatches:
        return EpochBatches(self, epoch)


@dataclass(frozen=True)
class EpochBatches:
    """One epoch of `AugmentedBatches`: normalised images [B, 3, H, W] and their targets."""

    of: AugmentedBatches
    epoch: int

    def __len__(self) -> int:
        return len(self.of.split) // self.of.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        of = self.of
        pixels, labels = of.split.images, of.split.labels
        draw = torch.Generator().manual_seed(_number(of.seed, self.epoch))
        order = torch.randperm(len(labels), generator=draw)
        # one row per image, wherever it stands in the epoch
        chance = torch.rand(len(labels), 5, generator=draw)
        head = None if of.head_indices is None else torch.tensor(of.head_indices)
        for step in range(len(self)):
            chosen = order[step * of.size : (step + 1) * of.size]
            raw = torch.from_numpy(np.ascontiguousarray(pixels[chosen.numpy()]))
            target = torch.from_numpy(np.ascontiguousarray(labels[chosen.numpy()]))
            if head is not None:
                target = head[target]
            images = augment(raw.to(of.device), chance[chosen], of.augmentation)
            images, target = of.preprocess.normalise(images), target.to(of.device)
            if of.mixup > 0:
                images, target = self._mixed(images, target, step)
            yield images, target

    def _mixed(self, images: Tensor, target: Tensor, step: int) -> tuple[Tensor, Tensor]:
        of = self.of
        mix = Mixup(mixup_alpha=of.mixup, label_smoothing=of.smoothing, num_classes=of.classes)
        # timm draws from numpy's global generator, which is restored
        before = np.random.get_state()
        np.random.seed(_number(of.seed, self.epoch, step) % 2**32)
        try:
            mixed, soft = mix(images, target)
        finally:
            np.random.set_state(before)
        return mixed, soft.to(images.dtype)


def _number(*parts: int) -> int:
    """A seed of 63 bits from several numbers, so that no two epochs share draws."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def augment(images: Tensor, chance: Tensor, how: str) -> Tensor:
    """Augment images uint8 [B, H, W, 3]. how: of AUGMENTATIONS. chance [B, 5], in [0, 1): two for
    the place, two for a crop's area and ratio, one for mirroring.
    """
    chance = chance.to(images.device)
    if how.startswith("shift"):
        images = shifted(images, chance[:, :2])
    elif how.startswith("crop"):
        images = cropped(images, chance[:, :4])
    if how.endswith("flip"):
        images = torch.where(chance[:, 4, None, None, None] < 0.5, images.flip(2), images)
    return images


def shifted(images: Tensor, chance: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of each side; chance [B, 2] in [0, 1)."""
    count, height, width, _ = images.shape
    most = torch.tensor([max(1, round(SHIFT * s)) for s in (height, width)], device=images.device)
    corner = (chance * (2 * most + 1)).long()
    down, right = (int(m) for m in most)
    padded = F.pad(images, (0, 0, right, right, down, down))
    rows = corner[:, :1] + torch.arange(height, device=images.device)
    columns = corner[:, 1:] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]


def cropped(images: Tensor, chance: Tensor) -> Tensor:
    """Crop a random part of each image and scale it to the whole (bilinear); chance [B, 4]."""
    low, high = CROP_AREA
    area = low + (high - low) * chance[:, 2]
    narrow, broad = (math.log(r) for r in CROP_RATIO)
    ratio = (narrow + (broad - narrow) * chance[:, 3]).exp()
    wide, tall = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    # grid_sample's coordinates: -1 to 1 over the image
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = wide, (2 * chance[:, 1] - 1) * (1 - wide)
    theta[:, 1, 1], theta[:, 1, 2] = tall, (2 * chance[:, 0] - 1) * (1 - tall)
    planes = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, list(planes.shape), align_corners=False)
    scaled = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
