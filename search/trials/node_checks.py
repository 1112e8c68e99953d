"""Check that every node of a cluster can take part in a study.

A study's results, weights and images must be the same from every node. They are checked before
anything is measured, so that a search does not fail an hour later with one node's results missing
or measured on other images. A node that joins later checks itself (`Worker.open`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search import code_identity
from vitpareto.search.data.datasets import Data
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import delete_file, write_atomic
from vitpareto.search.files.write_through import refresh
from vitpareto.search.trials.code_check import CODE
from vitpareto.search.trials.local_images import local_split
from vitpareto.search.trials.nodes import Node
from vitpareto.search.trials.ray_cluster import (
    Finished,
    live_nodes,
    own_node_id,
    pickled_by_value,
    run_on_nodes,
)
from vitpareto.search.trials.task import TrialTask
from vitpareto.search.versions import package_versions

#: packages whose versions affect results: the same on every node
SAME_VERSIONS = ("torch", "timm", "torchvision", "pillow", "onnxruntime", "optuna", "vitpareto")


def check_code() -> None:
    """Check that a worker on every node would run the driver's code.

    Raises UserError that names the nodes with other code, or with none.
    """
    expected, found = CODE, {}
    # by value: a node with another version has no such function of this version
    with pickled_by_value(code_identity):
        for done in run_on_nodes(code_identity.describe_code, live_nodes()):
            found[done.item.address] = done.result()
    wrong = {at: (code, folder) for at, (code, folder) in found.items() if code != expected}
    if wrong:
        listed = "; ".join(f"{at}: {where} ({code})" for at, (code, where) in wrong.items())
        raise UserError(
            f"workers must run the driver's code (fingerprint {expected}); other code is on "
            f"{listed}. Install the same vitpareto on every node, or submit the search as a job; "
            "restart this process if its files have changed",
            Code.MISMATCH,
            expected=expected,
            nodes=sorted(wrong),
        )


@dataclass(frozen=True)
class _Expected:
    """What every node is compared with. probe: a file that the driver wrote into the study."""

    task: TrialTask
    data: Data
    probe: Path
    versions: dict[str, str]


@dataclass(frozen=True)
class _Answer:
    """What a node found. reason: why it cannot take part, "" if it can."""

    sees_store: bool
    reason: str = ""


def check_nodes(task: TrialTask, data: Data, report: Callable[[str], None]) -> None:
    """Check the study's folder, the package versions and the images on every node.

    A cluster of one node passes: nothing can differ. Raises UserError that names the nodes that
    cannot take part, and the fix.
    """
    nodes = live_nodes()
    if len(nodes) < 2:
        return
    report(f"{len(nodes)} nodes: checking store, versions and images on each")
    folder = task.study.folder.folder
    probe = folder / f".probe-{uuid.uuid4().hex}"
    write_atomic(probe, probe.name)
    expected = _Expected(task, data, probe, package_versions(*SAME_VERSIONS))
    cuda = task.execution.device.startswith("cuda")
    try:
        unseen = [
            _label(done.item)
            for done in run_on_nodes(_check_node, nodes, expected, gpus=0.01 if cuda else 0.0)
            if not _shares_store(done, probe)
        ]
    finally:
        for left in folder.glob(f"{probe.name}*"):
            delete_file(left)
    if unseen:
        _refuse_store(folder.parent, sorted(unseen))


def _shares_store(done: Finished[Node, _Answer], probe: Path) -> bool:
    """Whether node and driver see each other's files. Raises UserError for any other difference."""
    name = _label(done.item)
    reason = str(done.error) if done.error is not None else done.result().reason
    if reason:
        details = getattr(done.error, "details", {})
        raise UserError(
            f"node {name} cannot take part: {reason}",
            Code.MISMATCH,
            **{**details, "node": name},
        ) from done.error
    return done.result().sees_store and refresh(_reply(probe, done.item.id))


def _refuse_store(store: Path, nodes: Sequence[str]) -> None:
    raise UserError(
        f"the store must be the same folder on every node (got {store}, which is another folder on "
        f"{', '.join(nodes)}); give a folder that all nodes mount (--store /shared/studies), or "
        "object storage (--store s3://BUCKET/studies)",
        Code.MISMATCH,
        key="store",
        got=str(store),
        nodes=list(nodes),
    )


def _label(node: Node) -> str:
    return f"{node.address} ({node.id[:8]})"


def _reply(probe: Path, node_id: str) -> Path:
    """The file with which a node answers the driver's probe."""
    return probe.with_name(f"{probe.name}.{node_id}")


def _check_node(expected: _Expected) -> _Answer:
    """On the node."""
    folder = expected.task.study.on_this_node().folder.folder
    probe = folder / expected.probe.name
    here = package_versions(*SAME_VERSIONS)
    differing = [
        f"{package} is {here[package]}, the driver's is {version}"
        for package, version in expected.versions.items()
        if here[package] != version
    ]
    if differing:
        return _Answer(True, "; ".join(differing) + "; give all nodes the same image")
    if not refresh(probe) or probe.read_text(encoding="utf-8") != probe.name:
        return _Answer(False)
    write_atomic(_reply(probe, own_node_id()), "")
    for split in expected.task.splits:
        local_split(split, expected.data)
    return _Answer(True)
