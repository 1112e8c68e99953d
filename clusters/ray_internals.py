"""The parts of Ray that clusters rely on beyond its documented interface, in one place.

Checked with the range of Ray in pyproject.toml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

#: loggers that report every step of an upload and of a log's end
VERBOSE_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
#: argument of `ray.init` that sets the address on which all of its servers listen
LOOPBACK_ARGUMENTS: dict[str, Any] = {"_node_ip_address": "127.0.0.1"}


def server_version(client: JobSubmissionClient) -> str:
    """Version of Ray that a job server runs. Raises what the request raises."""
    response = client._do_request("GET", "/api/version")
    response.raise_for_status()
    return str(response.json()["ray_version"])


def start_test_cluster(head: dict[str, Any]) -> Any:
    """Start a head node in this process's environment: a `ray.cluster_utils.Cluster`."""
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args=head)


def raylet_pid(node: Any) -> int:
    """Process id of a node's raylet."""
    (process,) = node.all_processes["raylet"]
    pid: int = process.process.pid
    return pid
