"""Measure one recipe and the dense model in this process, without a study.

Does not import ray or optuna.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vitpareto.methods import Recipe
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError
from vitpareto.search.measure.latency import Latency
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.results import TrialResult
from vitpareto.search.trials.job_check import CheckedJob, DecodeProgress, check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker


@dataclass(frozen=True)
class SingleMeasurement:
    """A recipe and the dense model on the search images. latency: of the recipe beside dense."""

    result: TrialResult
    dense: TrialResult
    latency: Latency


def measure_once(
    config: SearchConfig,
    recipe: Recipe,
    decode: DecodeProgress | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> SingleMeasurement:
    """Measure a recipe and the dense model on the job's search images.

    trained: the weights that the recipe names. Raises BadInput before any image is read, also for a
    method that needs training and has no weights (`check_trained`).
    """
    with tempfile.TemporaryDirectory(prefix="vitpareto-measure-") as scratch:
        job = check_job(replace(config, store=scratch, name="measure"), decode, recipe)
        recipe = _with_weights(job, recipe, trained)
        worker = Worker.open(study_task(job))
        dense = measure_recipe(worker, 0, Recipe())
        result = measure_recipe(worker, 1, recipe)
        latency = worker.measure_latency(worker.build(result.rebuilt_from.to_recipe()))
    return SingleMeasurement(result, dense, latency)


def _with_weights(job: CheckedJob, recipe: Recipe, trained: Mapping[str, Tensor] | None) -> Recipe:
    """The recipe with its weights among the job's artifacts. Raises UserError if they lack."""
    artifacts = job.folder.artifacts
    given = None if trained is None else artifacts.save(trained)
    if job.model.parts is not None:
        return replace(recipe, weights=artifacts.save(job.model.parts))
    if recipe.weights is not None and not artifacts.has(recipe.weights):
        raise UserError(
            f"weights must be those that the recipe names, {recipe.weights} (got "
            f"{given or 'none'}); give the file that holds them with --trained FILE, or the trial "
            "with --study NAME --trial N",
            Code.MISSING if given is None else Code.MISMATCH,
            key="weights",
            got=given,
            accepted=recipe.weights,
        )
    return recipe
