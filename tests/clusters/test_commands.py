"""`vitpareto submit`, `jobs`, `logs` and `stop` print what a job server answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import Run
from vitpareto.clusters import jobs
from vitpareto.clusters.jobs import SubmittedJob
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.study.job_request import JobRequest

DONE = SubmittedJob(
    id="s-1", study="s", status="SUCCEEDED", message="", started_ms=1_700_000_000_000
)
FAILED = replace(DONE, id="s-2", status="FAILED", message="log\nerror: no such data")


class Server:
    """A job server that answers from memory."""

    submitted: list[JobRequest] = []

    def __init__(self, address: str) -> None:
        self.address = address

    def submit(self, job: JobRequest) -> str:
        self.submitted.append(job)
        return "s-1"

    def jobs(self) -> list[SubmittedJob]:
        return [FAILED, DONE] if self.address.endswith("8265") else []

    def find(self, job_id: str) -> SubmittedJob:
        return {j.id: j for j in (DONE, FAILED)}[job_id]

    def logs(self, job_id: str) -> str:
        return f"log of {job_id}\n"

    def stream_logs(self, job_id: str) -> Iterator[str]:
        yield from ("first\n", "second\n")

    def stop(self, job_id: str) -> SubmittedJob:
        return DONE if job_id == "s-1" else replace(DONE, status="RUNNING")


@pytest.fixture(autouse=True)
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "submitted", [])
    monkeypatch.setattr(jobs, "JobClient", Server)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def test_submit_sends_the_job_with_its_options(command: Run, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("trials: 3\n")
    result = command("submit", job, "--set", "seed=2", "--store", "s3://b/s", "--name", "s")
    assert result.code == 0 and result.out == "s-1\n"
    given = {"trials": 3, "seed": 2, "name": "s", "store": "s3://b/s"}
    assert Server.submitted == [JobRequest(given)]
    result = command("submit", job, "--follow")
    assert result.out == "s-1\nfirst\nsecond\n"
    missing = tmp_path / "no.yaml"
    command("submit", missing).is_refused(Code.NOT_FOUND, path=str(missing))
    assert len(Server.submitted) == 2


def test_jobs_lists_what_was_submitted(command: Run) -> None:
    text = command("jobs").out
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines] == ["job", "s-2", "s-1"]
    assert "failed" in lines[1] and "no such data" in text and "succeeded" in lines[2]
    assert "http://head:1" in command("jobs", "--address", "http://head:1").out


def test_logs_of_a_failed_job_exit_with_1(command: Run) -> None:
    assert command("logs", "s-2").out == "log of s-2\n"
    assert command("logs", "s-1", "--follow").code == 0
    result = command("logs", "s-2", "--follow")
    assert result.code == 1 and "no such data" in result.err


def test_stop_reports_a_job_that_has_ended(command: Run) -> None:
    assert "succeeded" in command("stop", "s-1").out
    assert "continues it" in command("stop", "s-3").out
