"""Recovery: fine-tune the front's recipes after the search, which gives a second front.

Each recipe starts from the weights that it was measured with (its own, or the dense model's), has
the study's dense model as its teacher, and is measured on the same search images. The dense model
is recovered too if it is on the front: that shows what training alone gains. Results are written
once, to the study's `recovered/`, under their trial's number.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitpareto.methods import Untrained
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import delete_tree
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.records import RecoverySettings
from vitpareto.search.study.results import TrialResult
from vitpareto.search.training.settings import TrainingSettings
from vitpareto.search.training.training_record import RecoveryRecord
from vitpareto.search.trials.certification import certify_front
from vitpareto.search.trials.job_check import CheckedJob, DecodeProgress, check_job
from vitpareto.search.trials.measurement import measure_model
from vitpareto.search.trials.node_checks import check_code
from vitpareto.search.trials.nodes import Node
from vitpareto.search.trials.ray_cluster import live_nodes, run_for_each
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.run_study import with_node_images, worker_task
from vitpareto.search.trials.study_task import training_for
from vitpareto.search.trials.task import TrialTask
from vitpareto.search.trials.worker import CHECKPOINT, Worker

log = logging.getLogger("vitpareto")


class NotRecovered(RuntimeError):
    """Some trials could not be recovered. failed: the reason by trial; the others are stored."""

    def __init__(self, failed: Mapping[int, str], pending: int) -> None:
        reasons = "; ".join(f"trial {t}: {why}" for t, why in sorted(failed.items()))
        super().__init__(f"{len(failed)} of {pending} trials could not be recovered ({reasons})")
        self.failed, self.pending = dict(failed), pending

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failed, self.pending)


@dataclass(frozen=True)
class Recovery:
    """A recovery that was checked before anything is trained. pending: trials without a result."""

    folder: StudyFolder
    job: CheckedJob
    settings: TrainingSettings
    pending: tuple[TrialResult, ...]

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
        """Check what is to be recovered, and with which settings.

        Args:
            trials: their numbers; none means the front's.
            lr, batch: None means those of the recovery that was started before, else the job's.
            workers: None means the job's.
            nodes: of the cluster that is joined (`check_job`).

        Raises UserError if there is nothing to recover, a trial is not finished, there are no
        training images, or the settings differ from those of a recovery that was started before.
        """
        stored = folder.job() if workers is None else folder.job().changed(workers=workers)
        config = stored.config(store=folder.store, cache=cache or None)
        selected = select_trials(folder, config.objectives, trials)
        started = folder.recovery.settings()
        before = None if started is None else started.training
        first = before or TrainingSettings(lr=config.lr, batch=config.train_batch)
        settings = TrainingSettings(
            epochs=epochs,
            lr=first.lr if lr is None else lr,
            batch=first.batch if batch is None else batch,
            seed=config.seed,
        )
        job = check_job(config, decode, nodes=nodes)
        train = job.data.split("train").fingerprint
        folder.recovery.settle(RecoverySettings(settings, train))
        recovered = {r.trial for r in folder.recovery.results()}
        pending = tuple(r for r in selected if r.trial not in recovered)
        return cls(folder, job, settings, pending)

    def run(
        self,
        *,
        cpus: int,
        gpus: int,
        on_result: Callable[[TrialResult, TrialResult], None],
        report: Callable[[str], None] = log.info,
    ) -> list[TrialResult]:
        """Recover the pending trials and certify the recovered front, if the study's is certified.

        Args:
            cpus, gpus: of the cluster.
            on_result: called with (before, after) when a recovered trial is durable.
            report: called with a line per step.

        Returns all recovered trials. Raises NotRecovered, after all others are done, if some fail.
        """
        config = self.job.config
        resources = TrialResources.of(config, self.job.device, cpus, gpus, live_nodes())
        failed: dict[int, str] = {}
        check_code()
        with self.folder.lock.hold():
            task = worker_task(self.job, resources)
            if self.pending:
                task = replace(task, training=training_for(self.job, self.settings))
            task = with_node_images(self.job, task, report)
            for done in run_for_each(
                _recover, task, self.pending, cpus=resources.cpus, gpus=resources.gpus
            ):
                if done.error is not None:
                    failed[done.item.trial] = done.reason
                else:
                    on_result(done.item, done.result())
            if config.certify == "front":
                certify_front(
                    self.folder,
                    task,
                    self.job.data,
                    config.objectives,
                    cpus=resources.cpus,
                    gpus=resources.gpus,
                    report=report,
                    recovered=True,
                )
        if failed:
            raise NotRecovered(failed, len(self.pending))
        return self.folder.recovery.results()


def select_trials(
    folder: StudyFolder, objectives: Sequence[str], trials: Sequence[int]
) -> list[TrialResult]:
    """The finished trials of these numbers, or the front's members if none are given.

    Raises UserError if a trial does not exist or is not finished.
    """
    results = {r.trial: r for r in folder.trials.all()}
    finished = [r for r in results.values() if r.state == "finished"]
    if not finished:
        raise UserError(
            f"study {folder.name!r} must have a finished trial to recover (it has none)",
            Code.EMPTY,
            study=folder.name,
        )
    if not trials:
        return front_of(finished, objectives_named(objectives))
    for number in trials:
        result = results.get(number)
        if result is None:
            near = [r.trial for r in sorted(finished, key=lambda r: abs(r.trial - number))[:3]]
            raise UserError(
                f"trial {number} does not exist; nearest: {', '.join(map(str, near))}",
                Code.NOT_FOUND,
                trial=number,
                nearest=near,
            )
        if result.state != "finished":
            raise UserError(
                f"a trial to recover must be finished (trial {number} is {result.state})",
                Code.UNSUPPORTED,
                trial=number,
                got=result.state,
            )
    return [results[n] for n in dict.fromkeys(trials)]


def _recover(task: TrialTask, before: TrialResult) -> TrialResult:
    """On a worker: fine-tune, measure and write the result."""
    worker, start = Worker.open(task), time.monotonic()
    assert task.training is not None and task.training.trial is not None
    study, settings = task.study.folder, task.training.trial
    recipe = before.rebuilt_from.to_recipe()
    progress = study.folder / "recovered" / "training" / f"{before.trial:06d}"
    weights = None if recipe.weights is None else study.artifacts.load(recipe.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)
        model = recipe.build(worker.trainer.dense, weights=weights)
    history = worker.trainer.fit(model, settings, recipe, progress / CHECKPOINT)
    digest = study.artifacts.save(model.state_dict())
    recovery = RecoveryRecord(
        settings, from_trial=before.trial, from_top1=before.values["top1"], loss=history[-1].loss
    )
    built = worker.build(replace(recipe, weights=digest))
    measured = measure_model(worker, before.trial, built, Provenance(recovery=recovery))
    result = replace(measured, recipe=before.recipe, seconds=time.monotonic() - start)
    study.recovery.write(result)
    delete_tree(progress)
    return result
