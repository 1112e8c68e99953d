"""From a proposed recipe to one that names its weights: prepared for many, or trained for one.

The search proposes recipes without weights. `CandidateTrainer` finds or trains the weights and
stores them by digest, so that the resulting recipe can be rebuilt from the study alone.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Recipe, Step, recipe_of
from vitpareto.methods.engine.preparation import PreparationOutcome, not_prepared
from vitpareto.search.models.loading import fingerprint
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.training.loop import Epoch
from vitpareto.search.training.preparation_cache import (
    CachedPreparation,
    PreparationUse,
    epochs_key,
    prepare_once,
)
from vitpareto.search.training.preparation_trainer import (
    CachedTrainer,
    built_fresh,
)
from vitpareto.search.training.settings import TrainingSettings, train_candidate
from vitpareto.search.training.training_record import TrainingRecord
from vitpareto.search.trials.study_training import StudyTraining
from vitpareto.search.versions import release_versions


@dataclass(frozen=True)
class TrainedRecipe:
    """A recipe that names its weights, and how they were made."""

    recipe: Recipe
    provenance: Provenance


class CandidateTrainer:
    """Makes candidates' weights in this process.

    Args:
        dense: the study's model in float32, which trained candidates start from and which is their
            teacher.
    """

    def __init__(self, training: StudyTraining, dense: nn.Module, artifacts: WeightStore) -> None:
        self.training, self.dense, self.artifacts = training, dense, artifacts
        #: receives one line per epoch or round
        self.log: Callable[[str], None] = lambda message: None

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.dense)

    # -- the model under a token step ----------------------------------------------------------

    def base(self, structure: Step | None) -> nn.Module:
        """The model that a token step acts on, with its weights.

        Raises BadInput if the structural step has to be prepared and is not.
        """
        if structure is None:
            return self.dense
        shape = methods.model_shape(self.dense)
        if not structure.declared.needs_preparation:
            return Recipe(structure=structure).reshape(shape, self.dense)[1]
        state = self.artifacts.load(self._prepared_structure(structure)[0])
        model = Recipe(structure=structure).reshape(shape, self.dense, state)[1]
        model.load_state_dict(state)
        return model.eval()

    def _prepared_structure(self, structure: Step) -> tuple[str, PreparationUse]:
        """The digest of a structural step's weights, and the preparation that made them."""
        record = self.training.records.get(structure.method)
        if record is None:
            raise not_prepared(structure.method)
        digest = record.outcome.weights_for(structure.params)
        return digest, PreparationUse(structure.method, record.key, fresh=False)

    # -- weights -------------------------------------------------------------------------------

    def make(
        self,
        recipe: Recipe,
        calibration: Callable[[], Iterable[Tensor]],
        checkpoint: Callable[[str], Path],
    ) -> TrainedRecipe:
        """Name the recipe's weights, and store them among the study's.

        Args:
            calibration: returns the batches that a method calibrates on, in float32.
            checkpoint: the file that an interrupted training resumes from, by the proposed
                candidate's key.

        Raises what building and training raise, for example FloatingPointError for a loss that is
        not finite.
        """
        structure, tokens = recipe.structure, recipe.tokens
        uses: list[PreparationUse] = []
        digest = None
        if structure is not None and structure.declared.needs_preparation:
            digest, use = self._prepared_structure(structure)
            uses.append(use)
        elif structure is not None and epochs_key(structure.method) is not None:
            return self._train_for(recipe, self.dense, recipe, checkpoint, uses)
        if tokens is not None:
            base = self.base(structure)
            if tokens.declared.needs_preparation:
                prepared = self.prepare(tokens.method, base)
                on = "" if structure is None else str(Recipe(structure=structure))
                record = prepared.record
                uses.append(
                    PreparationUse(record.method, record.key, record.fresh, record.seconds, on)
                )
                digest = prepared.outcome.weights_for(tokens.params)
                self.artifacts.adopt(digest, prepared.artifacts)
            elif epochs_key(tokens.method) is not None:
                return self._train_for(recipe, base, Recipe(tokens=tokens), checkpoint, uses)
            elif tokens.declared.needs_calibration(tokens.params):
                built = Recipe(tokens=tokens).build(base, calibration())
                recipe = replace(recipe, tokens=recipe_of(built).tokens)
        return TrainedRecipe(replace(recipe, weights=digest), Provenance(prepared=tuple(uses)))

    def _train_for(
        self,
        recipe: Recipe,
        base: nn.Module,
        step: Recipe,
        checkpoint: Callable[[str], Path],
        uses: list[PreparationUse],
    ) -> TrainedRecipe:
        """Train `step` built on `base`, which is `recipe` as a whole."""
        settings = self.training.trial
        assert settings is not None, "the job gives no epochs for a method that it searches"
        begin = time.monotonic()
        model = built_fresh(step, base, settings)
        key = recipe.key(methods.model_shape(model))
        history = self.fit(model, settings, recipe, checkpoint(key))
        digest = self.artifacts.save(model.state_dict())
        seconds = round(time.monotonic() - begin, 3)
        training = TrainingRecord(settings, history[-1].loss, seconds)
        provenance = Provenance(prepared=tuple(uses), training=training)
        return TrainedRecipe(replace(recipe, weights=digest), provenance)

    def fit(
        self, model: nn.Module, settings: TrainingSettings, recipe: Recipe, checkpoint: Path
    ) -> list[Epoch]:
        """Train a built candidate in place, with the dense model as its teacher."""
        training, log = self.training, self.log
        call = functools.partial(
            train_candidate,
            split=training.split,
            preprocess=training.preprocess,
            settings=settings,
            data=training.data,
            head_indices=training.head_indices,
            checkpoint=checkpoint,
            about={"model": self.fingerprint, "recipe": recipe.to_dict()},
            progress=lambda epoch: log(f"{epoch}, of {settings.epochs}"),
        )
        if training.data_parallel.workers == 1:
            return call(model, teacher=self.dense)
        device = next(model.parameters()).device
        # every process has its own device: models are sent on the CPU
        student, teacher = copies_on_cpu(model, self.dense)
        sent = functools.partial(_train_in_process, call, student, teacher, device.type)
        history, state = training.data_parallel.run(sent, checkpoint.parent)
        model.load_state_dict(state)
        model.eval()
        return history

    # -- preparations --------------------------------------------------------------------------

    def prepare(self, method: str, base: nn.Module | None = None) -> CachedPreparation:
        """The preparation of a method on `base` (default: the dense model): found or trained."""
        base = self.dense if base is None else base
        training, declared = self.training, methods.get(method)
        settings = training.prepare
        assert settings is not None, "the job gives no epochs for a method that it searches"
        cost = training.cost(base) if declared.reads_latency_table else None
        plan = declared.preparation_plan(base, training.searched.get(method, {}), cost)
        inputs = {**self._inputs(base, settings), **plan}
        if declared.reads_calibration:
            inputs["calibration"] = training.calibration.fingerprint
        if declared.reads_latency_table:
            inputs["profile"] = None if training.profile is None else training.profile.digest
        job = _PreparationJob(method, plan, training, settings, self.log)
        if training.data_parallel.workers == 1:
            train_here = functools.partial(job.run, base, self.dense)
            return prepare_once(training.store, method, inputs, train_here)
        device = next(base.parameters()).device.type

        def train_together(progress: Path, weights: WeightStore) -> PreparationOutcome:
            model, teacher = copies_on_cpu(base, self.dense)
            call = functools.partial(job.run, model, teacher, progress, weights, device)
            return training.data_parallel.run(call, progress)

        return prepare_once(training.store, method, inputs, train_together)

    def _inputs(self, base: nn.Module, settings: TrainingSettings) -> dict[str, Any]:
        """What every preparation depends on, as JSON values."""
        training = self.training
        head = training.head_indices
        return {
            "model": fingerprint(base),
            "teacher": self.fingerprint,
            "images": training.split.fingerprint,
            "preprocess": training.preprocess.describe(),
            "head_indices": None if head is None else list(head),
            "settings": {**settings.to_json(), "augment": training.images.augmentation(settings)},
            "versions": release_versions("torch", "timm"),
        }


@dataclass(frozen=True)
class _PreparationJob:
    """A preparation as it is sent to the processes that train it."""

    method: str
    plan: dict[str, Any]
    training: StudyTraining
    settings: TrainingSettings
    log: Callable[[str], None]

    def run(
        self,
        base: nn.Module,
        dense: nn.Module,
        progress: Path,
        weights: WeightStore,
        device: str | None = None,
    ) -> PreparationOutcome:
        """In each process. device: where the models are moved; None: they stay where they are."""
        if device is not None:
            base, dense = base.to(device).eval(), dense.to(device).eval()
        declared = methods.get(self.method)
        trainer = CachedTrainer(
            self.method,
            base,
            dense,
            self.training.images,
            self.settings,
            progress,
            weights,
            self.training.cost(base) if declared.reads_latency_table else None,
            self.log,
        )
        return declared.prepare(self.plan, trainer)


def copies_on_cpu(model: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies on the CPU; if both are the same model, so are the copies."""
    copied, copied_teacher = copy.deepcopy((model, teacher))
    return copied.to("cpu"), copied_teacher.to("cpu")


def _train_in_process(
    call: Callable[..., list[Epoch]], model: nn.Module, teacher: nn.Module, device: str
) -> tuple[list[Epoch], dict[str, Tensor]]:
    model = model.to(device)
    history = call(model, teacher=teacher.to(device).eval())
    return history, {k: v.detach().cpu() for k, v in model.state_dict().items()}
