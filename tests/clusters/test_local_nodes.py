"""A search on a real cluster of three nodes: submitted, stopped, continued, a node killed; and what
is refused before anything is measured.

The nodes' workers run in folders of their own, so a path below /proc/self/cwd is another place on
each: that is how one machine has stores and images that nodes do not share.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from tests.clusters.running import Running, running
from tests.search.faults import NAME, look, results, until
from vitpareto.search.study.folder import StudyFolder

JOB = {"name": NAME, "trials": 18, "images": 200, "certify": "off", "latency": "off", "race": "off"}
#: another folder in each process: that in which it runs
OWN = Path("/proc/self/cwd")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OWN.is_dir(), reason="needs /proc, where a node's own folder is named"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("cluster"), 3, "--resource", "stopwatch") as made:
        yield made


def answer(url: str, token: str | None = None) -> int:
    """The status of a GET."""
    asked = urllib.request.Request(url)
    if token is not None:
        asked.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=20) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.timeout(1800)  # with its turn to have a cluster
def test_a_local_cluster_listens_on_loopback_and_requires_a_token(cluster: Running) -> None:
    jobs = f"{cluster.dashboard}/api/jobs/"
    assert answer(jobs) == 401
    assert answer(jobs, "0" * 64) in (401, 403)
    assert answer(jobs, cluster.token.read_text()) == 200
    assert cluster.token.stat().st_mode & 0o077 == 0, "for its owner alone"
    parent = psutil.Process(cluster.process.pid)
    listening = {
        c.laddr.ip
        for process in (parent, *parent.children(recursive=True))
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening


def test_an_unusable_store_or_device_is_refused_at_the_start(
    cluster: Running, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    search = ("search", "job.yaml", "--address", cluster.address)
    code, said = cluster.run(*search, "--store", OWN / "apart", cwd=tmp_path)
    assert code == 2 and "the store must be the same folder on every node" in said, said
    assert "--store s3://" in said and "--store /shared" in said, "the fix"
    code, said = cluster.run(*search, "--store", tmp_path / "s", "--device", "cuda", cwd=tmp_path)
    assert code == 2 and "no node has one (nodes: 127.0.0.1: 1 CPUs" in said, said
    assert not (tmp_path / "s" / NAME / "trials").is_dir() or not results(tmp_path / "s")


def test_another_token_ray_or_python_is_refused(cluster: Running, tmp_path: Path) -> None:
    wrong = {**cluster.environment, "RAY_AUTH_TOKEN": "1" * 64}
    wrong.pop("RAY_AUTH_TOKEN_PATH")
    jobs = ("jobs", "--address")
    code, said = cluster.run(*jobs, cluster.dashboard, cwd=tmp_path, environment=wrong)
    assert code == 2 and "token must be" in said and "RAY_AUTH_TOKEN_PATH" in said, said
    code, said = cluster.run("logs", "kk", "--address", cluster.dashboard, cwd=tmp_path)
    assert code == 2 and "job 'kk' does not exist" in said, said
    ray, python = "ray.__version__ = '2.31.0'", "versions = ray.__version__, '3.9.1'"
    # the version that the installed package states
    installed = (
        "import importlib.metadata as m; stated = m.version\n"
        "m.version = lambda name: '2.31.0' if name == 'ray' else stated(name)"
    )
    joins = f"with vitpareto.clusters.connect.joined_cluster('{cluster.address}'): pass"
    for other, call, named in (
        (
            installed,
            f"from vitpareto.clusters.jobs import JobClient; JobClient('{cluster.dashboard}')",
            "2.31.0",
        ),
        (ray, joins, "2.31.0"),
        (f"{python}; ray._private.utils.compute_version_info = lambda: versions", joins, "3.9.1"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"import vitpareto.clusters.connect, ray\n{other}\n{call}"],
            env=cluster.environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert "UserError" in done.stderr and named in done.stderr, done.stderr
        assert "image" in done.stderr, "the fix"


def images(folder: Path, seed: int) -> None:
    """Two classes of a few small pictures."""
    draws = np.random.default_rng(seed)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(20):
            pixels = draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02d}.png")


def test_a_node_with_other_images_is_refused(cluster: Running, tmp_path: Path) -> None:
    for place, seed in ((tmp_path, 0), *((cluster.folder(i), int(i == 1)) for i in range(3))):
        images(place / "data", seed)
    code, said = cluster.run(
        "search", "--model", "vit_tiny_patch16_224", "--data", OWN / "data",
        "--address", cluster.address, "--store", tmp_path / "s",
        "--weights", weights(tmp_path), "--trials", "3", cwd=tmp_path,
    )  # fmt: skip
    assert code == 2 and "cannot take part: images of /proc/self/cwd/data" in said, said
    assert not results_in(tmp_path / "s")


def weights(place: Path) -> Path:
    """For a model of two classes."""
    import safetensors.torch
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    safetensors.torch.save_file(model.state_dict(), place / "w.safetensors")
    return place / "w.safetensors"


def results_in(store: Path) -> list[Path]:
    return list(store.glob("*/trials/[0-9]*.json"))


@pytest.mark.timeout(1200)
def test_latency_is_measured_in_an_exclusive_slot(cluster: Running, tmp_path: Path) -> None:
    """Trials share the other two nodes; latencies come from the one that has the resource."""
    job = {**JOB, "trials": 6, "objectives": ["top1", "latency_ms"], "latency_on": "stopwatch"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    code, said = cluster.run(
        "search", "job.yaml", "--address", cluster.address, "--store", tmp_path / "s",
        cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, said
    assert "latencies are measured on cpu, in an exclusive slot of stopwatch" in said
    found = StudyFolder(tmp_path / "s" / NAME).trials.all()
    assert len(found) == 6 and all(r.state == "finished" for r in found)
    for result in found:
        assert result.latency is not None and result.values["latency_ms"] > 0
        assert result.latency.target.device == "cpu"
    # a slot is the whole node: nothing else was given room on it
    assert (cluster.folder(1) / "cache" / "decoded").is_dir()


@pytest.mark.timeout(1800)
def test_a_submitted_search_continues_after_a_stop_and_a_killed_node(
    cluster: Running, tmp_path: Path
) -> None:
    """Stop, submit again, kill a node: nothing finished is lost or measured twice, and each node
    decoded the images once, for itself.
    """
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    store = tmp_path / "store"
    submit = ("submit", "job.yaml", "--address", cluster.dashboard, "--store", store)
    code, said = cluster.run(*submit, cwd=tmp_path)
    assert code == 0, said
    job = said.splitlines()[0]
    assert job.startswith(f"{NAME}-")

    cluster.goes_on_until(job, lambda: len(results(store)) >= 5, "five trials")
    code, said = cluster.run("stop", job, "--address", cluster.dashboard, cwd=tmp_path)
    assert code == 0 and "continues it" in said
    until(lambda: cluster.ask(job)["status"] == "STOPPED", "the job is stopped")
    _, log = cluster.run("logs", job, "--address", cluster.dashboard, cwd=tmp_path)
    assert "3 nodes: checking store" in log
    seen = results(store)
    assert 5 <= len(seen) < JOB["trials"], log  # type: ignore[operator]

    code, said = cluster.run(*submit, cwd=tmp_path)
    job = said.splitlines()[0]
    cluster.goes_on_until(job, lambda: len(results(store)) >= len(seen) + 4, "four more")
    os.kill(cluster.raylets[2], signal.SIGKILL)
    killed_at = len(results(store))
    code, said = cluster.run("logs", job, "--follow", "--address", cluster.dashboard, cwd=tmp_path)
    assert code == 0, said
    assert f"{JOB['trials']} trials measured" in said
    assert killed_at < JOB["trials"], "the node died in the middle"  # type: ignore[operator]
    found = look(store, "node", 1, seen, mlflow=False)
    assert found.whole and found.trials == JOB["trials"], found
    until(lambda: "node 2 ended" in cluster.log.read_text(), "it is said that a node ended")
    code, said = cluster.run("jobs", "--address", cluster.dashboard, cwd=tmp_path)
    assert said.count("succeeded") == 1 and said.count("stopped") == 1, said
    # each node has search and calibration images of its own, once: the same
    decoded = []
    for i in range(3):
        there = [
            json.loads(p.read_text()) for p in cluster.folder(i).glob("cache/decoded/*/index.json")
        ]
        decoded.append({(d["split"], d["fingerprint"]) for d in there if d["images"] == 200})
    assert {split for split, _ in decoded[0]} == {"search", "calibration"} and len(decoded[0]) == 2
    assert decoded[0] == decoded[1] == decoded[2]
