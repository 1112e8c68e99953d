"""Search jobs on a Ray cluster: submit, list and stop them and read their logs, through the head's
job server.

Results are in the job's store, which must outlive the cluster.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpareto.clusters.packing import JOB, pack_job
from vitpareto.clusters.ray_internals import VERBOSE_LOGGERS, server_version
from vitpareto.methods import Code
from vitpareto.search.errors import UserError
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.versions import package_versions

#: metadata that marks this project's jobs
PROJECT = "vitpareto"


@dataclass(frozen=True)
class SubmittedJob:
    """A job on a cluster. `id`, `status` and `message` are Ray's; `started_ms` counts from 1970."""

    id: str
    study: str
    status: str
    message: str
    started_ms: int

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def failure(self) -> str:
        """Why the job failed, in one line; "" if it did not fail."""
        if self.status != "FAILED":
            return ""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        # Ray's message ends with the last lines of the log
        errors = [line for line in lines if "error" in line.lower()]
        reason = (errors or lines or [""])[-1]
        return reason if len(reason) <= 300 else reason[:297] + "..."


class JobClient:
    """A connection to the job server of a Ray head.

    Raises UserError if it does not answer, refuses the token or runs another version of Ray.
    """

    def __init__(self, address: str) -> None:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        if "://" not in address:
            raise UserError(
                f"--address must be the head's dashboard, for example http://head:8265 (got "
                f"{address!r})",
                Code.WRONG_TYPE,
                key="address",
                got=address,
            )
        self.address = address
        try:
            self.client = JobSubmissionClient(address)
            version = server_version(self.client)
            for name in VERBOSE_LOGGERS:  # the client sets their level when it is made
                logging.getLogger(name).setLevel(logging.WARNING)
        except AuthenticationError as error:
            raise UserError(
                f"the token must be that of the cluster at {address} "
                f"({str(error).splitlines()[0]}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
                "to the file that holds it",
                Code.UNAVAILABLE,
                address=address,
                token=False,
            ) from error
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({' '.join(str(error).split())[:200]}); "
                "--address must be the head's dashboard, for example http://head:8265, and its "
                "port must be forwarded",
                Code.UNAVAILABLE,
                address=address,
            ) from error
        self._check_version(version)

    def _check_version(self, version: str) -> None:
        (here,) = package_versions("ray").values()
        if version.split(".")[:2] != here.split(".")[:2]:
            raise UserError(
                f"the cluster at {self.address} must run this version of Ray, {here} "
                f"(got {version}); install ray=={version} here, or give the cluster an image with "
                f"{here}",
                Code.MISMATCH,
                address=self.address,
                got=version,
                accepted=here,
            )

    def submit(self, job: JobRequest) -> str:
        """Pack and submit a search; returns Ray's id of the job. Raises as `pack_job`."""
        with tempfile.TemporaryDirectory(prefix="vitpareto-job-") as package:
            config = pack_job(job, Path(package))
            job_id = self.client.submit_job(
                entrypoint=f"python -m vitpareto search {JOB} --address auto --packed",
                submission_id=f"{config.name}-{uuid.uuid4().hex[:8]}",
                runtime_env={"working_dir": package, "env_vars": {"PYTHONUNBUFFERED": "1"}},
                metadata={"study": config.name, "job": PROJECT},
            )
        return str(job_id)

    def jobs(self) -> list[SubmittedJob]:
        """The submitted searches, the latest first."""
        jobs = []
        for details in self.client.list_jobs():
            metadata = details.metadata or {}
            if metadata.get("job") == PROJECT and details.submission_id:
                jobs.append(
                    SubmittedJob(
                        id=details.submission_id,
                        study=metadata.get("study", ""),
                        status=str(details.status.value),
                        message=details.message or "",
                        started_ms=details.start_time or 0,
                    )
                )
        return sorted(jobs, key=lambda job: -job.started_ms)

    def find(self, job_id: str) -> SubmittedJob:
        """The job of this id. Raises UserError, with the nearest id, if it does not exist."""
        jobs = {job.id: job for job in self.jobs()}
        if job_id not in jobs:
            raise UserError.unknown(
                f"job {job_id!r} does not exist at {self.address}",
                job_id,
                jobs,
                code=Code.NOT_FOUND,
                job=job_id,
                address=self.address,
            )
        return jobs[job_id]

    def logs(self, job_id: str) -> str:
        self.find(job_id)
        return str(self.client.get_job_logs(job_id))

    def stream_logs(self, job_id: str) -> Iterator[str]:
        """Yield the log as it is written, until the job ends."""
        import asyncio

        self.find(job_id)
        lines: AsyncIterator[str] = self.client.tail_job_logs(job_id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(RuntimeError):  # the consumer may have stopped reading
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, job_id: str) -> SubmittedJob:
        """Ask a job to stop; returns the job as it was before."""
        job = self.find(job_id)
        if not job.ended:
            self.client.stop_job(job_id)
        return job
