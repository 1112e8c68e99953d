"""Start a private Ray on this machine, or join a Ray cluster; leave it when the block ends.

`search.trials.run_study` runs a search on it. Import this module or `search.trials` before ray:
they set variables that Ray reads when it is imported (`search.trials.ray_environment`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# before ray: its package sets variables that Ray reads when it is imported
from vitpareto.search.trials.nodes import Node  # isort: skip

import ray

from vitpareto.clusters.ray_internals import LOOPBACK_ARGUMENTS
from vitpareto.methods import Code
from vitpareto.search.code_identity import PACKAGE, link_code
from vitpareto.search.errors import UserError
from vitpareto.search.trials.ray_cluster import live_nodes

#: seconds within which a head must answer
ANSWER_S = 10.0

log = logging.getLogger("vitpareto")


@dataclass(frozen=True)
class ClusterCapacity:
    """What a cluster offers, in whole CPUs and GPUs.

    `nodes` are those of a cluster that was joined; empty for a Ray on this machine.
    """

    cpus: int
    gpus: int
    nodes: tuple[Node, ...] = ()


@contextlib.contextmanager
def local_cluster(workers: int | None = None) -> Iterator[ClusterCapacity]:
    """Start a private Ray on this machine and shut it down when the block ends.

    If this process has already joined a Ray, that one is used and not shut down.

    Args:
        workers: offer at least this many CPUs, even if the machine has fewer.
    """
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(_started(max(os.cpu_count() or 1, workers or 1)))
        resources = ray.cluster_resources()
        yield ClusterCapacity(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


@contextlib.contextmanager
def _started(cpus: int) -> Iterator[None]:
    with _code_folder() as folder:
        with warnings.catch_warnings(), _worker_path(folder):
            # Ray forks helper processes while threads run, which Python warns about
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            ray.init(
                address="local",  # a new one even if RAY_ADDRESS names another
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                **LOOPBACK_ARGUMENTS,
            )
        try:
            address = ray.util.get_node_ip_address()
            if address != "127.0.0.1":
                log.warning(
                    "Ray listens on %s: import vitpareto.clusters.connect before ray for loopback",
                    address,
                )
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _code_folder() -> Iterator[Path]:
    """A temporary folder that holds the package of this process, by links, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="vitpareto-code-") as name:
        link_code(Path(name) / PACKAGE)
        yield Path(name)


@contextlib.contextmanager
def _worker_path(folder: Path) -> Iterator[None]:
    """While Ray is started or joined, make `folder` the first entry of the workers' `sys.path`.

    By default Ray puts the driver's working directory and the folder of its script there. Modules
    in these folders could then replace those that the driver runs.
    """
    before, script = os.getcwd(), sys.argv[0] if sys.argv else ""
    os.chdir(folder)
    sys.argv[:1] = [str(folder / "driver")]
    try:
        yield
    finally:
        sys.argv[:1] = [script]
        os.chdir(before)


@contextlib.contextmanager
def joined_cluster(address: str) -> Iterator[ClusterCapacity]:
    """Join a Ray cluster and leave it when the block ends, with everything that runs there.

    Args:
        address: HOST:PORT of a head, or `auto` on one of its nodes.

    Raises:
        UserError: no cluster answers, the token is refused, or Ray's or Python's version differs.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"--address must be HOST:PORT of a head, or auto on one of its nodes (got {address}, "
            f"which takes jobs: vitpareto submit --address {address})",
            Code.WRONG_TYPE,
            key="address",
            got=address,
        )
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _check_answer(address)
    with _code_folder() as folder:
        try:
            with warnings.catch_warnings(), _silent_stderr(), _worker_path(folder):
                warnings.simplefilter("ignore", ResourceWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=True,
                    logging_level=logging.ERROR,
                )
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"the Ray cluster at {address} cannot be joined: {_reason(error)}",
                Code.UNAVAILABLE,
                address=address,
            ) from error
        try:
            resources = ray.cluster_resources()
            cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
            yield ClusterCapacity(cpus, gpus, tuple(live_nodes()))
        finally:
            ray.shutdown()


def _check_answer(address: str) -> None:
    """Raise UserError if nothing accepts connections at HOST:PORT; Ray would retry for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); --address must be HOST:PORT of a "
            "head, or auto on one of its nodes",
            Code.UNAVAILABLE,
            address=address,
        ) from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's own threads write to stderr: they repeat the error every second."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _reason(error: BaseException) -> str:
    """What Ray's error means, and the fix."""
    messages: list[str] = []
    current: BaseException | None = error
    while current is not None:
        messages.append(str(current))
        current = current.__cause__ or current.__context__
    text = " ".join(" ".join(messages).split())
    if "uthentication" in text or "auth token" in text:
        return (
            "the token must be the cluster's; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to "
            "the file that holds it"
        )
    if "Version mismatch" in text:
        return f"{text}; give driver and nodes the same image"
    return text[:400]
