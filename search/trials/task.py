"""What all trials of a study share: a record that is sent to every worker once.

Data only: it pickles small, and images and weights travel as paths. Does not import ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vitpareto.methods import Recipe
from vitpareto.search.data.datasets import Data
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.files.object_store import store_folder
from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.measure.latency import Latency
from vitpareto.search.models.mapped_model import MappedModel
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.trials.local_images import local_split
from vitpareto.search.trials.study_training import StudyTraining


class LatencyTimer(Protocol):
    """Measures latencies on the device that the job names, wherever that device is."""

    def measure(self, recipe: Recipe) -> Latency:
        """Latency of a resolved recipe beside the dense model."""

    def measure_all(self, recipes: Sequence[tuple[int, Recipe]]) -> dict[int, Latency]:
        """Latencies by trial number, one recipe after the other."""


@dataclass(frozen=True)
class StudyRef:
    """The study that results are written to.

    epoch: of the driver that sent the task; a worker of an earlier driver cannot write results.
    object_store: the store's URL if it is object storage, else None.
    """

    folder: StudyFolder
    epoch: str = ""
    object_store: str | None = None

    def on_this_node(self) -> StudyRef:
        """The same study in this node's copy of the object store."""
        if self.object_store is None:
            return self
        folder = StudyFolder(store_folder(self.object_store) / self.folder.name)
        folder.folder.mkdir(parents=True, exist_ok=True)
        return replace(self, folder=folder)


@dataclass(frozen=True)
class StudyImages:
    """The images that a trial reads.

    head_indices: logits that the data's classes correspond to; None means all.
    source: the images before decoding, for nodes that do not see the driver's folders.
    """

    search: Split
    calibration: Split
    preprocess: Preprocess
    head_indices: tuple[int, ...] | None = None
    source: Data | None = None

    def on_this_node(self) -> StudyImages:
        """The same images as this node can map them. Raises UserError if they differ."""
        if self.source is None:
            return self
        search = local_split(self.search, self.source)
        calibration = local_split(self.calibration, self.source)
        return replace(self, search=search, calibration=calibration)


@dataclass(frozen=True)
class Execution:
    """How a model runs. batch: images; threads: of torch on a CPU, None means torch's default."""

    device: str
    dtype: str = "float32"
    batch: int = 64
    threads: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class LatencySettings:
    """What latencies are measured for, and when.

    batch: images per call. runtime: eager, compiled, ... (`search.runtimes`). per_trial: measured
    for every trial, because it is an objective or limited. limit_ms: maximum latency per batch.
    timer: measures them on another device than the trial's; None means the trial's own.
    """

    batch: int = 1
    runtime: str = "eager"
    per_trial: bool = False
    limit_ms: float | None = None
    timer: LatencyTimer | None = None


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study share.

    rungs: numbers of search images after which early stopping decides; () measures all at once.
    memory_first: peak memory is an objective, and is measured before the first rung. code:
    fingerprint of the driver's code (`code_identity.code_fingerprint`).
    """

    study: StudyRef
    model: MappedModel
    images: StudyImages
    execution: Execution
    provenance: Provenance
    window: BudgetWindow = BudgetWindow()
    latency: LatencySettings = LatencySettings()
    training: StudyTraining | None = None
    rungs: tuple[int, ...] = ()
    memory_first: bool = False
    code: str = ""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that a worker maps."""
        train = () if self.training is None else (self.training.split,)
        return (self.images.search, self.images.calibration, *train)

    def on_this_node(self) -> TrialTask:
        """The same task with the study and the images where this node has them.

        Raises UserError if this node's images differ from the study's.
        """
        study, images = self.study.on_this_node(), self.images.on_this_node()
        model, training = self.model, self.training
        if study.object_store is not None:
            model = replace(model, weights=study.folder.weights)
            if training is not None:
                training = replace(training, store=study.folder.folder.parent)
        if images.source is not None and training is not None:
            split = local_split(training.split, images.source)
            training = replace(training, split=split, calibration=images.calibration)
        return replace(self, study=study, images=images, model=model, training=training)
