"""What is packed for a cluster, and where its files lie afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.refusals import refused
from vitpareto.clusters import packing
from vitpareto.clusters.jobs import JobClient, SubmittedJob
from vitpareto.clusters.packing import INPUTS, pack_job, store_inputs
from vitpareto.search.code_identity import SUBPACKAGES
from vitpareto.search.study.job_request import JobRequest


def given(tmp_path: Path) -> JobRequest:
    """A job that names files of this machine."""
    model = tmp_path / "vit"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    (tmp_path / "w.safetensors").write_bytes(b"w" * 1000)
    return JobRequest({
        "name": "k",
        "model": f"local-dir:{model}",
        "weights": str(tmp_path / "w.safetensors"),
        "store": "/shared/studies",
        "data": "/shared/imagenet",
    })  # fmt: skip


def test_a_package_is_self_contained(tmp_path: Path) -> None:
    """Code, job and files: nothing of this project has to be installed where it runs."""
    package = tmp_path / "package"
    package.mkdir()
    config = pack_job(given(tmp_path), package)
    assert config.name == "k"
    packed = yaml.safe_load((package / "job.yaml").read_text())
    assert packed["data"] == "/shared/imagenet", "what is on the cluster stays as it was said"
    weights, model = Path(packed["weights"]), Path(packed["model"].removeprefix("local-dir:"))
    assert weights.parts[0] == model.parts[0] == INPUTS
    assert (package / weights).read_bytes() == b"w" * 1000
    assert (package / model / "config.json").is_file()
    done = subprocess.run(
        [sys.executable, "-c", "import vitpareto\n"
         "from vitpareto import methods, search, clusters, dashboards\n"
         "print(*(m.__file__ for m in (vitpareto, methods, search, clusters, dashboards)))"],
        cwd=package, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(Path(f).is_relative_to(package) for f in done.stdout.split()), done.stdout
    assert len(done.stdout.split()) == 1 + len(SUBPACKAGES)
    assert (
        package / "vitpareto" / "search" / "models" / "weights" / "digits_vit.safetensors"
    ).is_file()


def test_packed_files_are_stored_in_the_study_under_stable_names(tmp_path: Path) -> None:
    """The same job submitted again names the same paths: a study is continued, not refused."""
    job, study = given(tmp_path), tmp_path / "studies" / "k"
    stored = []
    for name in ("first", "second"):
        package = tmp_path / name
        package.mkdir()
        pack_job(job, package)
        packed = JobRequest(yaml.safe_load((package / "job.yaml").read_text()))
        stored.append(store_inputs(packed, package, study))
    assert stored[0] == stored[1]
    for key in ("weights", "model"):
        path = Path(stored[0].text(key).removeprefix("local-dir:"))
        assert path.is_relative_to(study) and path.exists()
    assert not list((study / INPUTS).glob(".*")), "nothing half-copied"


def test_an_unpackable_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = given(tmp_path)
    (tmp_path / "package").mkdir()
    for store in (None, "studies"):
        with refused("unsupported", key="store", got=store or ""):
            pack_job(job.changed(store=store), tmp_path / "package")
    with refused("unknown-name"):
        pack_job(job.changed(trails=3), tmp_path / "package")
    (tmp_path / "w.safetensors").write_bytes(b"w" * 7_000_000)
    monkeypatch.setattr(packing, "LIMIT_MB", 5)
    with refused("out-of-range", accepted=5, largest="w.safetensors"):
        pack_job(job, tmp_path / "package")


def test_an_unreachable_job_server_is_refused() -> None:
    with refused("unavailable", address="http://127.0.0.1:9"):
        JobClient("http://127.0.0.1:9")
    with refused("wrong-type", key="address", got="head:8265"):
        JobClient("head:8265")


def test_the_failure_of_a_job_is_one_line() -> None:
    log = "Job entrypoint command failed with exit code 2, last logs:\nstudy k\nerror: no GPU\n"
    assert SubmittedJob("k-1", "k", "FAILED", log, 0).failure == "error: no GPU"
    assert SubmittedJob("k-1", "k", "RUNNING", "Job is currently running.", 0).failure == ""
