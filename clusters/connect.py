"""The Ray that a search runs on: this machine as a cluster of its own, or one that is there.

Knows how Ray is started, joined and left; what runs on it is `search.trials.run_study`'s business.
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

#: read by Ray when it is imported: quiet, no usage reports, and no result files of its own
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# its own record of the run is never read, and grows with every trial
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray replaces a loopback address by a reachable one, unless it may not form clusters across
# machines: this is its switch for that, whatever its name says
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray

from vitpareto.search.code_identity import PACKAGE, link_code
from vitpareto.search.errors import UserError
from vitpareto.search.trials.nodes import Node
from vitpareto.search.trials.ray_cluster import live_nodes

#: seconds in which a head has to answer
ANSWER_S = 10.0

log = logging.getLogger("vitpareto")


@dataclass(frozen=True)
class ClusterCapacity:
    """What a cluster offers, in whole CPUs and GPUs. nodes: of one that was there; none: it is this
    machine's own.
    """

    cpus: int
    gpus: int
    nodes: tuple[Node, ...] = ()


@contextlib.contextmanager
def local_cluster(workers: int | None = None) -> Iterator[ClusterCapacity]:
    """Start a private Ray on this machine and shut it down when the block ends.

    A Ray that this process has joined already is used and left as it is.

    Args:
        workers: the number of CPUs to offer at least, also on a smaller machine.
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
            # Ray forks helpers while threads run; it did so before Python began to warn
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            ray.init(
                address="local",  # a new one, also where RAY_ADDRESS names another
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
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

    Ray puts the driver's working directory and the folder of its script there. Modules of the same
    names in these folders would replace those that the driver runs.
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
    """The Ray at HOST:PORT, or the one that this process is part of (`auto`); left when the block
    ends, with everything that runs there.

    UserError, saying what would help: nobody answers, the token is another, Ray or Python differ.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is where jobs are submitted (vitpareto submit --address {address}); a "
            "search joins a cluster from one of its nodes, with --address auto"
        )
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    host, _, port = address.rpartition(":")
    if address != "auto":
        try:
            with socket.create_connection((host, int(port)), timeout=ANSWER_S):
                pass
        except (OSError, ValueError) as error:
            raise UserError(
                f"no Ray answers at {address} ({error}): accepted is HOST:PORT of a head, or auto "
                "on one of its nodes"
            ) from error
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
            raise UserError(f"the Ray at {address} cannot be joined: {_reason(error)}") from error
        try:
            resources = ray.cluster_resources()
            cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
            yield ClusterCapacity(cpus, gpus, tuple(live_nodes()))
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """What Ray's own threads write there goes nowhere: they repeat what is wrong every second."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _reason(error: BaseException) -> str:
    """What Ray means, and what would help."""
    said: list[str] = []
    at: BaseException | None = error
    while at is not None:
        said.append(str(at))
        at = at.__cause__ or at.__context__
    text = " ".join(said)
    if "uthentication" in text or "auth token" in text:
        return (
            "its token is another one, or none is given: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file that holds the cluster's"
        )
    if "Version mismatch" in text:
        return " ".join(text.split()) + ": give driver and nodes one image"
    return " ".join(text.split())[:400]
