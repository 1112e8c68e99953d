"""Latency on the device that the job names: one actor in a slot that it shares with nothing.

Where workers are of different kinds, accuracy may be measured on any of them; a latency holds for
one device alone. The actor takes its slot before the first trial and keeps it until the study is
done: trials, which hold their own slots, then never wait for one that others of them fill.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from vitpareto.methods import Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.measure.latency import Latency
from vitpareto.search.trials.nodes import alive, check_target
from vitpareto.search.trials.trial import Task, Worker

#: seconds in which a slot has to be free: the study's own trials do not run yet
SLOT_S = 600.0


class Timer:
    """The actor: recipes in, their latencies beside the dense model out, one after the other."""

    def __init__(self, task: Task) -> None:
        self.place = Worker.open(task)

    def device(self) -> str:
        """What it measures on."""
        return str(self.place.task.provenance["device"])

    def timed(self, recipe: dict[str, Any]) -> Latency:
        """A resolved recipe's."""
        return self.place.timed(self.place.build(Recipe.from_dict(recipe)))

    def timed_all(self, recipes: Sequence[tuple[int, dict[str, Any]]]) -> dict[int, Latency]:
        """By trial."""
        return {trial: self.timed(recipe) for trial, recipe in recipes}


@contextlib.contextmanager
def timing_on(target: str, task: Task, say: Callable[[str], None]) -> Iterator[Any]:
    """The actor, in an exclusive slot of this target (`nodes.check_target`); gone with the block.

    UserError where there is none, or none falls free.
    """
    slot = check_target(target, alive())
    cpus, gpus = slot.pop("CPU"), slot.pop("GPU", 0.0)
    task = dataclasses.replace(task, threads=None, timer=None, device="cuda" if gpus else "cpu")
    actor: Any = (
        ray.remote(Timer).options(num_cpus=cpus, num_gpus=gpus, resources=slot).remote(task)
    )
    try:
        try:
            device = ray.get(actor.device.remote(), timeout=SLOT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"latency_on is {target!r}, and no slot of it fell free in {SLOT_S:.0f} s: other "
                "work of the cluster fills them"
            ) from error
        say(f"latencies are measured on {device}, in a slot of {target} by itself")
        yield actor
    finally:
        ray.kill(actor)
