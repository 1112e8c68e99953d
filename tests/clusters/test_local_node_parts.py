"""What `cluster local` checks and prepares before Ray starts."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.command_line import Run
from tests.refusals import refused
from vitpareto.clusters import local_nodes, ray_internals
from vitpareto.clusters.local_nodes import LOOPBACK, LocalNodes


@pytest.mark.parametrize(
    ("arguments", "key"), [((0, 1), "nodes"), ((2, 0), "cpus"), ((1, 1, 0, "gpu"), "resource")]
)
def test_numbers_that_make_no_cluster_are_refused(arguments: tuple[int, ...], key: str) -> None:
    code = "conflict" if key == "resource" else "out-of-range"
    with refused(code, key=key), local_nodes.local_nodes(*arguments):  # type: ignore[arg-type]
        pass


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        server.listen()
        port = server.getsockname()[1]
        with refused("busy", key="port", got=port), local_nodes.local_nodes(1, port=port):
            pass


def test_the_token_is_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    token = local_nodes._token_file(tmp_path)
    assert token.read_text() == "given" and stat.S_IMODE(token.stat().st_mode) == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "own"))
    assert local_nodes._token_file(tmp_path) == tmp_path / "own"


def test_nodes_that_ended_are_told() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    running = LocalNodes("a", "d", Path("token"), (os.getpid(), ended.pid))
    assert running.ended() == [1]


@pytest.fixture
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's variables are set for the nodes; they are restored afterwards."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before


@pytest.mark.usefixtures("_own_environment")
def test_each_node_has_a_folder_and_only_the_second_the_resource(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[dict[str, object]] = []
    ended: list[bool] = []
    node = SimpleNamespace(
        all_processes={"raylet": [SimpleNamespace(process=SimpleNamespace(pid=1))]}
    )

    def add_node(**arguments: object) -> SimpleNamespace:
        started.append(arguments)
        return node

    def start(arguments: dict[str, object]) -> SimpleNamespace:
        started.append(arguments)
        return SimpleNamespace(
            address="127.0.0.1:6379", head_node=node, add_node=add_node,
            shutdown=lambda: ended.append(True),
        )  # fmt: skip

    monkeypatch.setattr(local_nodes, "start_test_cluster", start)
    before = Path.cwd()
    with local_nodes.local_nodes(3, cpus=2, port=0, resource="fast") as cluster:
        assert cluster.address == "127.0.0.1:6379" and cluster.processes == (1, 1, 1)
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(cluster.token)
        folders = [Path(str(node["temp_dir"])) for node in started]
        assert len({*folders}) == 3
        assert {(f / "ray_current_cluster").read_text() for f in folders} == {cluster.address}
    assert [node.get("resources") for node in started] == [None, {"fast": 1}, {}]
    assert ended == [True] and Path.cwd() == before


def test_cluster_local_prints_how_to_use_it(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Ended(LocalNodes):
        def ended(self) -> list[int]:
            if waited:
                raise KeyboardInterrupt
            waited.append(True)
            return [1]

    waited: list[bool] = []

    @contextlib.contextmanager
    def nodes(*arguments: object) -> Iterator[LocalNodes]:
        yield Ended("127.0.0.1:6379", "http://127.0.0.1:8265", tmp_path / "token", (7, 8))

    monkeypatch.setattr(local_nodes, "local_nodes", nodes)
    result = command("cluster", "local", "--nodes", 2)
    assert result.code == 0, result.err
    assert f"RAY_AUTH_TOKEN_PATH={tmp_path / 'token'}" in result.out
    assert "submit job.yaml --address http://127.0.0.1:8265" in result.out
    assert "node 0 (head): 1 CPUs, process 7" in result.err and "node 1 ended" in result.err


def test_the_version_of_a_server() -> None:
    class Client:
        def _do_request(self, verb: str, path: str) -> SimpleNamespace:
            assert (verb, path) == ("GET", "/api/version")
            return SimpleNamespace(
                raise_for_status=lambda: None, json=lambda: {"ray_version": "2.40.0"}
            )

    assert ray_internals.server_version(Client()) == "2.40.0"  # type: ignore[arg-type]
