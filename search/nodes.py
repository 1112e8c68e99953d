"""The nodes of the Ray that is there: what each offers, and whether each can take part in a study.

A study's results, weights and images have to be the same from everywhere. That is looked at before
anything is measured, on every node, so that a search does not end an hour later with one node's
results missing or measured on other images; a node that joins later looks for itself
(`Workplace.open`).
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.cost import device_name, target_of
from search.datasets import Data
from search.decode import Split, is_whole
from search.durable import forget, latest, there, write_atomic
from search.errors import UserError
from search.evaluate import DTYPES
from search.remote import store_folder
from search.store import StudyFolder

if TYPE_CHECKING:
    from search.trial import Task

#: whose versions decide numbers: the same on every node
SAME = ("torch", "timm", "torchvision", "pillow", "onnxruntime", "optuna", "vitpareto")
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


# ------------------------------------------------------------------------------ can it take part?


@dataclass(frozen=True)
class _Seen:
    """What a node answered: why it cannot take part ("" where it can), and its device."""

    why: str
    device: str = ""


def check_nodes(task: Task, data: Data, say: Callable[[str], None]) -> dict[str, str]:
    """Have every node look at the study's folder, its versions and its images; the name of each
    one's device, by address.

    With one node there is nothing that could differ. UserError, naming the nodes and what would
    help, where one cannot take part.
    """
    nodes = alive()
    if len(nodes) < 2:
        return {}
    study = task.study.folder
    probe = study / f".probe-{uuid.uuid4().hex}"
    write_atomic(probe, probe.name)
    versions = versions_here()
    say(f"{len(nodes)} nodes: looking for the study, the versions and the images on each")
    shared = ray.put((task, data))
    waiting = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        gpus = 0.01 if node.gpus and task.device.startswith("cuda") else 0
        remote = ray.remote(_look).options(
            num_cpus=0, num_gpus=gpus, scheduling_strategy=there, max_retries=0
        )
        waiting[remote.remote(shared, probe, versions)] = node
    devices: dict[str, str] = {}
    unseen: list[str] = []
    try:
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            node = waiting.pop(ready)
            name = f"{node.address} ({node.id[:8]})"
            try:
                seen: _Seen = ray.get(ready)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                raise UserError(f"node {name} cannot take part: {cause}") from error
            if seen.why == _UNSEEN or not latest(_reply(probe, node.id)):
                unseen.append(name)
            elif seen.why:
                raise UserError(f"node {name} cannot take part: {seen.why}")
            devices[node.address] = seen.device
    finally:
        forget(probe)
        for left in study.glob(f"{probe.name}*"):
            left.unlink(missing_ok=True)
            forget(left)
    if unseen:
        raise UserError(
            f"the store {study.parent} is not the same folder on every node: "
            f"{', '.join(sorted(unseen))} cannot see what is written there. Name a folder that all "
            "nodes mount (--store /shared/studies), or object storage (--store s3://BUCKET/studies)"
        )
    return devices


_UNSEEN = "the study's folder is another one there"


def _reply(probe: Path, node: str) -> Path:
    return probe.with_name(f"{probe.name}.{node}")


def versions_here() -> dict[str, str]:
    """Of the packages that decide numbers, in this process."""
    found = {}
    for package in SAME:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__  # with its build, which the package's version lacks
    return found


def _look(shared: tuple[Task, Data], probe: Path, versions: Mapping[str, str]) -> _Seen:
    """On a node."""
    task, data = shared
    if task.store is not None:
        folder = store_folder(task.store) / task.study.name
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / probe.name
    here = versions_here()
    differ = [f"{p} is {here[p]}, the driver's {v}" for p, v in versions.items() if here[p] != v]
    if differ:
        return _Seen("; ".join(differ) + ": give all nodes one image")
    if not latest(probe) or probe.read_text(encoding="utf-8") != probe.name:
        return _Seen(_UNSEEN)
    write_atomic(_reply(probe, ray.get_runtime_context().get_node_id()), "")
    try:
        for split in task.splits:
            split_here(split, data)
    except UserError as error:
        return _Seen(str(error))
    return _Seen("", device_name(task.device))


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


def task_here(task: Task) -> Task:
    """The task with its study and its images as they lie on this node."""
    if task.store is not None:
        study = StudyFolder(store_folder(task.store) / task.study.name)
        study.folder.mkdir(parents=True, exist_ok=True)
        there(study.weights)
        training = task.training
        if training is not None:
            training = replace(training, store=study.folder.parent)
        model = replace(task.model, weights=study.weights)
        task = replace(task, study=study, model=model, training=training)
    if task.data is None:
        return task
    moved: dict[str, Any] = {
        "search": split_here(task.search, task.data),
        "calibration": split_here(task.calibration, task.data),
    }
    if task.training is not None:
        moved["training"] = replace(
            task.training,
            split=split_here(task.training.split, task.data),
            calibration=moved["calibration"],
        )
    return replace(task, **moved)
