"""Pretrained weights from a file, converted to this project's names, and loading them in a model.

Which names a published layout uses is in `search.models.checkpoint_layouts`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vitpareto.methods import Recipe, Untrained
from vitpareto.methods.engine.weights import load_strictly
from vitpareto.methods.slicing.sliced_model import Widths, sliced_model, widths_of
from vitpareto.search.errors import BadInput, UserError
from vitpareto.search.models.checkpoint_layouts import convert
from vitpareto.search.models.weight_files import read_weights_file


@dataclass(frozen=True)
class PretrainedWeights:
    """The content of a weights file, under this project's names.

    Attributes:
        path: the file.
        layout: the layout's name, a key of `checkpoint_layouts.LAYOUTS`.
        model: the state dict of the model itself, in timm's names; with `attn.widths` if the model
            is sliced.
        parts: what was trained for a token method, under `reduction.*`; {} if nothing was.
        method: the method of `parts`; None if the names do not tell it.
    """

    path: Path
    layout: str
    model: dict[str, Tensor]
    parts: dict[str, Tensor]
    method: str | None = None

    @property
    def widths(self) -> Widths | None:
        """The dimensions of a sliced model; None for any other."""
        return widths_of(self.model) if "blocks.0.attn.widths" in self.model else None

    def fill(self, model: nn.Module) -> nn.Module:
        """`model` with the file's weights, loaded strictly; sliced first if the file's model is.

        Raises UserError if keys or dimensions do not match.
        """
        try:
            widths = self.widths
            if widths is not None:
                model = sliced_model(model, widths)
        except BadInput as error:
            raise _mismatch(self.path, error) from error
        _load(model, self.model, self.path)
        return model

    def weights_for(self, recipe: Recipe, dense: nn.Module) -> dict[str, Tensor] | None:
        """The complete state dict of `recipe` built on `dense`, with the file's trained parts.

        Args:
            recipe: the recipe to build.
            dense: the model that this file's `model` was loaded into.

        Returns:
            None if the recipe takes none of the parts: it has no token method with trained parts,
            the parts are another method's, or it names weights already.

        Raises:
            UserError: the parts are this method's and do not match its setting.
        """
        step = recipe.tokens
        if step is None or recipe.weights is not None or not self.parts:
            return None
        if self.method not in (None, step.method) or step.declared.training != "required":
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Untrained)  # its parts are loaded below
            built = recipe.build(dense)
        backbone = {k: v for k, v in built.state_dict().items() if not k.startswith("reduction.")}
        fresh = {k.split(".")[1] for k in built.state_dict() if k.startswith("reduction.")}
        if fresh.isdisjoint(k.split(".")[1] for k in self.parts):
            return None
        _load(built, {**backbone, **self.parts}, self.path, recipe)
        return dict(built.state_dict())


def read_pretrained(path: Path) -> PretrainedWeights:
    """The weights in a .safetensors file or a weights-only .pth file, under this project's names.

    Raises UserError for what `read_weights_file` refuses, for an unknown layout, and for a known
    layout that lacks keys.
    """
    file = read_weights_file(path)
    layout, model, parts = convert(file)
    return PretrainedWeights(path, layout.name, model, parts, layout.method)


def _load(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, recipe: Recipe | None = None
) -> None:
    try:
        load_strictly(model, state)
    except BadInput as error:
        raise _mismatch(path, error, recipe) from error


def _mismatch(path: Path, error: BadInput, recipe: Recipe | None = None) -> UserError:
    """The error with the file's name, and the same code and details."""
    target = "" if recipe is None else f" for {recipe}"
    named = {} if recipe is None else {"recipe": str(recipe)}
    details = {**error.details, **named, "path": str(path)}
    return UserError(f"weights file {path}{target}: {error}", error.code, **details)
