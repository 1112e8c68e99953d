"""The nodes of a cluster: what each offers, and which of them a job's device names mean.

Does not import ray: `search.trials.ray_cluster` lists the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError

#: prefix of an accelerator's type among a node's Ray resources, and in a job
RAY_ACCELERATOR, JOB_ACCELERATOR = "accelerator_type:", "accelerator:"
#: resources that Ray gives to every node
STANDARD = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Node:
    """A live node: Ray's id and address of it, and its Ray resources."""

    id: str
    address: str
    resources: Mapping[str, float]

    @property
    def cpus(self) -> int:
        return int(self.resources.get("CPU", 0))

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))

    def __str__(self) -> str:
        if not self.gpus:
            return f"{self.address}: {self.cpus} CPUs, no GPU"
        types = [
            name.removeprefix(RAY_ACCELERATOR)
            for name in self.resources
            if name.startswith(RAY_ACCELERATOR)
        ]
        gpu_type = f" ({types[0]})" if types else ""
        return f"{self.address}: {self.cpus} CPUs, {self.gpus} GPUs{gpu_type}"


@dataclass(frozen=True)
class LatencySlot:
    """An exclusive slot for latency measurements: a whole GPU, or all CPUs of a node without one.

    resource: Ray's name of the target, of which the slot takes `amount`.
    """

    resource: str
    amount: float
    cpus: float
    gpus: float = 0.0


def most_cpus(nodes: Sequence[Node]) -> int:
    """CPUs of the largest node; no task can ask for more. 0 without nodes."""
    return max((n.cpus for n in nodes), default=0)


def cluster_device(device: str, nodes: Sequence[Node]) -> str:
    """The device that trials on these nodes use; the driver's own node may lack it.

    Raises UserError if CUDA is requested and no node has a GPU.
    """
    gpus = sum(n.gpus for n in nodes)
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device.startswith("cuda") and not gpus:
        listed = "; ".join(str(n) for n in nodes)
        raise UserError(
            f"device {device!r} requires a node with a GPU, and no node has one (nodes: {listed})",
            Code.UNAVAILABLE,
            key="device",
            got=device,
            nodes=[str(n) for n in nodes],
        )
    return device


def latency_slot(target: str, nodes: Sequence[Node]) -> LatencySlot:
    """The slot in which a job's `latency_on` target measures latencies.

    target: `accelerator:H200`, or the name of a custom Ray resource. Raises UserError if no node
    has it.
    """
    resource = target
    if target.startswith(JOB_ACCELERATOR):
        resource = RAY_ACCELERATOR + target.removeprefix(JOB_ACCELERATOR)
    candidates = [n for n in nodes if n.resources.get(resource)]
    if not candidates:
        accepted = _targets(nodes)
        raise UserError(
            f"latency_on must be an accelerator or a custom resource of a node (got {target!r}); "
            f"known: {', '.join(accepted) or 'none'}",
            Code.NOT_FOUND,
            key="latency_on",
            got=target,
            accepted=accepted,
        )
    node = candidates[0]
    is_type = resource.startswith(RAY_ACCELERATOR)
    amount = 0.001 if is_type else min(1.0, node.resources[resource])
    if node.gpus:
        return LatencySlot(resource, amount, cpus=1.0, gpus=1.0)
    return LatencySlot(resource, amount, cpus=float(node.cpus))


def _targets(nodes: Sequence[Node]) -> list[str]:
    """The accelerators and custom resources of the nodes, as a job names them."""
    names = {r.replace(RAY_ACCELERATOR, JOB_ACCELERATOR) for n in nodes for r in n.resources}
    return sorted(r for r in names if r not in STANDARD and not r.startswith("node:"))
