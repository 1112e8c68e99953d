"""A study's model and images mapped into one process, which measures as many trials as come.

Does not import ray: `search.trials.trial_actor` puts a worker into a Ray actor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe, recipe_of
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.measure.device import device_name
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.runtimes.backends import Run, runtime_call
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.trials.candidates import CandidateTrainer, TrainedRecipe
from vitpareto.search.trials.code_check import check_own_code
from vitpareto.search.trials.task import TrialTask

#: file in a trial's training folder from which a stopped training continues
CHECKPOINT = "state.pt"


@dataclass
class Worker:
    """A task with its dense model, loaded on the task's device."""

    task: TrialTask
    dense: nn.Module
    shape: ModelShape

    @classmethod
    def open(cls, task: TrialTask) -> Worker:
        """Map the task's images and model.

        Raises UserError if this process's code or images differ from the study's.
        """
        check_own_code(task.code)
        if task.execution.threads is not None:
            torch.set_num_threads(task.execution.threads)
        provenance = replace(task.provenance, device=device_name(task.execution.device))
        task = replace(task.on_this_node(), provenance=provenance)
        dense = task.model.load(task.execution.device, task.execution.torch_dtype)
        return cls(task, dense, methods.model_shape(dense))

    # -- images --------------------------------------------------------------------------------

    def calibration(self, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Normalised batches of the calibration split; dtype: the study's by default."""
        execution = self.task.execution
        batches = batches_of(
            self.task.images.calibration,
            self.task.images.preprocess,
            batch=execution.batch,
            device=execution.device,
            dtype=execution.torch_dtype if dtype is None else dtype,
        )
        return (images for images, _ in batches)

    def search_batch(self, count: int) -> torch.Tensor:
        """The first `count` search images, normalised; repeated if there are fewer."""
        split, execution = self.task.images.search, self.task.execution
        raw, _ = split.batch(0, min(count, len(split)))
        normalise = self.task.images.preprocess.normalise
        images = normalise(raw.to(execution.device), execution.torch_dtype)
        return images[torch.arange(count, device=images.device) % len(images)]

    # -- candidates ----------------------------------------------------------------------------

    @functools.cached_property
    def trainer(self) -> CandidateTrainer:
        """Trains candidates' weights, in float32 whatever dtype the study measures in."""
        task = self.task
        assert task.training is not None, "a task without training has no trainer"
        dense = self.dense
        if task.execution.torch_dtype != torch.float32:
            dense = task.model.load(task.execution.device, torch.float32)
        return CandidateTrainer(task.training, dense, task.study.folder.artifacts)

    def with_weights(self, recipe: Recipe) -> TrainedRecipe:
        """The recipe with its weights named, trained first if its method requires it.

        Training continues where a stopped trial of the same candidate left its checkpoint.
        """
        training = self.task.training
        if training is None or not training.needs_weights(recipe):
            return TrainedRecipe(recipe, Provenance())
        folder = self.task.study.folder
        return self.trainer.make(
            recipe,
            lambda: self.calibration(torch.float32),
            lambda key: folder.training(key) / CHECKPOINT,
        )

    def build(self, recipe: Recipe) -> nn.Module:
        """The candidate with the study's weights that it names, calibrated on the calibration split
        if its method requires it.
        """
        artifacts = self.task.study.folder.artifacts
        weights = None if recipe.weights is None else artifacts.load(recipe.weights)
        return recipe.build(self.dense, calibration=self.calibration(), weights=weights)

    # -- latency -------------------------------------------------------------------------------

    @functools.cached_property
    def dense_run(self) -> Run:
        """The dense model in the latency target's runtime."""
        target = self.task.latency
        return runtime_call(self.dense, self.search_batch(target.batch), target.runtime)

    def measure_latency(self, model: nn.Module) -> Latency:
        """Latency of a candidate beside the dense model, on the latency target."""
        target = self.task.latency
        if target.timer is not None:
            return target.timer.measure(recipe_of(model))
        images = self.search_batch(target.batch)
        run = runtime_call(model, images, target.runtime)
        return measure_latency(run, self.dense_run, images, runtime=target.runtime)
