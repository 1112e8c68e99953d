"""A Ray cluster of several nodes on this machine, to try what runs on a cluster.

Each node has a raylet, ports and folders of its own. Everything listens on loopback and requires a
token. Call `local_nodes` in a process of its own (`vitpareto cluster local`): Ray reads its
environment when it is imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpareto.clusters.ray_internals import raylet_pid, start_test_cluster
from vitpareto.methods import Code
from vitpareto.search.errors import UserError

#: bytes of each node's object store; a study's workers share little
OBJECT_STORE_BYTES = 200_000_000
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class LocalNodes:
    """A running cluster.

    Attributes:
        address: HOST:PORT that drivers join.
        dashboard: URL to which jobs are submitted.
        token: file with the token for both.
        processes: process ids of the nodes' raylets, the head's first.
    """

    address: str
    dashboard: str
    token: Path
    processes: tuple[int, ...]

    def ended(self) -> list[int]:
        """Numbers of the nodes that have ended."""
        return [i for i, pid in enumerate(self.processes) if not _is_running(pid)]


@contextlib.contextmanager
def local_nodes(
    nodes: int, cpus: int = 1, port: int = 8265, resource: str | None = None
) -> Iterator[LocalNodes]:
    """Start a head and `nodes` - 1 further nodes; all of them end with the block.

    Args:
        cpus: per node.
        port: of the dashboard and of jobs; 0 means a free one.
        resource: a custom resource of node 1 only, like a kind of device.

    The token is that of the environment (RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN). Without one, a new
    token is written to a file that only its owner can read.

    Raises:
        UserError: a number is too small, or the port is in use.
    """
    _check_numbers(nodes, cpus, resource)
    port = port or _free_port()
    _check_port(port)
    with tempfile.TemporaryDirectory(prefix="vitpareto-") as root, _working_directory():
        folder = Path(root)
        token = _token_file(folder)
        _set_environment(folder, token)
        common = {
            "num_cpus": cpus,
            "node_ip_address": LOOPBACK,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        head = {
            "include_dashboard": True,
            "dashboard_host": LOOPBACK,
            "dashboard_port": port,
            **_enter_node_folder(folder, 0),
        }
        cluster = start_test_cluster({**common, **head})
        try:
            _write_address(folder, 0, cluster.address)
            raylets = [raylet_pid(cluster.head_node)]
            for i in range(1, nodes):
                arguments = _enter_node_folder(folder, i)
                arguments["resources"] = {resource: 1} if resource and i == 1 else {}
                _write_address(folder, i, cluster.address)
                raylets.append(raylet_pid(cluster.add_node(**common, **arguments)))
            dashboard = f"http://{LOOPBACK}:{port}"
            yield LocalNodes(cluster.address, dashboard, token, tuple(raylets))
        finally:
            cluster.shutdown()


def _check_numbers(nodes: int, cpus: int, resource: str | None) -> None:
    for key, value in (("nodes", nodes), ("cpus", cpus)):
        if value < 1:
            raise UserError(
                f"--{key} must be at least 1 (got {value})", Code.OUT_OF_RANGE, key=key, got=value
            )
    if resource is not None and nodes < 2:
        raise UserError(
            f"--nodes must be at least 2 with --resource (got {nodes})",
            Code.CONFLICT,
            key="resource",
            got=resource,
            nodes=nodes,
        )


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Return to the current directory when the block ends."""
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)


def _set_environment(folder: Path, token: Path) -> None:
    """Set the variables that Ray and its nodes read."""
    (folder / "ray").mkdir(exist_ok=True)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # despite its name: with 0 Ray keeps the loopback address that it is given
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray records its latest cluster in this folder; that of the user's clusters must not change
        "RAY_TMPDIR": str(folder),
        # jobs run `python`, which must be the one that runs this process
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.pop("RAY_ADDRESS", None)


def _enter_node_folder(root: Path, node: int) -> dict[str, Any]:
    """Create a node's folder and change into it; returns Ray's arguments for the node.

    Workers run in the directory in which their raylet was started.
    """
    folder = root / str(node)  # short: the path of a socket has 107 characters at most
    folder.mkdir()
    os.chdir(folder)
    os.environ["VITPARETO_CACHE"] = str(folder / "cache")
    return {"dashboard_agent_listen_port": _free_port(), "temp_dir": str(folder)}


def _write_address(root: Path, node: int, address: str) -> None:
    """Record the cluster in the node's folder: jobs on this node join it and no other cluster."""
    (root / str(node) / "ray_current_cluster").write_text(address)


def _token_file(folder: Path) -> Path:
    """The file with the cluster's token; created unless the environment names one."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return Path(path).absolute()
    created = folder / "token"
    created.touch(mode=0o600)
    created.write_text(os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    return created


def _is_running(pid: int) -> bool:
    """False for a process that has ended, also if nobody has waited for it."""
    try:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return False
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        port: int = server.getsockname()[1]
    return port


def _check_port(port: int) -> None:
    """Raise UserError if the port is in use."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((LOOPBACK, port))
        except OSError as error:
            raise UserError(
                f"--port must be free (got {port}: {error.strerror}); give another, or 0 for a "
                "free one",
                Code.BUSY,
                key="port",
                got=port,
            ) from error
