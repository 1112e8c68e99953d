"""The MLflow service of the compose file requires a password and a known host."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPOSE = Path(__file__).parents[2] / "dashboards" / "compose.yaml"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def test_no_port_is_public_and_no_secret_is_in_the_file(services: dict[str, Any]) -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in services["postgres"]
    asked = {name for one in services.values() for name in one["secrets"]}
    assert asked == set(document["secrets"])
    assert all(set(kind) == {"file"} for kind in document["secrets"].values())
    for one in services.values():
        assert not any("PASSWORD" in k and "FILE" not in k for k in one["environment"])
    mounted = {v.partition(":")[0] for one in services.values() for v in one["volumes"]}
    assert mounted == set(document["volumes"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_mlflow_requires_a_password_and_a_known_host(
    services: dict[str, Any], tmp_path: Path
) -> None:
    """Runs the script of the service with paths of the test instead of the container's."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("postgres", "admin", "session"):
        (tmp_path / name).write_text(f"secret-{name}-0123456789")
    (script,) = services["mlflow"]["command"]
    for container, here in (
        ("$$", "$"),
        ("/run/secrets/", f"{tmp_path}/"),
        ("postgresql://mlflow:$password@postgres/mlflow", f"sqlite:///{tmp_path}/mlflow.db"),
        ("/tmp/auth.ini", f"{tmp_path}/auth.ini"),
        ("/artifacts", f"{tmp_path}/artifacts"),
        ("0.0.0.0 --port 5000", f"127.0.0.1 --port {port}"),
        ("exec mlflow", f"exec {sys.executable} -W ignore -m mlflow"),
    ):
        assert container in script, container
        script = script.replace(container, here)
    environment = {
        **os.environ,
        **services["mlflow"]["environment"],
        "VITPARETO_ALLOWED_HOSTS": "127.0.0.1:*",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    url = f"http://127.0.0.1:{port}"

    def ask(path: str, password: str | None = None, host: str | None = None) -> int:
        headers = {"Content-Type": "application/json"}
        if password is not None:
            word = base64.b64encode(f"admin:{password}".encode()).decode()
            headers["Authorization"] = f"Basic {word}"
        if host is not None:
            headers["Host"] = host
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url + path, headers=headers), timeout=20) as a:
                return int(a.status)
        except urllib.error.HTTPError as error:
            with error:
                return int(error.code)

    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            ["/bin/sh", "-ec", script], env=environment, cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    if ask("/health") == 200:
                        break
                except OSError:
                    pass
                said = (tmp_path / "log").read_text()
                assert time.monotonic() < deadline and server.poll() is None, said[-3000:]
                time.sleep(0.5)
            runs = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
            assert ask(runs) == 401
            assert ask(runs, "wrong-password-0123") == 401
            assert ask(runs, "secret-admin-0123456789") == 200
            assert ask(runs, "secret-admin-0123456789", host="evil.example") == 403
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)
    assert b"secret-admin" not in (tmp_path / "log").read_bytes()
