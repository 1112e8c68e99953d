"""The figures that methods were published with (`published.json`), and ours in their convention.

Data and arithmetic alone: no weights, no image; models are built on the meta device. Accuracies are
measured in `search.compare.reproduction`.
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
    """One published result. gflops are multiply-accumulates an image / 1e9 as `counter` counts;
    top1 and dense_top1 in percent on ImageNet-1k's validation images; None: not published.

    `setting` holds recipe parameters (of a row that is not `reproducible` perhaps others);
    `model_options` is how the source's model differs from timm's `model`; `timm_tag` names timm's
    weights, `crop_pct` the share of the resized image that the source evaluates on (None: the
    weights' own); `figures` are the published numbers that nothing here recomputes.
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
        """The setting as a recipe; None for a row that cannot be reproduced and gives none."""
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
    """The dense model of a row as its source has it, on the meta device: dimensions alone."""
    with torch.device("meta"):
        if row.model_options:
            return timm.create_model(row.model, **row.model_options)
        return fresh_model(row.model)


def recompute(row: PublishedRow) -> float | None:
    """The row's GFLOPs as we count them in its source's convention; None where the row gives none,
    no convention, or is not reproducible.
    """
    recipe = row.recipe
    if row.gflops is None or row.counter is None or not row.reproducible or recipe is None:
        return None
    model = source_model(row)
    found = work(recipe.checked(methods.model_shape(model)), model)
    return counter(row.counter).count(found) / 1e9


def matching(model: str, recipe: Recipe) -> tuple[PublishedRow, ...]:
    """Rows of this model (timm name, with or without a tag) whose published setting is the checked
    recipe's: what a row does not say may be anything. Where a row has `model_options`, its figures
    are of a model that differs from timm's by them: they have to be shown with them.
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
