"""Latency of the front's members at the end of a study, measured alone on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitpareto.methods import Recipe
from vitpareto.search.measure.latency import Latency
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.trials.ray_cluster import live_nodes, run_on_whole_node
from vitpareto.search.trials.task import LatencyTimer, TrialTask
from vitpareto.search.trials.worker import Worker

#: a trial's number and its resolved recipe
Member = tuple[int, Recipe]


def measure_front_latency(
    folder: StudyFolder,
    task: TrialTask,
    objectives: Sequence[str],
    timer: LatencyTimer | None = None,
) -> dict[int, Latency]:
    """Latencies of all front members beside the dense model, by trial; known ones are kept.

    timer: measures on the job's `latency_on` target; None means a whole node of those that trials
    run on.
    """
    known = folder.latencies.read()
    front = front_of(folder.trials.all(), [OBJECTIVES[o] for o in objectives])
    members = [
        (r.trial, r.rebuilt_from.to_recipe())
        for r in front
        if r.trial not in known and r.latency is None
    ]
    if not members:
        return known
    if timer is not None:
        measured = timer.measure_all(members)
    else:
        alone = replace(
            task,
            execution=replace(task.execution, threads=None),
            latency=replace(task.latency, timer=None),
        )
        measured = run_on_whole_node(
            _measure, alone, members, device=task.execution.device, nodes=live_nodes()
        )
    known = {**known, **measured}
    folder.latencies.write(known)
    return known


def _measure(task: TrialTask, members: Sequence[Member]) -> dict[int, Latency]:
    """On the worker."""
    worker = Worker.open(task)
    return {trial: worker.measure_latency(worker.build(recipe)) for trial, recipe in members}
