"""The MLflow server of a store: it runs on loopback during the block, and ends with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.refusals import refused
from vitpareto.dashboards import mlflow_server
from vitpareto.dashboards.mlflow_server import serve
from vitpareto.search.errors import Code, UserError
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking.run_contents import TRIAL_TAG
from vitpareto.search.tracking.sync import sync


def group_of(leader: int) -> list[int]:
    """Live processes of a process group (zombies are dead)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_study_is_served_on_loopback_and_its_processes_end(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "deit-s")
    folder.create()
    folder.identity.settle({"model": "digits"})
    folder.trials.write(
        TrialResult(0, "finished", RecordedRecipe(), "k", {"top1": 80.0, "gmacs": 4.0})
    )
    sync(folder)
    with serve(tmp_path, "deit-s") as served:
        assert served.url.startswith("http://127.0.0.1:")
        page = served.page.removeprefix(f"{served.url}/#/experiments/").partition("?")[0]
        experiment, run = page.split("/runs/")
        assert experiment.isdigit() and len(run) == 32
        with urllib.request.urlopen(served.url, timeout=60) as root:
            assert b"<title>MLflow" in root.read()
        address = f"{served.url}/api/2.0/mlflow/runs/get?run_id={run}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b'"deit-s"' in answer.read()
        assert group_of(served.pid)
        with refused(Code.NOT_FOUND, UserError, study="other"):
            mlflow_server._pages(served.url, "other")
        port = int(served.url.rpartition(":")[2])
        with (
            refused(Code.UNAVAILABLE, UserError, port=port),
            serve(tmp_path, port=port),
        ):
            pass
    assert not group_of(served.pid)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


#: answers as MLflow does for an experiment with a study's run and a trial's, and one without runs
STAND_IN = """
import http.server, json, sys, urllib.parse

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body):
        address = urllib.parse.urlparse(self.path)
        if address.path == "/health":
            return self.send(200, {})
        if address.path.endswith("/get-by-name"):
            name = urllib.parse.parse_qs(address.query)["experiment_name"][0]
            known = {"vitpareto/deit-s": "7", "vitpareto/empty": "8"}
            if name not in known:
                return self.send(404, {})
            return self.send(200, {"experiment": {"experiment_id": known[name]}})
        trial = {"info": {"run_id": "trial"}, "data": {"tags": [{"key": sys.argv[2]}]}}
        study = {"info": {"run_id": "study"}, "data": {}}
        runs = [trial, study] if json.loads(body)["experiment_ids"] == ["7"] else []
        self.send(200, {"runs": runs} if runs else {})

    def send(self, code, answer):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def stand_in(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a small program instead of MLflow, which takes many seconds."""

    def command(store: Path, host: str, port: int) -> list[str]:
        return [sys.executable, "-S", "-c", program, str(port), TRIAL_TAG]

    monkeypatch.setattr(mlflow_server, "_command", command)
    monkeypatch.setattr(mlflow_server, "ensure_database", lambda store: None)


def test_addresses_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(STAND_IN, monkeypatch)
    with serve(tmp_path, "deit-s") as served:
        experiment = f"{served.url}/#/experiments/7"
        assert served.page.startswith(f"{experiment}/runs/study?")
        assert served.explorer.startswith(f"{experiment}/runs/study/artifacts/explorer.html?")
        assert served.view.startswith(f"{experiment}/runs?viewStateShareKey=")
        assert mlflow_server._pages(served.url, None) == (served.url, served.url)
        page, _ = mlflow_server._pages(served.url, "empty")
        assert page == f"{served.url}/#/experiments/8"
        with refused(Code.NOT_FOUND, UserError, study="other"):
            mlflow_server._pages(served.url, "other")
        assert group_of(served.pid)
    assert not group_of(served.pid)


def test_a_program_that_exits_is_reported_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("import sys; print('one'); sys.exit('the disk is full')", monkeypatch)
    with refused(Code.UNAVAILABLE, UserError, exit_code=1) as caught, serve(tmp_path):
        pass
    assert "the disk is full" in str(caught.value)


def test_a_server_that_does_not_answer_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ignores SIGTERM, so it has to be killed
    stand_in(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        monkeypatch,
    )
    monkeypatch.setattr(mlflow_server, "START_TIMEOUT_S", 1.0)
    monkeypatch.setattr(mlflow_server, "STOP_TIMEOUT_S", 0.2)
    with refused(Code.UNAVAILABLE, UserError, exit_code=None), serve(tmp_path):
        pass


def test_a_used_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with refused(Code.UNAVAILABLE, UserError, port=port), serve(tmp_path, port=port):
            pass
    assert not os.listdir(tmp_path)


def test_ports_out_of_range_are_refused(tmp_path: Path) -> None:
    with refused(Code.OUT_OF_RANGE, UserError, port=70000), serve(tmp_path, port=70000):
        pass


@pytest.mark.slow
def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text(
        "this is no database, and long enough to be read as one" * 9
    )
    with refused(Code.UNAVAILABLE, UserError) as caught, serve(tmp_path):
        pass
    assert caught.value.details["exit_code"], "it ended by itself, with an error"


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    with (
        refused(Code.NOT_FOUND, UserError, store=str(tmp_path / "nowhere")),
        serve(tmp_path / "nowhere"),
    ):
        pass
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_loopback_ignores_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serve(tmp_path) as served:
        assert served.page == served.url


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: PR_SET_PDEATHSIG")
def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from vitpareto.dashboards.mlflow_server import serve;"
        "context = serve(pathlib.Path(sys.argv[1])); served = context.__enter__();"
        "print(served.pid, served.url, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        group, url = one.stdout.readline().split()
        one.kill()
    deadline = time.monotonic() + 120
    while group_of(int(group)):
        assert time.monotonic() < deadline, f"{url} still runs"
        time.sleep(0.1)
