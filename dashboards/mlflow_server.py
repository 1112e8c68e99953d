"""MLflow's own pages on a study's store: a server on loopback, up while a block runs.

It starts and stops `mlflow server` and finds a study's page by asking it; it changes no run.
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

from vitpareto.search.errors import UserError
from vitpareto.search.tracking.database import artifact_folder, ensure_database, store_uri
from vitpareto.search.tracking.run_contents import STUDY_ID_TAG, TRIAL_TAG, experiment_name
from vitpareto.search.tracking.views import FRONT_VIEW

#: seconds a server may take to answer for the first time (a new database is built in it)
STARTS_WITHIN_S = 120.0
STOPS_WITHIN_S = 5.0
#: of linux/prctl.h
PR_SET_PDEATHSIG = 1
#: loopback is reached without the proxy that http_proxy names
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
#: MLflow's pages come in two kinds; this one shows runs and their charts
WORKFLOW = "workflowType=machine_learning"


@dataclass(frozen=True)
class Served:
    """A server that answers. `url`: its root; `page`: the study's own run, or the root; `view`: the
    saved view of the study's front, or the root.
    """

    url: str
    page: str
    view: str
    pid: int

    @property
    def explorer(self) -> str:
        """The study's explorer, in its run's page."""
        run, _, options = self.page.partition("?")
        return f"{run}/artifacts/explorer.html?{options}"


@contextlib.contextmanager
def serve(
    store: Path, study: str | None = None, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[Served]:
    """MLflow on STORE/mlflow.db; its processes are gone when the block ends.

    port None: any free one. UserError where there is no such store, the port is taken, the server
    does not come up (with its last words), or MLflow has no such study.
    """
    if not store.is_dir():
        raise UserError(f"there is no store {store}: a search makes it, or name another --store")
    port = _free(host, port)
    store = store.absolute()
    ensure_database(store)
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", store_uri(store),
        "--artifacts-destination", str(artifact_folder(store)),
        "--host", host, "--port", str(port),
        # several would be slower: they lose TCP_NODELAY, 44 ms a request
        "--workers", "1",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes for what is not used here
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=environment,
            cwd=store,
            start_new_session=True,  # a group of its own, so that its workers end with it
            preexec_fn=_end_with_parent,
        )
        try:
            _wait(process, url, words)
            page, view = _pages(url, study)
            yield Served(url, page, view, process.pid)
        finally:
            _stop(process)


def _end_with_parent() -> None:
    """In the new process: be told to end where the one that serves is killed outright (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free(host: str, port: int | None) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except (OSError, OverflowError) as error:
            said = error.strerror if isinstance(error, OSError) else "accepted is 1 to 65535"
            raise UserError(
                f"MLflow cannot listen on {host}:{port or 'any port'}: {said}; "
                "name another --port, or none for a free one"
            ) from None
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, words: IO[bytes]) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), _OPENER.open(f"{url}/health", timeout=2):
            return
        time.sleep(0.1)
    words.seek(0)
    last = " | ".join(words.read().decode(errors="replace").strip().splitlines()[-3:])
    how = "did not answer" if process.poll() is None else f"ended with code {process.returncode}"
    raise UserError(f"the MLflow server at {url} {how}: {last or 'it said nothing'}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: asked first, killed if that takes long."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN_S)
            break
    deadline = time.monotonic() + STOPS_WITHIN_S
    while _group_lives(process.pid):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _pages(url: str, study: str | None) -> tuple[str, str]:
    """The addresses of the study's own run (the newest, if a name was used again), and of the view
    of its front.
    """
    if study is None:
        return url, url
    name = experiment_name(study)
    missing = UserError(
        f"MLflow has no study {study!r} in this store: vitpareto sync {study} "
        "--tracking-uri store brings it there"
    )
    try:
        query = urllib.parse.urlencode({"experiment_name": name})
        found = _ask(f"{url}/api/2.0/mlflow/experiments/get-by-name?{query}")
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            if error.code != 404:
                raise
            raise missing from None
    experiment = found["experiment"]["experiment_id"]
    shown = f"viewStateShareKey={FRONT_VIEW}&compareRunsMode=CHART&{WORKFLOW}"
    view = f"{url}/#/experiments/{experiment}/runs?{shown}"
    body = {
        "experiment_ids": [experiment],
        "filter": f"tags.`{STUDY_ID_TAG}` LIKE '%'",
        "order_by": ["attributes.start_time DESC"],
        "max_results": 1000,
    }
    for run in _ask(f"{url}/api/2.0/mlflow/runs/search", body).get("runs", ()):
        if not any(tag["key"] == TRIAL_TAG for tag in run["data"].get("tags", ())):
            run_id = run["info"]["run_id"]
            return f"{url}/#/experiments/{experiment}/runs/{run_id}?{WORKFLOW}", view
    return f"{url}/#/experiments/{experiment}", view


def _ask(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=30) as answer:
        out: dict[str, Any] = json.load(answer)
        return out
