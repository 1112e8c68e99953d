"""`JobClient` against a job server that answers from memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.job_submission
import yaml
from ray.exceptions import AuthenticationError

from tests.refusals import refused
from vitpareto.clusters import jobs
from vitpareto.clusters.jobs import PROJECT, JobClient
from vitpareto.search.study.job_request import JobRequest

ADDRESS = "http://head:8265"


def details(job: str, status: str, start: int, project: str = PROJECT) -> SimpleNamespace:
    """What Ray tells of a job."""
    return SimpleNamespace(
        submission_id=job, metadata={"study": "s", "job": project}, message=None,
        status=SimpleNamespace(value=status), start_time=start,
    )  # fmt: skip


@dataclass
class Server:
    """Ray's client of a job server."""

    address: str
    stopped: list[str] = field(default_factory=list)
    submitted: dict[str, Any] = field(default_factory=dict)

    def submit_job(self, *, submission_id: str, runtime_env: dict[str, Any], **more: Any) -> str:
        package = Path(runtime_env["working_dir"])
        self.submitted = yaml.safe_load((package / "job.yaml").read_text()) | more["metadata"]
        return submission_id

    def list_jobs(self) -> list[SimpleNamespace]:
        return [details("s-1", "SUCCEEDED", 1), details("s-2", "RUNNING", 2),
                details("other-1", "RUNNING", 3, project="another")]  # fmt: skip

    def get_job_logs(self, job_id: str) -> str:
        return f"log of {job_id}\n"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for line in ("first\n", "second\n"):
            yield line

    def stop_job(self, job_id: str) -> None:
        self.stopped.append(job_id)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> JobClient:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Server)
    monkeypatch.setattr(jobs, "server_version", lambda client: ray.__version__)
    return JobClient(ADDRESS)


def test_a_job_is_submitted_under_its_study(client: JobClient) -> None:
    job = client.submit(JobRequest({"name": "s", "trials": 3, "store": "s3://b/s"}))
    assert job.startswith("s-")
    assert client.client.submitted == {
        "name": "s", "trials": 3, "store": "s3://b/s", "study": "s", "job": PROJECT,
    }  # fmt: skip


def test_only_searches_are_listed_the_latest_first(client: JobClient) -> None:
    assert [job.id for job in client.jobs()] == ["s-2", "s-1"]
    assert client.find("s-1").ended and not client.find("s-2").ended
    with refused("not-found", job="s-3", address=ADDRESS):
        client.find("s-3")


def test_logs_of_a_job(client: JobClient) -> None:
    assert client.logs("s-1") == "log of s-1\n"
    assert list(client.stream_logs("s-2")) == ["first\n", "second\n"]
    stream = client.stream_logs("s-2")
    assert next(stream) == "first\n"
    stream.close()  # type: ignore[attr-defined]
    with refused("not-found"):
        client.logs("other-1")


def test_a_job_that_ended_is_not_stopped_again(client: JobClient) -> None:
    assert client.stop("s-1").ended and client.client.stopped == []
    assert client.stop("s-2").status == "RUNNING" and client.client.stopped == ["s-2"]


def test_another_ray_or_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Server)
    monkeypatch.setattr(jobs, "server_version", lambda client: "1.13.0")
    with refused("mismatch", got="1.13.0", accepted=ray.__version__):
        JobClient(ADDRESS)

    def denied(client: object) -> str:
        raise AuthenticationError("no token")

    monkeypatch.setattr(jobs, "server_version", denied)
    with refused("unavailable", address=ADDRESS, token=False):
        JobClient(ADDRESS)
