"""Whether every node of a cluster can take part in a study.

A study's results, weights and images have to be the same from everywhere. That is looked at before
anything is measured, on every node, so that a search does not end an hour later with one node's
results missing or measured on other images; a node that joins later looks for itself
(`Worker.open`).
"""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vitpareto.methods import Code
from vitpareto.search import code_identity
from vitpareto.search.data.datasets import Data
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import delete_file, write_atomic
from vitpareto.search.files.object_store import store_folder
from vitpareto.search.files.write_through import refresh
from vitpareto.search.trials.nodes import alive, split_here
from vitpareto.search.trials.trial import Task

#: whose versions decide numbers: the same on every node
SAME = ("torch", "timm", "torchvision", "pillow", "onnxruntime", "optuna", "vitpareto")


def check_code() -> None:
    """Have a worker on every node say which code it would run.

    The question is sent by value: a node with another version could not answer one that names a
    function of this version.

    Raises:
        UserError: a node has other code than this process, or none; names the nodes.
    """
    ray.cloudpickle.register_pickle_by_value(code_identity)
    expected, nodes = code_identity.code_fingerprint(), alive()
    try:
        asked = ray.remote(code_identity.describe_code)
        answers = [
            asked.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            ).remote()
            for node in nodes
        ]
        found = dict(zip((n.address for n in nodes), ray.get(answers), strict=True))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(code_identity)
    wrong = {at: (code, folder) for at, (code, folder) in found.items() if code != expected}
    if wrong:
        listed = "; ".join(f"{at}: {where} ({code})" for at, (code, where) in wrong.items())
        raise UserError(
            f"workers must run the driver's code (fingerprint {expected}); other code is on "
            f"{listed}. Install the same vitpareto on every node, or submit the search as a job",
            Code.MISMATCH,
            expected=expected,
            nodes=sorted(wrong),
        )


def check_nodes(task: Task, data: Data, say: Callable[[str], None]) -> None:
    """Have every node look at the study's folder, its versions and its images.

    With one node there is nothing that could differ. UserError, naming the nodes and what would
    help, where one cannot take part.
    """
    nodes = alive()
    if len(nodes) < 2:
        return
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
    unseen: list[str] = []
    try:
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            node = waiting.pop(ready)
            name = f"{node.address} ({node.id[:8]})"
            try:
                why: str = ray.get(ready)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                raise UserError(f"node {name} cannot take part: {cause}") from error
            if why == _UNSEEN or not refresh(_reply(probe, node.id)):
                unseen.append(name)
            elif why:
                raise UserError(f"node {name} cannot take part: {why}")
    finally:
        for left in study.glob(f"{probe.name}*"):
            delete_file(left)
    if unseen:
        raise UserError(
            f"the store {study.parent} is not the same folder on every node: "
            f"{', '.join(sorted(unseen))} cannot see what is written there. Name a folder that all "
            "nodes mount (--store /shared/studies), or object storage (--store s3://BUCKET/studies)"
        )


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


def _look(shared: tuple[Task, Data], probe: Path, versions: Mapping[str, str]) -> str:
    """On a node: why it cannot take part, "" where it can."""
    task, data = shared
    if task.store is not None:
        folder = store_folder(task.store) / task.study.name
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / probe.name
    here = versions_here()
    differ = [f"{p} is {here[p]}, the driver's {v}" for p, v in versions.items() if here[p] != v]
    if differ:
        return "; ".join(differ) + ": give all nodes one image"
    if not refresh(probe) or probe.read_text(encoding="utf-8") != probe.name:
        return _UNSEEN
    write_atomic(_reply(probe, ray.get_runtime_context().get_node_id()), "")
    try:
        for split in task.splits:
            split_here(split, data)
    except UserError as error:
        return str(error)
    return ""
