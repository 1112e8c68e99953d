"""Ray Tune: trials handed to workers, rungs to the searcher, until the study is done.

What to measure is the searcher's to say, whether a trial climbs on the judge's, how it is measured
the worker's; here they meet, and nothing is decided.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.distributed import MEASURES
from vitpareto.search.trials.nodes import Node, check_target, largest
from vitpareto.search.trials.searcher import FrontSearcher
from vitpareto.search.trials.trial import RUNG, RecipeTrial, Task

#: seconds between two looks at the disk, and how many bytes left are none
LOOK, LITTLE = 2.0, 2**16

log = logging.getLogger("vitpareto")


@dataclass(frozen=True)
class TrialResources:
    """How trials share a machine or cluster."""

    workers: int
    cpus: int
    gpus: float

    @classmethod
    def of(
        cls, config: SearchConfig, device: str, cpus: int, gpus: int, nodes: Sequence[Node] = ()
    ) -> TrialResources:
        """cpus, gpus: what the cluster has. nodes: what each of its nodes has; none: it is one.
        UserError where the job asks for more.
        """
        able = [n for n in nodes if n.gpus or not device.startswith("cuda")]
        if config.latency_on is not None and nodes:
            slot = check_target(config.latency_on, nodes)
            cpus, gpus = cpus - int(slot["CPU"]), gpus - int(slot.get("GPU", 0))
            if cpus < 1 or (device.startswith("cuda") and gpus < 1):
                raise UserError(
                    f"latency_on is {config.latency_on!r}, whose slot is all that the cluster has: "
                    "add a node for the trials, or leave latency_on out"
                )
        if device.startswith("cuda"):
            share = config.gpus_per_trial or 1.0
            if share > gpus:
                there = "; ".join(str(n) for n in nodes)
                raise UserError(
                    f"a trial asks for {share:g} GPUs: the cluster has {gpus}"
                    + (f" for trials ({there})" if there else "")
                )
            workers = config.workers or max(1, int(gpus / share))
            # a trial on several GPUs measures on a part of one and trains on the rest of all
            held = share if share <= 1 else MEASURES
            crew = cls(workers, max(1, cpus // (2 * workers)), held)
        else:
            # more than eight on one machine get in each other's way
            workers = config.workers or min(cpus, 8 * max(1, len(able)))
            crew = cls(workers, max(1, cpus // workers), 0.0)
        if config.times_trials and config.latency_on is None:
            # a latency is measured alone on its device, never beside another worker
            crew = cls(1, cpus, 1.0 if device.startswith("cuda") else 0.0)
        return replace(crew, cpus=min(crew.cpus, max(1, largest(able)))) if able else crew

    def fit(self, resources: Mapping[str, float]) -> int:
        """Trials that there is room for at a time, on all of a cluster's resources."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return min(int(resources.get(k, 0.0) / each) for k, each in wanted.items() if each)


class _Rungs(FIFOScheduler):
    """Ray's scheduler: in order, and at every rung the searcher says who climbs on.

    Ray gives a worker that falls free to the first trial that waits, and ends the process that was
    being started for that trial. Where trials are shorter than a process takes to start, one
    worker would do all the work: so until all of the crew are up, a free worker gets the newest
    trial, for which no process is on its way.
    """

    def __init__(self, searcher: FrontSearcher, workers: int) -> None:
        super().__init__()
        self.searcher, self.workers = searcher, workers
        self.all_up = False
        #: trials that wait and have a process on its way
        self.placed: set[str] = set()

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        # live ones alone: looking through all would take longer with every trial
        waiting = [t for t in tune_controller.get_live_trials() if t.status == Trial.PENDING]
        waiting.sort(key=lambda trial: trial.config["trial"])
        new = [t for t in waiting if t.trial_id not in self.placed]
        self.placed = {t.trial_id for t in waiting}
        first = waiting if self.all_up else new or waiting
        return first[0] if first else None

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        live = tune_controller.get_live_trials()
        self.all_up = sum(t.status == Trial.RUNNING for t in live) >= self.workers
        # the free worker first, then the next proposal, which may take as long as it likes
        self.searcher.later = self.all_up and any(t.status == Trial.PENDING for t in live)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        climbs = self.searcher.climbs(trial.trial_id, result)
        return FIFOScheduler.CONTINUE if climbs else FIFOScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Watch(tune.Callback):
    """Says it when the disk is full: workers then hold their results and wait, and are silent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.full, self.next = folder, False, 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + LOOK
        disk = os.statvfs(self.folder)
        full = disk.f_bavail * disk.f_frsize < LITTLE
        if full != self.full:
            log.warning(
                "the disk of %s is full: the study is paused until there is room"
                if full
                else "there is room for %s again; going on",
                self.folder,
            )
        self.full = full


class _Forget(tune.Callback):
    """Rungs are large, and Ray would keep a trial's last report for good."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        result.pop(RUNG, None)


def run_tune(
    searcher: FrontSearcher,
    task: Task,
    crew: TrialResources,
    worker: type[tune.Trainable] = RecipeTrial,
) -> None:
    """Hand out what the searcher proposes until it says that the study is done.

    worker: what measures; it takes `task`, and is given to be reused.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trainable = tune.with_resources(
        tune.with_parameters(worker, task=task), {"cpu": crew.cpus, "gpu": crew.gpus}
    )
    # one more than there are workers is proposed ahead, while they are busy: not with one worker,
    # so that the same seed gives the same trials, nor where there is room for it to be begun
    ahead = 1 if crew.workers > 1 and crew.fit(ray.cluster_resources()) <= crew.workers else 0
    # Ray wants a place for its own record of the run; nothing is ever read from it
    scratch = task.study.folder / "ray"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=2**31,  # the searcher says when the study is done
                scheduler=_Rungs(searcher, crew.workers),
                max_concurrent_trials=crew.workers + ahead,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[_Forget(), _Watch(task.study.folder)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
