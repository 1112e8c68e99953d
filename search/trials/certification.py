"""Certification: the front measured again at the end, on images that no decision was based on.

One Ray task per recipe, each durable when it ends: what was measured is not measured again, and a
trial that enters the front of a continued study is added. What the numbers mean is computed when
they are read (`search.study.certificates`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from vitpareto.search.data.datasets import Data
from vitpareto.search.data.decoded import Split
from vitpareto.search.study.certification_record import CertificationRecord
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, reference_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.verdict import controls_of, verdict
from vitpareto.search.trials.measurement import measure_model
from vitpareto.search.trials.ray_cluster import run_for_each
from vitpareto.search.trials.task import TrialTask
from vitpareto.search.trials.worker import Worker

log = logging.getLogger("vitpareto")


def members_of(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[TrialResult]:
    """What is certified, by trial number: the front, the dense model, the front of the controls,
    and the two trials that the verdict compares.
    """
    axes = objectives_named(objectives)
    found = verdict(results, objectives)
    pair = () if found is None else (found.method, found.control)
    members = [*front_of(results, axes), *front_of(controls_of(results), axes)]
    members += [r for r in (reference_of(results), *pair) if r is not None]
    return [r for _, r in sorted({r.trial: r for r in members}.items())]


def certify_front(
    folder: StudyFolder,
    task: TrialTask,
    data: Data,
    objectives: Sequence[str],
    *,
    cpus: int,
    gpus: float,
    report: Callable[[str], None] = log.info,
    recovered: bool = False,
) -> dict[int, str]:
    """Measure on the held-out images what has not been measured there yet.

    Args:
        cpus, gpus: of one task.
        report: called with a line per step.
        recovered: certify the front of the recovered trials, after the study's own.

    Returns the trials that could not be measured, with the reason; the next call retries them.
    Raises what decoding raises.
    """
    results = folder.recovery.results() if recovered else folder.trials.all()
    members = members_of(results, objectives)
    if not members:
        return {}
    if recovered and not any(r.is_reference for r in folder.certification().results()):
        report("the recovered front is not certified: the study's dense model is not certified")
        return {}
    held_out = data.split("held-out")
    if not len(held_out):
        report("the front is not certified: there are no held-out images")
        return {}
    if not _record_members(folder, members, held_out, data.classes, recovered):
        report(
            f"the front is not certified: earlier certificates of study {folder.name!r} are of "
            "other held-out images, or of another decoder version; remove its folder `certified` "
            "to measure all of them again"
        )
        return {}
    certified = {r.trial for r in folder.certification(recovered).results()}
    pending = [r for r in members if r.trial not in certified]
    if not pending:
        return {}
    report(f"certifying {len(pending)} trials on {len(held_out)} held-out images")
    failed = _measure(_held_out_task(task, held_out), pending, recovered, cpus, gpus)
    for trial, reason in sorted(failed.items()):
        report(f"trial {trial} is not certified: {reason}")
    return failed


def _held_out_task(task: TrialTask, held_out: Split) -> TrialTask:
    """The task on the held-out images; costs are known, only accuracy is measured."""
    return replace(
        task,
        images=replace(task.images, search=held_out),
        latency=replace(task.latency, per_trial=False),
    )


def _measure(
    task: TrialTask, pending: Sequence[TrialResult], recovered: bool, cpus: int, gpus: float
) -> dict[int, str]:
    """Measure trials, as many at a time as fit; returns the reasons of those that fail."""
    certify = _certify_recovered if recovered else _certify
    return {
        done.item.trial: done.reason
        for done in run_for_each(certify, task, pending, cpus=cpus, gpus=gpus)
        if done.reason
    }


def _record_members(
    folder: StudyFolder,
    members: Sequence[TrialResult],
    held_out: Split,
    classes: Sequence[str],
    recovered: bool,
) -> bool:
    """Add new members to the record of what is certified, before any of them is measured: the error
    that each interval may have depends on it. False if the record is of other images.
    """
    record = folder.certification(recovered).read()
    if record is None:
        record = CertificationRecord(held_out.fingerprint, tuple(classes), held_out.labels)
    if record.fingerprint != held_out.fingerprint:
        return False
    known = {trial for trials in record.rounds for trial in trials}
    if new := tuple(r.trial for r in members if r.trial not in known):
        record = replace(record, rounds=(*record.rounds, new))
        folder.certification(recovered).write(record)
    return True


def _certify(task: TrialTask, result: TrialResult, recovered: bool = False) -> None:
    """On a worker: rebuild the candidate as it was resolved, measure it and write the result."""
    worker = Worker.open(task)
    model = worker.build(result.rebuilt_from.to_recipe())
    split = Provenance(split=task.images.search.name)
    measured = measure_model(worker, result.trial, model, split)
    task.study.folder.certification(recovered).write_result(replace(measured, recipe=result.recipe))


def _certify_recovered(task: TrialTask, result: TrialResult) -> None:
    """On a worker, for a recovered trial."""
    _certify(task, result, recovered=True)
