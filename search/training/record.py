"""What a training leaves in a folder: its weights, and a record of how they came about.

OUT/model.safetensors   the weights: a complete state dict of what was trained
OUT/recipe.yaml         the recipe with its weights' digest, where one was trained
OUT/training.json       what was trained on what, how, and its accuracy before and after
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from vitpareto.methods import Recipe, weights_digest
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.models.weight_store import plain_state
from vitpareto.search.training.checkpoints import changes
from vitpareto.search.training.loop import Epoch


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on the search images, in percent, with its 95 % interval."""

    top1: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2f} % ({self.low:.2f}–{self.high:.2f}, {self.images} images)"


@dataclass(frozen=True)
class Trained:
    """What came of a job: `recipe` names the weights by digest, where there is one. fresh: whether
    the model's weights or head were new before.
    """

    out: Path
    recipe: Recipe
    weights: str
    before: Accuracy
    after: Accuracy
    history: tuple[Epoch, ...]
    fresh: bool = False

    def next_step(self, model: str, weights: Path | None, data: str, recipe: Path | None) -> str:
        """The command that goes on from here. model, weights, data, recipe: as they were given."""
        own = self.out / "model.safetensors"
        structure, tokens = self.recipe.structure, self.recipe.tokens
        if tokens is None and (structure is None or structure.declared.training == "required"):
            return f"search with it: vitpareto search --model {model} --weights {own} --data {data}"
        begin = f"measure it: vitpareto measure --model {model} --data {data}"
        if not self.fresh:
            given = f" --weights {weights}" if weights is not None else ""
            return f"{begin}{given} --recipe {self.out / 'recipe.yaml'} --trained {own}"
        # beside the model that it was trained with: no other has its head
        return f"{begin} --weights {own} --recipe {recipe}"


def keep(
    out: Path,
    model: nn.Module,
    before: Accuracy,
    after: Accuracy,
    history: list[Epoch],
    about: Mapping[str, Any],
    fresh: bool,
) -> Trained:
    """Write what came of a training. `about`: what it depended on, in JSON's types. training.json
    is last: where it is, everything is.
    """
    state = plain_state(model.state_dict())
    digest = weights_digest(state)
    recipe: Recipe = model.recipe  # type: ignore[assignment]
    if recipe != Recipe():
        recipe = replace(recipe, weights=digest)
        write_atomic(out / "recipe.yaml", recipe.to_yaml())
    write_atomic(out / "model.safetensors", safetensors.torch.save(state))
    trained = Trained(out, recipe, digest, before, after, tuple(history), fresh)
    record = {
        **about,
        "recipe_trained": recipe.to_dict(),
        "weights": digest,
        "fresh": fresh,
        "before": asdict(before),
        "after": asdict(after),
        "history": [asdict(epoch) for epoch in history],
        "versions": _versions(),
    }
    write_atomic(out / "training.json", json.dumps(record, indent=1) + "\n")
    return trained


def _versions() -> dict[str, str]:
    return {
        "vitpareto": importlib.metadata.version("vitpareto"),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def finished(out: Path, about: Mapping[str, Any]) -> Trained | None:
    """What the same training left there; None where none was finished.

    UserError where another one was, or its record cannot be read.
    """
    path = out / "training.json"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        there = {key: held[key] for key in about}
        recipe = Recipe.from_dict(held["recipe_trained"])
        trained = Trained(
            out,
            recipe,
            held["weights"],
            Accuracy(**held["before"]),
            Accuracy(**held["after"]),
            tuple(Epoch(**epoch) for epoch in held["history"]),
            held["fresh"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as the record of a training ({type(error).__name__}: {error}): "
            "give another --out"
        ) from error
    ours = json.loads(json.dumps(dict(about)))
    # the settings one by one
    flat = [{**d, **d.get("settings", {}), "settings": None} for d in (there, ours)]
    if said := changes(*flat):
        raise UserError(f"{out} holds another training: {said}; give another --out")
    return trained
