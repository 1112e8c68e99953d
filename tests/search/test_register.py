"""A bundle in MLflow's registry, and served from there where this project is not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from clusters.local import Room
from search import run
from search.certificates import measured
from search.config import SearchConfig
from search.errors import UserError
from search.export import export
from search.mlflow_client import open_client, store_uri
from search.pareto import front_of, objectives_named
from search.register import aliases_of, fastest, register
from search.results import TrialResult
from search.store import StudyFolder
from search.verify import Measured, normalised


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, cache: Path, room: Room) -> StudyFolder:
    config = SearchConfig.of({
        "name": "s", "trials": 8, "images": 100, "methods": "topk,random", "latency": "off",
        "certify": "off", "store": str(tmp_path_factory.mktemp("store")), "cache": str(cache),
        "device": "cpu", "fixed": {"structure": "none"},
    })  # fmt: skip
    folder, _ = run.search(run.prepare(config), cpus=room.cpus, gpus=0)
    return folder


@pytest.fixture(scope="module")
def chosen(study: StudyFolder) -> TrialResult:
    """The front's cheapest."""
    return front_of(measured(study), objectives_named(("top1", "gmacs")))[0]


@pytest.fixture(scope="module")
def bundle(
    study: StudyFolder, chosen: TrialResult, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Path:
    return export(study, chosen, tmp_path_factory.mktemp("out") / "b", cache=str(cache), images=4)


def test_a_version_says_what_it_is(study: StudyFolder, chosen: TrialResult, bundle: Path) -> None:
    first = register(study, chosen, bundle)
    second = register(study, chosen, bundle, aliases=["champion"])
    assert first.name == "vitpareto-s" and (first.version, second.version) == ("1", "2")
    assert set(first.aliases) == {"champion", *aliases_of(study, chosen, recovered=False)}
    assert "fastest" in first.aliases and second.aliases == ("champion",)
    client = open_client(store_uri(study.folder.parent))
    assert client.get_model_version_by_alias("vitpareto-s", "champion").version == 2
    assert client.get_model_version_by_alias("vitpareto-s", "fastest").version == 1
    tags = client.get_model_version("vitpareto-s", "1").tags
    assert tags["trial"] == str(chosen.trial) and tags["verified"] == "true"
    assert tags["front"].startswith("1 of ") and "method:" in tags["recipe"]
    run_id = client.get_model_version("vitpareto-s", "1").run_id
    assert client.get_run(run_id).data.tags["trial"] == str(chosen.trial)
    files = {f.path.removeprefix("model/") for f in client.list_artifacts(run_id, "model")}
    assert {"MLmodel", "labels.json", "preprocess.json", "recipe.yaml"} <= files


def test_an_alias_that_is_none_or_another_trials_is_refused(
    study: StudyFolder, chosen: TrialResult, bundle: Path
) -> None:
    with pytest.raises(UserError, match="alias 'chmpion': did you mean 'champion'"):
        register(study, chosen, bundle, aliases=["chmpion"])
    dense = next(r for r in measured(study) if r.is_reference)
    with pytest.raises(UserError, match="trial 0 is not the fastest of s's front"):
        register(study, dense, bundle, aliases=["fastest"])
    with pytest.raises(UserError, match="name a server with --tracking-uri"):
        register(study, chosen, bundle, uri="none")


def test_fastest_goes_by_latency_where_all_of_the_front_was_timed() -> None:
    def trial(n: int, **values: float) -> TrialResult:
        return TrialResult(n, "finished", {}, str(n), values)

    front = [trial(1, gmacs=1.0, latency_ms=9.0), trial(2, gmacs=2.0, latency_ms=8.0)]
    found = fastest(front)
    assert found is not None and found.trial == 2
    found = fastest([*front, trial(3, gmacs=0.5)])
    assert found is not None and found.trial == 3
    assert fastest([]) is None


def elsewhere(place: Path) -> Path:
    """An environment with this one's packages and without this project: an editable install is
    found by a .pth file, and those of another environment's folder are not read.
    """
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", place], check=True)  # type: ignore[attr-defined]
    (site,) = place.glob("lib/python3*/site-packages")
    (site / "deps.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = place / "bin" / "python"
    # mlflow starts uvicorn by its name
    script = place / "bin" / "uvicorn"
    script.write_text(f"#!{python}\nfrom uvicorn.main import main\nmain()\n")
    script.chmod(0o755)
    command = [python, "-c", "import search"]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr, found.stderr
    return python


@pytest.mark.timeout(240)
def test_mlflow_serves_it_where_this_project_is_not(
    study: StudyFolder, chosen: TrialResult, bundle: Path, tmp_path: Path
) -> None:
    """An image in, class and score out, as the measured model had them."""
    made = register(study, chosen, bundle)
    python = elsewhere(tmp_path / "env")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-W", "ignore", "-m", "mlflow", "models", "serve", "-m", made.address,
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": made.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    known = Measured.load(bundle / "verify.npz")
    preprocess = json.loads((bundle / "preprocess.json").read_text())
    images = normalised(known.images, preprocess).numpy()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    opener.open(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                    break
                except OSError:
                    said = (tmp_path / "log").read_text()
                    assert time.monotonic() < deadline and server.poll() is None, said
                    time.sleep(0.3)
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps({"inputs": {"images": images.tolist()}}).encode(),
                {"Content-Type": "application/json"},
            )
            with opener.open(asked, timeout=60) as answer:
                found = json.load(answer)["predictions"]
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)
    assert np.abs(np.array(found["logits"]) - known.logits).max() < known.tolerance
    assert found["class"] == known.logits.argmax(axis=1).tolist()
    assert all(0 < score <= 1 for score in found["score"])
