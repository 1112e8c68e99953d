"""MLflow's web pages for a store: a server on loopback that runs for the duration of a block.

Starts and stops `mlflow server` and asks it for the addresses of a study's pages. Changes no run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vitpareto.search.errors import Code, UserError
from vitpareto.search.tracking.database import artifact_folder, ensure_database, store_uri
from vitpareto.search.tracking.run_contents import STUDY_ID_TAG, TRIAL_TAG, experiment_name
from vitpareto.search.tracking.views import FRONT_VIEW

#: seconds until a started server must answer, and until a stopped one is killed
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
#: from linux/prctl.h
PR_SET_PDEATHSIG = 1
#: ignores http_proxy, which would be asked for loopback addresses too
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
#: selects MLflow's pages for runs and charts, not those for language models
WORKFLOW = "workflowType=machine_learning"


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: its root.
        page: the study's run; the root if no study was named.
        view: the saved view of the study's front; the root if no study was named.
        pid: its process, which leads a process group.
    """

    url: str
    page: str
    view: str
    pid: int

    @property
    def explorer(self) -> str:
        """The study's explorer on the page of its run."""
        run, _, options = self.page.partition("?")
        return f"{run}/artifacts/explorer.html?{options}"


@contextlib.contextmanager
def serve(
    store: Path, study: str | None = None, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[Served]:
    """Serve STORE/mlflow.db with MLflow. All processes have ended when the block ends.

    Args:
        store: folder of studies.
        study: name of the study whose pages to look up.
        host: address to listen on.
        port: None for a free one.

    Raises:
        UserError: the store does not exist, the port is not available, the server does not start
            (with its last lines), or MLflow has no such study.
    """
    if not store.is_dir():
        raise UserError(
            f"store {store} does not exist: run a search first, or name another --store",
            Code.NOT_FOUND,
            store=str(store),
        )
    port = _free_port(host, port)
    store = store.absolute()
    ensure_database(store)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    # uvicorn puts its working directory first on its path: no module of the user may lie there
    with (
        tempfile.TemporaryDirectory(prefix="vitpareto-ui-") as empty,
        tempfile.TemporaryFile() as output,
    ):
        process = subprocess.Popen(
            _command(store, host, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(),
            cwd=empty,
            start_new_session=True,  # a process group, so that its workers end with it
            preexec_fn=_end_with_parent,
        )
        try:
            _wait_until_ready(process, url, output)
            page, view = _pages(url, study)
            yield Served(url, page, view, process.pid)
        finally:
            _stop(process)


def _command(store: Path, host: str, port: int) -> list[str]:
    return [
        sys.executable, "-P", "-m", "mlflow", "server",
        "--backend-store-uri", store_uri(store),
        "--artifacts-destination", str(artifact_folder(store)),
        "--host", host, "--port", str(port),
        # several workers lose TCP_NODELAY, which costs 44 ms per request
        "--workers", "1",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    """The environment of the server and of the processes that it starts."""
    return {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes that are not needed
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        "PYTHONSAFEPATH": "1",  # `-P` for the processes that it starts
    }


def _end_with_parent() -> None:
    """Runs in the new process: end it when the parent is killed (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port(host: str, port: int | None) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OverflowError:
            raise UserError(
                f"port must be from 1 to 65535 (got {port})", Code.OUT_OF_RANGE, port=port
            ) from None
        except OSError as error:
            raise UserError(
                f"MLflow cannot listen on {host}:{port or 'any port'}: {error.strerror}; use "
                "another --port, or none for a free one",
                Code.UNAVAILABLE,
                host=host,
                port=port,
            ) from None
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), _OPENER.open(f"{url}/health", timeout=2):
            return
        time.sleep(0.1)
    output.seek(0)
    last_lines = output.read().decode(errors="replace").strip().splitlines()[-3:]
    state = "did not answer" if process.poll() is None else f"exited with code {process.returncode}"
    raise UserError(
        f"the MLflow server at {url} {state}: {' | '.join(last_lines) or 'no output'}",
        Code.UNAVAILABLE,
        url=url,
        exit_code=process.poll(),
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group; kill it if that takes too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            break
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _group_exists(process.pid):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _pages(url: str, study: str | None) -> tuple[str, str]:
    """Addresses of the study's run (the newest of that name) and of the view of its front."""
    if study is None:
        return url, url
    name = experiment_name(study)
    missing = UserError(
        f"MLflow has no study {study!r} in this store: run vitpareto sync {study} "
        "--tracking-uri store",
        Code.NOT_FOUND,
        study=study,
    )
    try:
        query = urllib.parse.urlencode({"experiment_name": name})
        found = _request(f"{url}/api/2.0/mlflow/experiments/get-by-name?{query}")
    except urllib.error.HTTPError as error:
        with error:  # closes the connection
            if error.code != 404:
                raise
            raise missing from None
    experiment = found["experiment"]["experiment_id"]
    options = f"viewStateShareKey={FRONT_VIEW}&compareRunsMode=CHART&{WORKFLOW}"
    view = f"{url}/#/experiments/{experiment}/runs?{options}"
    body = {
        "experiment_ids": [experiment],
        "filter": f"tags.`{STUDY_ID_TAG}` LIKE '%'",
        "order_by": ["attributes.start_time DESC"],
        "max_results": 1000,
    }
    for run in _request(f"{url}/api/2.0/mlflow/runs/search", body).get("runs", ()):
        if not any(tag["key"] == TRIAL_TAG for tag in run["data"].get("tags", ())):
            run_id = run["info"]["run_id"]
            return f"{url}/#/experiments/{experiment}/runs/{run_id}?{WORKFLOW}", view
    return f"{url}/#/experiments/{experiment}", view


def _request(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=30) as answer:
        out: dict[str, Any] = json.load(answer)
        return out
