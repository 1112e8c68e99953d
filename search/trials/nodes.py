"""The nodes of the Ray that is there: what each offers, and a study's images on this one."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from vitpareto.search.data.datasets import Data
from vitpareto.search.data.decoding import Split, is_whole
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.measure.cost import target_of

#: what Ray calls a kind of accelerator among a node's resources
KIND = "accelerator_type:"


@dataclass(frozen=True)
class Node:
    """One that is alive: Ray's id and address of it, and its resources."""

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
        kinds = [name.removeprefix(KIND) for name in self.resources if name.startswith(KIND)]
        gpus = f", {self.gpus} GPUs{f' ({kinds[0]})' if kinds else ''}" if self.gpus else ", no GPU"
        return f"{self.address}: {self.cpus} CPUs{gpus}"


def alive() -> list[Node]:
    """The nodes of the Ray that is there."""
    return [
        Node(found["NodeID"], found["NodeManagerAddress"], found["Resources"])
        for found in ray.nodes()
        if found["Alive"]
    ]


def largest(nodes: Sequence[Node] | None = None) -> int:
    """The CPUs of the node that has most: no task can ask for more."""
    return max((n.cpus for n in (alive() if nodes is None else nodes)), default=0)


def cluster_device(asked: str, nodes: Sequence[Node]) -> str:
    """The device that a cluster's trials run on; the driver may be on a node without it.

    UserError, with what is there, where GPUs are asked for and no node has one.
    """
    gpus = sum(n.gpus for n in nodes)
    if asked == "auto":
        return "cuda" if gpus else "cpu"
    if asked.startswith("cuda") and not gpus:
        there = "; ".join(str(n) for n in nodes)
        raise UserError(
            f"the job's device is {asked}, and no node of the cluster has a GPU. There are {there}"
        )
    return asked


def check_target(target: str, nodes: Sequence[Node]) -> dict[str, float]:
    """Ray's resources of one slot of the target where latencies are measured: `accelerator:H200`,
    or a resource that the cluster's owner gave to nodes, by its name.

    UserError, with what is there, where no node has it.
    """
    resource = target
    if target.startswith("accelerator:"):
        resource = KIND + target.removeprefix("accelerator:")
    having = [n for n in nodes if n.resources.get(resource)]
    if not having:
        own = ("CPU", "GPU", "memory", "object_store_memory")
        named = {r.replace(KIND, "accelerator:") for n in nodes for r in n.resources}
        said = sorted(r for r in named if r not in own and not r.startswith("node:"))
        raise UserError(
            f"latency_on is {target!r}, and no node has it: there is "
            + (", ".join(said) if said else "no accelerator and no resource of the owner's")
        )
    node = having[0]
    # a slot is exclusive: a whole GPU, or all CPUs of a node without one
    slot = {resource: 0.001 if resource.startswith(KIND) else min(1.0, node.resources[resource])}
    if node.gpus:
        return {**slot, "GPU": 1.0, "CPU": 1.0}
    return {**slot, "CPU": float(node.cpus)}


def target_there(batch: int, dtype: str, device: str) -> dict[str, Any]:
    """What a latency holds for (`cost.target_of`) where the trials run, be it another node."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return _target(batch, dtype, device)
    found: dict[str, Any] = ray.get(
        ray.remote(_target).options(num_cpus=0, num_gpus=1).remote(batch, dtype, "cuda")
    )
    return found


def _target(batch: int, dtype: str, device: str) -> dict[str, Any]:
    return target_of(torch.empty(batch, dtype=DTYPES[dtype], device=device))


def split_here(split: Split, data: Data) -> Split:
    """The split as this node has it decoded, once a node: in the folder that its environment names
    (VITPARETO_CACHE), else where the driver has it, which may be seen from here.

    UserError where the images are not the same here.
    """
    cache = os.environ.get("VITPARETO_CACHE")
    if cache:
        split = replace(split, folder=Path(cache).absolute() / "decoded" / split.folder.name)
    if is_whole(split):
        return split
    own = data.at(Path(cache) if cache else None).split(split.name)
    if own.fingerprint != split.fingerprint:
        lacking = sorted(set(own.corrupt) - set(split.corrupt))[:3]
        why = f"; unreadable here: {', '.join(lacking)}" if lacking else ""
        raise UserError(
            f"the images of {data.spec} ({split.name}) on {socket.gethostname()} are not those of "
            f"the study: {len(own)} with fingerprint {own.fingerprint[:12]}, the study's "
            f"{split.fingerprint[:12]}{why}"
        )
    return own
