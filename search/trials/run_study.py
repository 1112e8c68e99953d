"""Run or continue a study on the Ray cluster that this process is connected to.

The caller starts or joins Ray (`clusters`). Knows nothing of tables and plots: hooks get results.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vitpareto.search.stats.racing import Race, rungs
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.optuna_storage import close, open_storage
from vitpareto.search.study.progress import ProgressHook, StudyProgress
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.trials.certification import certify_front
from vitpareto.search.trials.early_stopping import EarlyStopping
from vitpareto.search.trials.front_latency import measure_front_latency
from vitpareto.search.trials.job_check import CheckedJob
from vitpareto.search.trials.latency_actor import latency_actor
from vitpareto.search.trials.node_checks import check_code, check_nodes
from vitpareto.search.trials.preparations import prepare_shared, structural_outcomes
from vitpareto.search.trials.ray_cluster import live_nodes
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.searcher import FrontSearcher
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.task import LatencyTimer, TrialTask
from vitpareto.search.trials.trial_actor import trainable_of
from vitpareto.search.trials.tune import run_tune

log = logging.getLogger("vitpareto")


@dataclass(frozen=True)
class StudyOutcome:
    """A study after its search, and how the search ended."""

    folder: StudyFolder
    progress: StudyProgress


def run_study(
    job: CheckedJob,
    *,
    cpus: int,
    gpus: int,
    hooks: list[ProgressHook] | None = None,
    report: Callable[[str], None] = log.info,
) -> StudyOutcome:
    """Run or continue the study until its trials are measured, then time and certify its front.

    Args:
        cpus, gpus: of the cluster.
        hooks: called with every new result; must not raise.
        report: called with a line per step of preparation, latency and certification.

    Results are on disk however it ends. Raises UserError if another driver holds the study, its
    settings differ, or the store cannot be written.
    """
    config, folder = job.config, job.folder
    resources = TrialResources.of(config, job.device, cpus, gpus, live_nodes())
    check_code()
    with folder.lock.hold(), contextlib.ExitStack() as stack:
        epoch = _claim(job)
        task = worker_task(job, resources, epoch)
        task = with_node_images(job, task, report)
        timer: LatencyTimer | None = None
        if config.latency_on is not None:
            timer = stack.enter_context(latency_actor(config.latency_on, task, report))
        if config.times_trials:
            task = replace(task, latency=replace(task.latency, timer=timer))
        early_stopping = early_stopping_for(job)
        if early_stopping is not None:
            task = replace(task, rungs=rungs(len(job.data.split("search")))[:-1])
        if config.budget is None or folder.trials.count() < config.budget:
            task = prepare_shared(job.trained, task, resources.cpus, resources.gpus, report)
        job.model.reshape.use_outcomes(structural_outcomes(folder))
        progress = _run_trials(job, task, resources, early_stopping, hooks)
        if progress.ended:
            _measure_front(job, task, resources, timer, report)
    return StudyOutcome(folder, progress)


def _measure_front(
    job: CheckedJob,
    task: TrialTask,
    resources: TrialResources,
    timer: LatencyTimer | None,
    report: Callable[[str], None],
) -> None:
    """Measure the front's latencies and certify it, as the job says."""
    config = job.config
    if config.latency == "front":
        measure_front_latency(job.folder, task, config.objectives, timer)
    if config.certify == "front":
        certify_front(
            job.folder,
            task,
            job.data,
            config.objectives,
            cpus=resources.cpus,
            gpus=resources.gpus,
            report=report,
        )


def _claim(job: CheckedJob) -> str:
    """Write the job and start this driver's epoch in the study; returns the epoch."""
    folder, request = job.folder, JobRequest(job.config.plain())
    if not folder.exists:  # a study without its job could not be continued by name alone
        folder.write_job(request)
    folder.identity.settle(job.identity)
    folder.write_job(request)
    epoch = uuid.uuid4().hex
    folder.trials.start_epoch(epoch)
    return epoch


def _run_trials(
    job: CheckedJob,
    task: TrialTask,
    resources: TrialResources,
    early_stopping: EarlyStopping | None,
    hooks: list[ProgressHook] | None,
) -> StudyProgress:
    """Run the study's remaining trials; returns how it stands."""
    config = job.config
    settings = SessionSettings(
        objectives=config.objectives,
        sampler=config.sampler,
        seed=config.seed,
        trials=config.budget,
        window=task.window,
        patience=config.patience,
        seconds=config.seconds,
    )
    storage = open_storage(job.folder, config.storage)
    try:
        session = StudySession(
            job.folder,
            job.space,
            settings,
            shape_of=job.model.reshape,
            hooks=hooks or (),
            early_stopping=early_stopping,
            storage=storage,
        )
        progress = session.progress
        if config.budget is None or progress.done < config.budget:
            run_tune(FrontSearcher(session), trainable_of(task), resources)
        else:
            progress.ended = f"{progress.done} trials measured"
        return progress
    finally:
        close(storage)


def worker_task(job: CheckedJob, resources: TrialResources, epoch: str = "") -> TrialTask:
    """The job's task as Ray workers get it. Ray shows a worker its own GPUs only, counted from 0,
    so that the device has no number.
    """
    threads = None if resources.gpus else resources.cpus
    task = study_task(job, epoch=epoch, threads=threads)
    device = torch.device(task.execution.device).type
    return replace(task, execution=replace(task.execution, device=device))


def with_node_images(job: CheckedJob, task: TrialTask, report: Callable[[str], None]) -> TrialTask:
    """Check the nodes of a cluster, and give the task the images that other nodes decode from.

    Raises UserError if a node cannot take part (`check_nodes`).
    """
    if not job.nodes:
        return task
    train = () if task.training is None else ("train",)
    source = job.data.only("search", "calibration", "held-out", *train)
    check_nodes(task, source, report)
    return replace(task, images=replace(task.images, source=source))


def early_stopping_for(job: CheckedJob) -> EarlyStopping | None:
    """The study's early stopping; None if every trial is measured in full."""
    config = job.config
    if config.race == "off":
        return None
    race = Race(len(job.data.split("search")), config.race_error, config.budget)
    return EarlyStopping(race, [OBJECTIVES[o] for o in config.objectives], job.provenance)
