"""A real Ray cluster of several nodes, as a user starts it: `vitpareto cluster local`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.search.faults import until

#: as a user types it: `python -m` would put the working directory on the path
COMMAND = Path(sys.executable).with_name("vitpareto")


@dataclass
class Running:
    """A cluster as `vitpareto cluster local` printed it."""

    process: subprocess.Popen[str]
    log: Path
    address: str
    dashboard: str
    token: Path
    raylets: list[int]
    environment: dict[str, str]

    def folder(self, node: int) -> Path:
        """Where the node's workers run."""
        return self.token.parent / str(node)

    def run(
        self, *arguments: object, cwd: Path, environment: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """A command as a user gives it, from a folder: its exit, and all that it printed."""
        done = subprocess.run(
            [COMMAND, *map(str, arguments)],
            cwd=cwd, env=environment or self.environment, text=True, timeout=900,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout

    def ask(self, path: str) -> Any:
        """What the job server answers."""
        asked = urllib.request.Request(f"{self.dashboard}/api/jobs/{path}")
        asked.add_header("Authorization", f"Bearer {self.token.read_text()}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as got:
            return json.load(got)

    def goes_on_until(self, job: str, true: Callable[[], Any], what: str) -> None:
        """Waits while the job runs; what it said, where it does not come to that."""

        def over() -> bool:
            return self.ask(job)["status"] in ("SUCCEEDED", "FAILED", "STOPPED")

        try:
            until(lambda: true() or over(), what, within=800)
            assert true(), f"the job is over before {what}"
        except AssertionError as error:
            said = self.ask(f"{job}/logs")["logs"]
            raise AssertionError(f"{error}; it said\n{said}") from None


@contextlib.contextmanager
def running(
    place: Path, nodes: int, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """place: a folder for its log. environment: beside this process's. Ends with the block, leaving
    no process. One at a time on a machine: each is several Rays' worth of processes.
    """
    with open(Path(tempfile.gettempdir()) / f"vitpareto-test-cluster-{os.getuid()}", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with _running(place, nodes, options, environment) as made:
            yield made


@contextlib.contextmanager
def _running(
    place: Path, nodes: int, options: tuple[str, ...], environment: Mapping[str, str] | None
) -> Iterator[Running]:
    log = place / "log"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | dict(
        environment or {}
    )
    with open(log, "w") as out:
        process = subprocess.Popen(
            [COMMAND, "cluster", "local", "--nodes", str(nodes),
             "--port", "0", *options],
            env=kept, stdout=out, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, "its nodes")
        said = log.read_text()
        assert process.poll() is None, said
        address = re.findall(r"job.yaml --address (\S+)", said)
        token = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", said)[0]
        yield Running(
            process, log, address[1], address[0], Path(token),
            [int(pid) for pid in re.findall(r"process (\d+)", said)],
            {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token},
        )  # fmt: skip
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(timeout=240) == 0, log.read_text()
                _, alive = psutil.wait_procs(family, timeout=30)
                assert not alive, f"left behind: {alive}"
            finally:
                process.kill()
