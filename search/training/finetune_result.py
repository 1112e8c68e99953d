"""What `vitpareto finetune` writes into its folder, and how it is read back.

OUT/model.safetensors   the weights: a complete state dict of what was trained
OUT/recipe.yaml         the recipe with its weights' digest, if a recipe was trained
OUT/training.json       inputs, settings, versions, and accuracy before and after
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from vitpareto.methods import Code, Recipe, recipe_of, weights_digest
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.models.weight_store import plain_state
from vitpareto.search.training.checkpoints import describe, differences
from vitpareto.search.training.loop import Epoch
from vitpareto.search.versions import package_versions


@dataclass(frozen=True)
class TopOne:
    """Top-1 accuracy on the search images, in percent, with its 95 % interval."""

    top1: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2f} % ({self.low:.2f}–{self.high:.2f}, {self.images} images)"


@dataclass(frozen=True)
class FinetuneResult:
    """A finished fine-tuning.

    Attributes:
        recipe: what was trained; it names the weights by digest unless it is the empty recipe.
        weights: digest of the state dict.
        fresh: whether the model's weights or head were untrained before.
    """

    out: Path
    recipe: Recipe
    weights: str
    before: TopOne
    after: TopOne
    history: tuple[Epoch, ...]
    fresh: bool = False

    def next_step(self, model: str, weights: Path | None, data: str, recipe: Path | None) -> str:
        """The command that continues from here. The arguments are those of the fine-tuning."""
        trained = self.out / "model.safetensors"
        structure, tokens = self.recipe.structure, self.recipe.tokens
        if tokens is None and (structure is None or structure.declared.training == "required"):
            return (
                f"search with it: vitpareto search --model {model} --weights {trained} "
                f"--data {data}"
            )
        measure = f"measure it: vitpareto measure --model {model} --data {data}"
        if not self.fresh:
            given = f" --weights {weights}" if weights is not None else ""
            return f"{measure}{given} --recipe {self.out / 'recipe.yaml'} --trained {trained}"
        # the head is new: no other weights fit the recipe
        return f"{measure} --weights {trained} --recipe {recipe}"


def save_result(
    out: Path,
    model: nn.Module,
    before: TopOne,
    after: TopOne,
    history: list[Epoch],
    inputs: Mapping[str, Any],
    fresh: bool,
) -> FinetuneResult:
    """Write the result of a training.

    inputs: everything that the training depends on, as JSON values. training.json is written last:
    if it exists, the other files exist too.
    """
    state = plain_state(model.state_dict())
    digest = weights_digest(state)
    recipe = recipe_of(model)
    if recipe != Recipe():
        recipe = replace(recipe, weights=digest)
        write_atomic(out / "recipe.yaml", recipe.to_yaml())
    write_atomic(out / "model.safetensors", safetensors.torch.save(state))
    result = FinetuneResult(out, recipe, digest, before, after, tuple(history), fresh)
    record = {
        **inputs,
        "recipe_trained": recipe.to_dict(),
        "weights": digest,
        "fresh": fresh,
        "before": asdict(before),
        "after": asdict(after),
        "history": [asdict(epoch) for epoch in history],
        "versions": _versions(),
    }
    write_atomic(out / "training.json", json.dumps(record, indent=1) + "\n")
    return result


def _versions() -> dict[str, str]:
    return {**package_versions("vitpareto", "torch", "timm"), "python": platform.python_version()}


def load_result(out: Path, inputs: Mapping[str, Any]) -> FinetuneResult | None:
    """The result of the same training in this folder; None if there is none.

    Raises UserError if the folder holds another training, or a record that cannot be read.
    """
    path = out / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        recorded = {key: record[key] for key in inputs}
        result = FinetuneResult(
            out,
            Recipe.from_dict(record["recipe_trained"]),
            record["weights"],
            TopOne(**record["before"]),
            TopOne(**record["after"]),
            tuple(Epoch(**epoch) for epoch in record["history"]),
            record["fresh"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable record of a training ({type(error).__name__}: {error}): "
            "choose another --out",
            Code.UNREADABLE,
            path=str(path),
        ) from error
    given = json.loads(json.dumps(dict(inputs)))
    # compare the settings one by one
    flat = [{**d, **d.get("settings", {}), "settings": None} for d in (recorded, given)]
    if changed := differences(*flat):
        raise UserError(
            f"{out} must be empty or hold the same training ({describe(changed)}): choose another "
            "--out",
            Code.MISMATCH,
            path=str(out),
            keys=sorted(changed),
        )
    return result
