"""From a checked job to the task that its workers get. Does not import ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitpareto.search.files.filesystems import is_remote
from vitpareto.search.models.mapped_model import MappedModel
from vitpareto.search.study.space import Space
from vitpareto.search.training.settings import TrainingSettings
from vitpareto.search.trials.code_check import CODE
from vitpareto.search.trials.distributed import DataParallel
from vitpareto.search.trials.job_check import CheckedJob
from vitpareto.search.trials.study_training import StudyTraining
from vitpareto.search.trials.task import (
    Execution,
    LatencySettings,
    StudyImages,
    StudyRef,
    TrialTask,
)


def study_task(job: CheckedJob, *, epoch: str = "", threads: int | None = None) -> TrialTask:
    """The task of the job's workers; writes the model's weights where workers can map them.

    epoch: of the driver (`StudyFolder.start_epoch`). threads: of torch in a worker on a CPU.
    """
    config = job.config
    folder = replace(job.folder, folder=job.folder.folder.absolute())
    return TrialTask(
        study=StudyRef(folder, epoch, config.store if is_remote(config.store) else None),
        model=MappedModel.save(job.model.dense, folder.weights),
        images=StudyImages(
            job.data.split("search"),
            job.data.split("calibration"),
            job.model.preprocess,
            job.head_indices,
        ),
        execution=Execution(job.device, config.dtype, config.batch, threads),
        provenance=job.provenance,
        window=job.window,
        latency=LatencySettings(
            config.latency_batch,
            config.latency_runtime,
            config.times_trials,
            config.max_latency_ms,
        ),
        training=_study_training(job),
        memory_first="peak_mb" in config.objectives,
        code=CODE,
    )


def training_for(
    job: CheckedJob, trial: TrainingSettings | None, prepare: TrainingSettings | None = None
) -> StudyTraining:
    """What training with these settings needs.

    trial: of a trial's own training; prepare: of preparations that trials share. Raises UserError
    if the data has no train split.
    """
    return StudyTraining(
        split=job.data.split("train"),
        calibration=job.data.split("calibration"),
        preprocess=job.model.preprocess,
        data=job.config.data,
        head_indices=job.head_indices,
        store=job.folder.folder.absolute().parent,
        trial=trial,
        prepare=prepare,
        searched=_searched(job.space),
        profile=job.profile,
        data_parallel=_data_parallel(job),
    )


def _study_training(job: CheckedJob) -> StudyTraining | None:
    """What the study's training needs; None if none of its methods is trained."""
    config = job.config

    def settings(epochs: int) -> TrainingSettings | None:
        if not epochs:
            return None
        return TrainingSettings(
            epochs=epochs, lr=config.lr, batch=config.train_batch, seed=config.seed
        )

    if not job.trained:
        return None
    return training_for(job, settings(config.train_epochs), settings(config.prepare_epochs))


def _data_parallel(job: CheckedJob) -> DataParallel:
    """How many GPUs train one candidate; on a CPU threads share the cores."""
    if not job.device.startswith("cuda"):
        return DataParallel()
    return DataParallel(max(1, int(job.config.gpus_per_trial or 1)), cuda=True)


def _searched(space: Space) -> dict[str, dict[str, Any]]:
    """What the search can propose, by method: parameters with their bounds, or fixed values."""
    return {
        name: {**{p.name: p for p in space.parameters[name]}, **space.fixed[name]}
        for name in space.methods
    }
