"""What training in a study needs: images, settings, recorded preparations. Pickles small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.methods.engine.preparation import WidthsCost
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.measure.latency_table import LatencyTable
from vitpareto.search.training.preparation_cache import PreparationRecord, epochs_key
from vitpareto.search.training.preparation_trainer import TrainingImages
from vitpareto.search.training.settings import TrainingSettings
from vitpareto.search.trials.distributed import DataParallel


@dataclass(frozen=True)
class StudyTraining:
    """What a study's training needs. It pickles small; images travel as paths.

    Attributes:
        store: the folder of studies, where preparations are cached.
        trial, prepare: settings of a trial's own training and of preparations; None where the job
            gives no epochs.
        searched: what the search can propose, by method (`Method.preparation_plan`).
        records: the preparations that the study has recorded, by method.
        profile: the latency table that costs are read from (None: MACs).
        data_parallel: how many processes train one candidate.
    """

    split: Split
    calibration: Split
    preprocess: Preprocess
    data: str
    head_indices: tuple[int, ...] | None
    store: Path
    trial: TrainingSettings | None
    prepare: TrainingSettings | None
    searched: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    records: Mapping[str, PreparationRecord] = field(default_factory=dict)
    profile: LatencyTable | None = None
    data_parallel: DataParallel = DataParallel()

    @property
    def images(self) -> TrainingImages:
        return TrainingImages(
            self.split, self.calibration, self.preprocess, self.data, self.head_indices
        )

    def settings(self, method: str) -> TrainingSettings | None:
        """The settings of a method's training; None if it needs none or the job gives no epochs."""
        key = epochs_key(method)
        if key is None:
            return None
        return self.prepare if key == "prepare_epochs" else self.trial

    def needs_weights(self, recipe: Recipe) -> bool:
        """Whether this recipe gets its weights here."""
        steps = [s for s in (recipe.structure, recipe.tokens) if s is not None]
        return recipe.weights is None and any(self.settings(s.method) for s in steps)

    def cost(self, model: nn.Module) -> WidthsCost | None:
        """The latency table's cost of a model's widths; None without a table."""
        if self.profile is None:
            return None
        shape = methods.model_shape(model)
        return self.profile.cost(shape.patches + shape.prefix)
