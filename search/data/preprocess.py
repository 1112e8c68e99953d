"""The input that a model expects: size, normalisation and timm's evaluation transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm.data
import torch
from PIL import Image

from vitpareto.search.errors import BadInput, Code, UserError


@dataclass(frozen=True)
class Preprocess:
    """How images are resized, cropped and normalised for a model.

    Attributes:
        input_size: (3, H, W) in pixels.
        mean: per channel, on the 0-1 scale.
        std: per channel, on the 0-1 scale.
        interpolation: of the resize, as timm names it.
        crop_pct: fraction of the resized image that the crop keeps.
        crop_mode: timm's center, squash or border.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, model: torch.nn.Module) -> Preprocess:
        """The model's data configuration, at the size that the model was built for.

        timm reads the size from the pretrained configuration, which `create_model(img_size=...)`
        does not change; `patch_embed.img_size` is what the forward pass checks.

        Raises UserError if the model does not take RGB images.
        """
        config = timm.data.resolve_model_data_config(model)
        patch_embed = getattr(model, "patch_embed", None)
        # the first convolution takes the images; a hybrid's `proj` takes its stem's features
        parts = () if patch_embed is None else patch_embed.modules()
        convolutions = (part for part in parts if isinstance(part, torch.nn.Conv2d))
        first = next(convolutions, None)
        channels = config["input_size"][0] if first is None else first.in_channels
        if channels != 3:
            raise UserError(
                f"the model's input must have 3 channels (got {channels}): only RGB models are "
                "supported",
                Code.UNSUPPORTED,
                got=channels,
            )
        height, width = getattr(patch_embed, "img_size", None) or config["input_size"][1:]
        return cls(
            input_size=(3, int(height), int(width)),
            mean=tuple(float(v) for v in config["mean"]),
            std=tuple(float(v) for v in config["std"]),
            interpolation=str(config["interpolation"]),
            crop_pct=float(config["crop_pct"]),
            crop_mode=str(config["crop_mode"]),
        )

    def describe(self) -> dict[str, Any]:
        """All fields, in JSON's types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def pixels(self) -> dict[str, Any]:
        """The fields that decide the decoded pixels: the mean only where it fills a border."""
        fields = self.describe()
        del fields["std"]
        if self.crop_mode != "border":
            del fields["mean"]
        return fields

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """timm's evaluation transform without its normalisation: RGB image -> uint8 [3, H, W]."""
        return timm.data.create_transform(
            input_size=self.input_size,
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )

    def normalise(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(images / 255 - mean) / std: uint8 [B, H, W, 3] -> `dtype` [B, 3, H, W], same device.

        Computed in float32 in timm's order of operations, then cast to `dtype`. Raises BadInput for
        images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise BadInput(
                f"images must be uint8 [B, H, W, 3] (got {images.dtype} {list(images.shape)})",
                Code.WRONG_TYPE,
                name="images",
                dtype=str(images.dtype),
                shape=tuple(images.shape),
            )
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        scaled = images.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
        return scaled.sub_(mean).div_(std).to(dtype)
