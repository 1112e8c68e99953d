"""DataParallel nodes on this machine: raylets, ports and folders of their own, to try a cluster's
run.

Everything listens on loopback and asks for a token. `several_nodes` is to be called from a process
of its own (`vitpareto cluster local`): Ray reads its switches when it is imported.
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

from vitpareto.search.errors import UserError

#: bytes of each node's object store: what a study's workers share is small
OBJECT_STORE = 200_000_000
LOOPBACK = "127.0.0.1"


@dataclass
class Nodes:
    """address: what drivers join; dashboard: where jobs are submitted; token: the file with the
    token that both ask for; processes: each node's raylet, the head's first.
    """

    address: str
    dashboard: str
    token: Path
    processes: tuple[int, ...]

    def ended(self) -> list[int]:
        """Which nodes have ended."""
        return [i for i, pid in enumerate(self.processes) if not _runs(pid)]


@contextlib.contextmanager
def several_nodes(
    nodes: int, cpus: int = 1, port: int = 8265, resource: str | None = None
) -> Iterator[Nodes]:
    """A head and `nodes` - 1 further nodes of so many CPUs each; all of it ends with the block.

    port: of the dashboard and of jobs; 0: a free one. resource: one that node 1 alone has, as a
    kind of device would be. The token is the one of the environment
    (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), or a fresh one in a file for its owner alone.

    UserError for a number that makes no cluster, or a port in use.
    """
    if resource is not None and nodes < 2:
        raise UserError(f"resource {resource!r} is node 1's, and there is only the head: --nodes 2")
    if nodes < 1 or cpus < 1:
        raise UserError(f"a cluster of {nodes} nodes with {cpus} CPUs each: accepted is 1 or more")
    port = port or _free()
    _check_free(port)
    with tempfile.TemporaryDirectory(prefix="vitpareto-") as kept:
        place = Path(kept)
        token = _token(place)
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's switch for what stays on this machine, whatever its name says
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # where Ray writes down which cluster was the last to start: not for this user's others
            "RAY_TMPDIR": str(place),
            # jobs say `python`, and mean the one that all this runs in
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.pop("RAY_ADDRESS", None)
        from ray.cluster_utils import Cluster

        common: dict[str, Any] = {
            "num_cpus": cpus,
            "node_ip_address": LOOPBACK,
            "object_store_memory": OBJECT_STORE,
        }
        before, raylets = os.getcwd(), []
        try:
            # workers run where their raylet was started: each node in a folder of its own
            (place / "ray").mkdir()
            os.chdir(folder := _folder(place, 0))
            os.environ["VITPARETO_CACHE"] = str(folder / "cache")
            head = {
                "include_dashboard": True,
                "dashboard_host": LOOPBACK,
                "dashboard_port": port,
                "dashboard_agent_listen_port": _free(),
                "temp_dir": str(folder),
            }
            cluster = Cluster(initialize_head=True, head_node_args={**common, **head})
            try:
                # a job joins the cluster that its node's folder names; where none is named, any
                # that Ray finds on the machine
                (folder / "ray_current_cluster").write_text(cluster.address)
                raylets.append(_raylet(cluster.head_node))
                for i in range(1, nodes):
                    os.chdir(folder := _folder(place, i))
                    os.environ["VITPARETO_CACHE"] = str(folder / "cache")
                    own: dict[str, Any] = {
                        "dashboard_agent_listen_port": _free(),
                        "temp_dir": str(folder),
                        "resources": {resource: 1} if resource and i == 1 else {},
                    }
                    (folder / "ray_current_cluster").write_text(cluster.address)
                    node = cluster.add_node(**common, **own)
                    raylets.append(_raylet(node))
                dashboard = f"http://{LOOPBACK}:{port}"
                yield Nodes(cluster.address, dashboard, token, tuple(raylets))
            finally:
                cluster.shutdown()
        finally:
            os.chdir(before)


def _token(place: Path) -> Path:
    """The file with the cluster's token."""
    there = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if there:
        return Path(there).absolute()
    path = place / "token"
    path.touch(mode=0o600)
    path.write_text(os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    return path


def _folder(place: Path, node: int) -> Path:
    folder = place / str(node)  # short: a socket's path has 107 characters at most
    folder.mkdir()
    return folder


def _raylet(node: Any) -> int:
    (process,) = node.all_processes["raylet"]
    pid: int = process.process.pid
    return pid


def _runs(pid: int) -> bool:
    """Neither gone, nor a zombie that nobody has asked for."""
    try:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return False
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free() -> int:
    with socket.socket() as asked:
        asked.bind((LOOPBACK, 0))
        port: int = asked.getsockname()[1]
    return port


def _check_free(port: int) -> None:
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((LOOPBACK, port))
        except OSError as error:
            raise UserError(
                f"port {port} is in use ({error.strerror}): name another with --port, or 0 for a "
                "free one"
            ) from error
