"""Ray tasks and nodes: the one place that starts tasks on workers and gathers them as they finish.

Retries are off: a task that fails is reported with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vitpareto.search.trials.nodes import Node, most_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finished(Generic[Item, Result]):
    """A task that ended. item: what it was started for; value: what it returned; error: what it
    raised, or Ray's error if its process died.
    """

    item: Item
    value: Result | None = None
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """The error in one line; "" if the task returned."""
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def result(self) -> Result:
        """What the task returned. Raises what it raised."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def live_nodes() -> list[Node]:
    """The live nodes of the Ray cluster that this process is connected to."""
    return [
        Node(found["NodeID"], found["NodeManagerAddress"], found["Resources"])
        for found in ray.nodes()
        if found["Alive"]
    ]


def own_node_id() -> str:
    """Ray's id of the node that this process runs on."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def run_for_each(
    function: Callable[[Any, Item], Result],
    shared: Any,
    items: Iterable[Item],
    *,
    cpus: float,
    gpus: float,
    poll_s: float | None = None,
    on_poll: Callable[[Sequence[Item]], None] | None = None,
) -> Iterator[Finished[Item, Result]]:
    """Run `function(shared, item)` as a Ray task per item, as many at a time as resources allow.

    Args:
        shared: sent to the cluster once.
        cpus, gpus: of one task.
        poll_s, on_poll: if no task finishes within `poll_s` seconds, `on_poll` is called with the
            unfinished items.
    """
    remote = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    reference = ray.put(shared)
    pending = {remote.remote(reference, item): item for item in items}
    return as_finished(pending, poll_s=poll_s, on_poll=on_poll)


def run_on_nodes(
    function: Callable[..., Result], nodes: Sequence[Node], *arguments: Any, gpus: float = 0.0
) -> Iterator[Finished[Node, Result]]:
    """Run a function once on each node, even if all CPUs of the node are in use.

    Args:
        arguments: sent to the cluster once.
        gpus: reserved for the function, on nodes that have GPUs.
    """
    remote, pending = ray.remote(function), {}
    references = [ray.put(argument) for argument in arguments]
    for node in nodes:
        placed = remote.options(
            num_cpus=0,
            num_gpus=gpus if node.gpus else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            max_retries=0,
        )
        pending[placed.remote(*references)] = node
    return as_finished(pending)


@contextlib.contextmanager
def pickled_by_value(module: ModuleType) -> Iterator[None]:
    """Send functions of a module to workers as code, not as names that a worker imports."""
    ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)


def run_once(function: Callable[..., Result], *arguments: Any, cpus: float, gpus: float) -> Result:
    """Run one Ray task and return what it returns. Raises what it raises."""
    remote = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus)
    result: Result = ray.get(remote.remote(*arguments))
    return result


def run_on_whole_node(
    function: Callable[..., Result], *arguments: Any, device: str, nodes: Sequence[Node]
) -> Result:
    """Run one Ray task alone on a node: on all its CPUs, and with a GPU if `device` is CUDA."""
    cuda = device.startswith("cuda")
    cpus = most_cpus([n for n in nodes if n.gpus or not cuda])
    return run_once(function, *arguments, cpus=cpus, gpus=1 if cuda else 0)


def as_finished(
    pending: Mapping[Any, Item],
    *,
    poll_s: float | None = None,
    on_poll: Callable[[Sequence[Item]], None] | None = None,
) -> Iterator[Finished[Item, Any]]:
    """Yield Ray tasks as they finish. pending: the item of each task, by its object reference."""
    waiting = dict(pending)
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=poll_s)
        if not ready:
            if on_poll is not None:
                on_poll(list(waiting.values()))
            continue
        item = waiting.pop(ready[0])
        yield _finished(item, ready[0])


def _finished(item: Item, reference: Any) -> Finished[Item, Any]:
    try:
        return Finished(item, value=ray.get(reference))
    except ray.exceptions.RayError as error:
        # what the task raised is in `cause`; a process that died raised nothing
        return Finished(item, error=getattr(error, "cause", None) or error)
