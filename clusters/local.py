"""This machine as a Ray cluster: started for one search and stopped after it, on loopback only.

Knows how Ray is started and stopped; what runs on it is `search.run`'s business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

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

log = logging.getLogger("vitpareto")


@dataclass(frozen=True)
class Room:
    """What a cluster offers, in whole CPUs and GPUs."""

    cpus: int
    gpus: int


@contextlib.contextmanager
def local_cluster(workers: int | None = None) -> Iterator[Room]:
    """A private Ray on this machine, gone when the block ends; a running one is joined and left.

    workers: at least so many CPUs are promised, also on a smaller machine.
    """
    joined = ray.is_initialized()
    if not joined:
        cpus = max(os.cpu_count() or 1, workers or 1)
        with warnings.catch_warnings():
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
        where = ray.util.get_node_ip_address()
        if where != "127.0.0.1":
            log.warning("Ray listens on %s: import clusters.local before ray for loopback", where)
    try:
        resources = ray.cluster_resources()
        yield Room(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
    finally:
        if not joined:
            ray.shutdown()
