"""Recovery: the front's recipes fine-tuned after the search, and a second front of them.

Each recipe goes on from the weights it was measured with (its own, or the dense model's), with the
study's dense model as its teacher, and is measured on the same search images. The dense model is
recovered too where it is on the front: what training alone is worth. Results lie in the study's
`recovered/` under their trial's number, each written once.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from vitpareto.methods import Recipe, Untrained
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import delete_tree
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.training.settings import Settings
from vitpareto.search.trials.certification import certify_front
from vitpareto.search.trials.nodes import Node, alive
from vitpareto.search.trials.run import (
    DecodeProgress,
    Prepared,
    looked_at,
    make_task,
    prepare,
    training_of,
)
from vitpareto.search.trials.trial import STATE, Task, Worker, measure_built
from vitpareto.search.trials.tune import TrialResources

log = logging.getLogger("vitpareto")


class NotRecovered(RuntimeError):
    """Some trials could not be recovered; the message says which and why. Others are kept."""


@dataclass(frozen=True)
class Recovery:
    """A recovery that was looked at whole before anything is trained: `todo` are the trials that
    have no result yet.
    """

    folder: StudyFolder
    prepared: Prepared
    settings: Settings
    todo: tuple[TrialResult, ...]

    @classmethod
    def of(
        cls,
        folder: StudyFolder,
        *,
        epochs: int,
        trials: Sequence[int] = (),
        lr: float | None = None,
        batch: int | None = None,
        workers: int | None = None,
        cache: str | None = None,
        decode: DecodeProgress | None = None,
        nodes: Sequence[Node] = (),
    ) -> Recovery:
        """trials: their numbers; none: the front's. lr, batch: as the recovery that was begun had
        them, or as the job says; workers: as the job says; nodes: `prepare`'s. UserError: nothing
        to recover, a trial that is not finished, no training images, settings other than those of a
        recovery that was begun.
        """
        job = {**folder.job(), "store": folder.store, "cache": cache or None}
        config = SearchConfig.of(job if workers is None else {**job, "workers": workers})
        wanted = chosen(folder, config.objectives, trials)
        begun = folder.recovery() or {}
        settings = Settings(
            epochs=epochs,
            lr=begun.get("lr", config.lr) if lr is None else lr,
            batch=begun.get("batch", config.train_batch) if batch is None else batch,
            seed=config.seed,
        )
        prepared = prepare(config, decode, nodes=nodes)
        folder.settle_recovery(
            {**settings.plain(), "train_fingerprint": prepared.data.split("train").fingerprint}
        )
        there = {r.trial for r in folder.recovered()}
        todo = tuple(r for r in wanted if r.trial not in there)
        return cls(folder, prepared, settings, todo)

    def run(
        self,
        *,
        cpus: int,
        gpus: int,
        heard: Callable[[TrialResult, TrialResult], None],
        say: Callable[[str], None] = log.info,
    ) -> list[TrialResult]:
        """Recover what is left to do on the Ray that is there, and certify the recovered front
        where the study's is; all that is recovered.

        heard(before, after): called with each as it becomes durable. NotRecovered, once all others
        are done, for those that failed.
        """
        config = self.prepared.config
        crew = TrialResources.of(config, self.prepared.device, cpus, gpus, alive())
        failed = {}
        with self.folder.locked():
            task = make_task(self.prepared, "", threads=None if crew.gpus else crew.cpus)
            task = replace(task, device=torch.device(task.device).type)
            if self.todo:
                task = replace(task, training=training_of(self.prepared, self.settings))
            task = looked_at(self.prepared, task, say)
            if self.todo:
                remote = ray.remote(_recover).options(
                    num_cpus=crew.cpus, num_gpus=crew.gpus, max_retries=0
                )
                shared = ray.put(task)
                waiting = {remote.remote(shared, one): one for one in self.todo}
                while waiting:
                    (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
                    before = waiting.pop(ready)
                    try:
                        heard(before, ray.get(ready))
                    except ray.exceptions.RayError as error:
                        cause = getattr(error, "cause", None) or error
                        failed[before.trial] = f"{type(cause).__name__}: {cause}"
            if config.certify == "front":
                certify_front(
                    self.folder, task, self.prepared.data, config.objectives,
                    cpus=crew.cpus, gpus=crew.gpus, say=say, recovered=True,
                )  # fmt: skip
        if failed:
            said = "; ".join(f"trial {t}: {why}" for t, why in sorted(failed.items()))
            raise NotRecovered(
                f"{len(failed)} of {len(self.todo)} trials could not be recovered, the others are "
                f"kept: {said}"
            )
        return self.folder.recovered()


def chosen(
    folder: StudyFolder, objectives: Sequence[str], trials: Sequence[int]
) -> list[TrialResult]:
    """The finished trials of these numbers, or the front's members. UserError where one is none."""
    results = {r.trial: r for r in folder.results()}
    finished = [r for r in results.values() if r.state == "finished"]
    if not finished:
        raise UserError(f"study {folder.name} has no finished trial to recover")
    if not trials:
        return front_of(finished, objectives_named(objectives))
    for number in trials:
        known = results.get(number)
        if known is None:
            near = sorted(finished, key=lambda r: abs(r.trial - number))[:3]
            said = ", ".join(str(r.trial) for r in near)
            raise UserError(f"there is no trial {number}; nearest: {said}")
        if known.state != "finished":
            raise UserError(f"trial {number} is {known.state}: only finished trials are recovered")
    return [results[n] for n in dict.fromkeys(trials)]


def _recover(task: Task, before: TrialResult) -> TrialResult:
    """On a worker: fine-tune, measure, make the result durable."""
    place, begin = Worker.open(task), time.monotonic()
    assert task.training is not None and task.training.trial is not None
    study, settings = task.study, task.training.trial
    recipe = Recipe.from_dict(before.resolved or before.recipe)
    progress = study.folder / "recovered" / "training" / f"{before.trial:06d}"
    weights = None if recipe.weights is None else study.artifacts.load(recipe.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)
        model = recipe.build(place.trainer.dense, weights=weights)
    history = place.trainer.fit(model, settings, recipe, progress / STATE)
    digest = study.artifacts.save(model.state_dict())
    record: dict[str, Any] = {
        "recovery": {
            **settings.plain(),
            "from_trial": before.trial,
            "from_top1": before.values["top1"],
            "loss": history[-1].loss,
        }
    }
    built = place.build(replace(recipe, weights=digest))
    result = measure_built(place, before.trial, built, record)
    result = replace(result, recipe=before.recipe, seconds=time.monotonic() - begin)
    study.write_recovered(result)
    delete_tree(progress)
    return result
