"""The dense model at a smaller input resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float, Int
from vitpareto.methods.engine.reduced_model import reduced
from vitpareto.methods.engine.shape import ModelShape, model_shape


@register
class Resize(Method):
    """The dense model at a smaller input: the model resizes its images (bicubic, antialiased) and
    timm interpolates the position embeddings. The identity is the model's own height, so it is
    not a constant of the class.
    """

    name = "resize"
    summary = "the dense model at a smaller input resolution"
    kind = "structure"
    site = "before the model"
    control = True
    resizes_input = True
    parameters = (
        Int("size", "input height in pixels, a multiple of the patch's", low=1, high=4096),
    )
    space = (Float("scale", "input side, as a fraction of the model's own", low=0.4, high=0.95),)
    presets = tuple(
        Preset(f"{round(100 * s)}% side", {"scale": s}) for s in (0.857, 0.714)
    )  # 192 and 160 of 224

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        # on a coarse grid a scale near 1 would round to the dense model
        rows = min(round(choices["scale"] * shape.grid[0]), shape.grid[0] - 1)
        rows = max(1, rows)
        return {"size": rows * shape.patch[0]}

    def target(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, int]:
        """(height, width) in pixels; the width keeps the aspect ratio, in whole patches."""
        rows = params["size"] // shape.patch[0]
        columns = max(1, round(rows * shape.grid[1] / shape.grid[0]))
        return params["size"], columns * shape.patch[1]

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        if params["size"] % shape.patch[0] or params["size"] > shape.image[0]:
            raise BadInput(
                f"resize.size must be a multiple of the patch height {shape.patch[0]}, at most the "
                f"model's {shape.image[0]} (got {params['size']})",
                Code.OUT_OF_RANGE,
                name="size",
                where="resize",
                got=params["size"],
                accepted=shape.image[0],
            )

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        small, shape = reduced(model, None), model_shape(model)
        if params["size"] == shape.image[0]:
            return small
        size = self.target(params, shape)
        small.set_input_size(img_size=size)
        small.resize_to = size
        return small
