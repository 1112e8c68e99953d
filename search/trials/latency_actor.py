"""Latency on the device that the job names: one Ray actor in a slot that it shares with nothing.

Accuracy can be measured on any kind of worker; a latency holds for one device. The actor takes its
slot before the first trial and holds it until the study is done, so that trials, which hold slots
of their own while they wait for a latency, never wait for a slot that other trials hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import ray
from ray.actor import ActorHandle

from vitpareto.methods import Recipe
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError
from vitpareto.search.measure.latency import Latency
from vitpareto.search.trials.nodes import latency_slot
from vitpareto.search.trials.ray_cluster import live_nodes
from vitpareto.search.trials.task import LatencyTimer, TrialTask
from vitpareto.search.trials.worker import Worker

#: seconds within which the slot must become free; the study's own trials do not run yet
SLOT_S = 600.0


class LatencyActor:
    """Measures latencies in the actor's process, one after the other."""

    def __init__(self, task: TrialTask) -> None:
        self.worker = Worker.open(task)

    def device(self) -> str:
        """Name of the device that it measures on."""
        return str(self.worker.task.provenance.device)

    def measure(self, recipe: Recipe) -> Latency:
        return self.worker.measure_latency(self.worker.build(recipe))

    def measure_all(self, recipes: Sequence[tuple[int, Recipe]]) -> dict[int, Latency]:
        return {trial: self.measure(recipe) for trial, recipe in recipes}


@dataclass(frozen=True)
class RemoteTimer:
    """A `LatencyTimer` that asks a LatencyActor. actor: its handle, which Ray can pickle."""

    actor: ActorHandle[LatencyActor]

    def measure(self, recipe: Recipe) -> Latency:
        return cast(Latency, ray.get(self.actor.measure.remote(recipe)))

    def measure_all(self, recipes: Sequence[tuple[int, Recipe]]) -> dict[int, Latency]:
        return cast(dict[int, Latency], ray.get(self.actor.measure_all.remote(recipes)))


@contextlib.contextmanager
def latency_actor(
    target: str, task: TrialTask, report: Callable[[str], None]
) -> Iterator[LatencyTimer]:
    """Start the actor in a slot of the target (`nodes.latency_slot`); it ends with the block.

    Raises UserError if no node has the target, or no slot becomes free.
    """
    slot = latency_slot(target, live_nodes())
    task = replace(
        task,
        execution=replace(task.execution, device="cuda" if slot.gpus else "cpu", threads=None),
        latency=replace(task.latency, timer=None),
    )
    remote = ray.remote(LatencyActor).options(
        num_cpus=slot.cpus, num_gpus=slot.gpus, resources={slot.resource: slot.amount}
    )
    # Ray's stubs say that it may be the class itself
    actor = cast("ActorHandle[LatencyActor]", remote.remote(task))
    try:
        device = _wait_for_slot(actor, target)
        report(f"latencies are measured on {device}, in an exclusive slot of {target}")
        yield RemoteTimer(actor)
    finally:
        ray.kill(actor)


def _wait_for_slot(actor: ActorHandle[LatencyActor], target: str) -> str:
    """The actor's device, once it has started."""
    try:
        return cast(str, ray.get(actor.device.remote(), timeout=SLOT_S))
    except ray.exceptions.GetTimeoutError as error:
        raise UserError(
            f"a slot of latency_on {target!r} must become free within {SLOT_S:.0f} s; other work "
            "on the cluster holds all of them",
            Code.BUSY,
            key="latency_on",
            got=target,
        ) from error
