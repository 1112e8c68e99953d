"""Published figures of the methods (`published.json`), and our costs in the same conventions.

Data and arithmetic only: models are built on the meta device. `search.compare.reproduction`
measures accuracies.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

import timm
import torch
from torch import nn

from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.search.measure.counting import counter, work
from vitpareto.search.models.loading import fresh_model

FILE = "published.json"


@dataclass(frozen=True)
class PublishedRow:
    """One published result. A number is None if it is not published.

    Attributes:
        setting: recipe parameters; possibly others if the row is not `reproducible`.
        gflops: multiply-accumulates per image / 1e9, as `counter` counts them.
        top1, dense_top1: percent on the ImageNet-1k validation images.
        why: why the row is not reproducible.
        model_options: timm options by which the source's model differs from `model`.
        timm_tag: timm's name of the weights.
        crop_pct: share of the resized image that the source evaluates on; the weights' own if None.
        figures: published numbers that are not recomputed here.
    """

    method: str
    model: str
    setting: dict[str, Any]
    source: str
    trained: bool
    weights: str
    gflops: float | None = None
    counter: str | None = None
    top1: float | None = None
    dense_top1: float | None = None
    reproducible: bool = True
    why: str = ""
    remark: str = ""
    model_options: dict[str, Any] = field(default_factory=dict)
    timm_tag: str | None = None
    crop_pct: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe | None:
        """The setting as a recipe; None if the row is not reproducible and has no valid setting."""
        if not self.reproducible:
            if self.method not in methods.names():
                return None
            declared = {p.name for p in methods.get(self.method).parameters}
            if not set(self.setting) <= declared:
                return None
        return Recipe.of(self.method, **self.setting)

    @property
    def label(self) -> str:
        """Method and published setting in one line, for tables."""
        return " ".join([self.method, *(f"{k}={_short(v)}" for k, v in self.setting.items())])


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_short(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(plain: dict[str, Any]) -> PublishedRow:
    known = {f.name for f in fields(PublishedRow)}
    other = {k: v for k, v in plain.items() if k not in known}
    return PublishedRow(**{k: v for k, v in plain.items() if k in known}, figures=other)


@functools.cache
def rows() -> tuple[PublishedRow, ...]:
    """Every published row, in the file's order."""
    text = files("vitpareto.search.compare").joinpath(FILE).read_text(encoding="utf-8")
    return tuple(_row(plain) for plain in json.loads(text)["rows"])


def source_model(row: PublishedRow) -> nn.Module:
    """The source's dense model of a row, on the meta device."""
    with torch.device("meta"):
        if row.model_options:
            return timm.create_model(row.model, **row.model_options)
        return fresh_model(row.model)


def recompute(row: PublishedRow) -> float | None:
    """Our GFLOPs of the row in its source's convention.

    None if the row has no GFLOPs, no known convention, or is not reproducible.
    """
    recipe = row.recipe
    if row.gflops is None or row.counter is None or not row.reproducible or recipe is None:
        return None
    model = source_model(row)
    found = work(recipe.checked(methods.model_shape(model)), model)
    return counter(row.counter).count(found) / 1e9


def matching(model: str, recipe: Recipe) -> tuple[PublishedRow, ...]:
    """Rows of this model whose published setting equals the checked recipe's.

    A parameter that a row does not state matches any value. The figures of a row with
    `model_options` are of a model that differs from timm's, and must be shown with the options.

    Args:
        model: timm name, with or without a tag.
    """
    params = {} if recipe.tokens is None else recipe.tokens.plain()
    return tuple(
        row
        for row in rows()
        if row.model == model.split(".")[0]
        and row.method == recipe.method
        and recipe.structure is None
        and all(params.get(k) == v for k, v in row.setting.items())
    )
