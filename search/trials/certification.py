"""Certification: the front measured once more at the end, on images that no decision was made by.

A Ray task a recipe, each durable by itself as it ends: what is there is never measured again, and a
trial that enters the front of a continued study is added. What the numbers say is worked out when
they are read (`search.study.certificates`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray

from vitpareto.methods import Recipe
from vitpareto.search.data.datasets import Data
from vitpareto.search.study.certificates import Record
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, reference_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.verdict import controls_of, verdict
from vitpareto.search.trials.trial import Task, Worker, measure_built

log = logging.getLogger("vitpareto")


def members_of(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[TrialResult]:
    """What is certified, by trial number: the front, the dense model, the front of the controls,
    and the two that the verdict compares.
    """
    axes = objectives_named(objectives)
    said = verdict(results, objectives)
    pair = () if said is None else (said.method, said.control)
    wanted = [*front_of(results, axes), *front_of(controls_of(results), axes)]
    wanted += [r for r in (reference_of(results), *pair) if r is not None]
    return [r for _, r in sorted({r.trial: r for r in wanted}.items())]


def certify_front(
    folder: StudyFolder,
    task: Task,
    data: Data,
    objectives: Sequence[str],
    *,
    cpus: int,
    gpus: float,
    say: Callable[[str], None] = log.info,
    recovered: bool = False,
) -> dict[int, str]:
    """Measure on the held-out images, on the Ray that is there, what is not measured there yet.

    cpus, gpus: of one task. `say` hears what is done, a line each. recovered: of the study's
    recovered trials, those on their front; only after the study's own.

    Returns the trials that could not be measured and why; the others are kept, and the next call
    tries those again. Raises what decoding raises.
    """
    results = folder.recovered() if recovered else folder.results()
    members = members_of(results, objectives)
    if not members:
        return {}
    if recovered and not any(r.is_reference for r in folder.certified()):
        say("the recovered front is not certified: the study's dense model is not")
        return {}
    held_out = data.split("held-out")
    if not len(held_out):
        say("the front is not certified: there are no held-out images")
        return {}
    plain = folder.certification(recovered)
    record = Record(held_out.fingerprint, data.classes, held_out.labels)
    if plain is not None:
        record = Record.of(plain)
    if record.fingerprint != held_out.fingerprint:
        say(
            f"the front is not certified: what is certified of {folder.name} saw other held-out "
            "images (or decoded by another version), and numbers are not mixed; without its folder "
            "`certified` all of it is measured anew"
        )
        return {}
    known = {trial for trials in record.rounds for trial in trials}
    if new := tuple(r.trial for r in members if r.trial not in known):
        # before any is measured: what each interval has of the error is settled by then
        record = replace(record, rounds=(*record.rounds, new))
        folder.write_certification(record.plain(), recovered)
    there = {r.trial for r in folder.certified(recovered)}
    todo = [r for r in members if r.trial not in there]
    if not todo:
        return {}
    say(f"certifying {len(todo)} trials on {len(held_out)} held-out images")
    # costs are known: only the images are others
    task = replace(task, search=held_out, times_trials=False)
    failed = _run(task, todo, recovered, cpus, gpus)
    for trial, why in sorted(failed.items()):
        say(f"trial {trial} is not certified: {why}")
    return failed


def _run(
    task: Task, todo: Sequence[TrialResult], recovered: bool, cpus: int, gpus: float
) -> dict[int, str]:
    """All of them, as many at a time as there is room for; the reasons of those that failed."""
    remote = ray.remote(_certify).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    shared = ray.put(task)
    waiting = {remote.remote(shared, one, recovered): one.trial for one in todo}
    failed = {}
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
        trial = waiting.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            failed[trial] = f"{type(cause).__name__}: {cause}"
    return failed


def _certify(task: Task, result: TrialResult, recovered: bool) -> None:
    """On a worker: rebuild the candidate as it was resolved, measure it, make that durable."""
    place = Worker.open(task)
    model = place.build(Recipe.from_dict(result.resolved or result.recipe))
    held = measure_built(place, result.trial, model, {"split": task.search.name})
    task.study.write_certified(replace(held, recipe=result.recipe), recovered)
