"""What is traced: a recipe on a model, given by itself or as a trial of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vitpareto.methods import Code, Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.models import embedded_model
from vitpareto.search.study.folder import StudyFolder


@dataclass(frozen=True)
class TraceRequest:
    """A recipe on a model, to be traced.

    Attributes:
        data: data set for class names, calibration and, if no file is given, images. The embedded
            data set if None and one is needed.
        fingerprint: required fingerprint of the model, if a study measured it.
        trained: the weights that the recipe names.
    """

    recipe: Recipe
    model: str = embedded_model.NAME
    weights: Path | None = None
    data: str | None = None
    seed: int = 0
    fingerprint: str | None = None
    trained: Mapping[str, Tensor] | None = None

    @classmethod
    def of_trial(cls, folder: StudyFolder, number: int) -> TraceRequest:
        """A trial of a study. Raises UserError if it does not exist or was not measured."""
        results = folder.trials.all()
        result = next((r for r in results if r.trial == number), None)
        if result is None:
            span = f"{results[0].trial} to {results[-1].trial}" if results else "none yet"
            raise UserError(
                f"trial {number} does not exist in study {folder.name} (its trials: {span})",
                Code.NOT_FOUND,
                study=folder.name,
                trial=number,
            )
        if result.state not in ("finished", "raced_out"):
            raise UserError(
                f"trial {number} of study {folder.name} must be measured "
                f"(got {result.state}: {result.reason})",
                Code.UNSUPPORTED,
                trial=number,
                state=result.state,
            )
        job = folder.job().config(store=folder.store)
        recipe = result.rebuilt_from.to_recipe()
        known = str(folder.identity.read()["model_fingerprint"])
        trained = None if recipe.weights is None else folder.artifacts.load(recipe.weights)
        return cls(recipe, job.model, folder.weights, job.data, job.seed, known, trained)
