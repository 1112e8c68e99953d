"""Whether every node of a cluster can take part in a study.

A study's results, weights and images have to be the same from everywhere. That is looked at before
anything is measured, on every node, so that a search does not end an hour later with one node's
results missing or measured on other images; a node that joins later looks for itself
(`Workplace.open`).
"""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.cost import device_name
from search.datasets import Data
from search.durable import forget, latest, write_atomic
from search.errors import UserError
from search.nodes import alive, split_here
from search.remote import store_folder
from search.trial import Task

#: whose versions decide numbers: the same on every node
SAME = ("torch", "timm", "torchvision", "pillow", "onnxruntime", "optuna", "vitpareto")


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
