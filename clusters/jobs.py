"""Search jobs on a Ray cluster: packed here, run there, followed, listed and stopped.

What is packed is this project's own code, the job, and the files of this machine that it names; so
a cluster needs the packages that it depends on and nothing of the user's. Results stay in the job's
store, which has to outlive the cluster. No secret travels: a token or a password is the
environment's, there as here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitpareto.methods.engine.errors import nearest
from vitpareto.search.code_identity import PACKAGE, copy_code
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig

#: where the files that a job names lie in the package, and its job file
INPUTS, JOB = "inputs", "job.yaml"
#: Ray's limit of a package; its own name for it is GCS_STORAGE_MAX_SIZE
LIMIT_MB = 512
#: Ray's loggers that tell every step of an upload and of a log's end
QUIET = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
#: job keys that may name files of this machine
FILES = ("weights", "profile")


@dataclass(frozen=True)
class Job:
    """One of a cluster's: Ray's id, the study, Ray's word for how it stands and what it says."""

    id: str
    study: str
    status: str
    message: str
    begun_ms: int

    @property
    def over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


# ------------------------------------------------------------------------------------------ packing


def pack(job: Mapping[str, Any], package: Path) -> SearchConfig:
    """Write into an empty folder what the cluster runs: code, job, and the files that it names.

    UserError for a job that is wrong, a store that would be gone with the cluster, and a package
    above Ray's limit.
    """
    config = SearchConfig.of(job)
    store = str(job.get("store") or "")
    if "://" not in store and not os.path.isabs(store):
        raise UserError(
            f"job.store is {store!r}: the results of a submitted search must outlive the cluster; "
            "give --store with a folder that all nodes mount (/shared/studies) or object storage "
            "(s3://BUCKET/studies)"
        )
    packed = dict(job)
    for key in FILES:
        if packed.get(key) and Path(packed[key]).is_file():
            packed[key] = _take(Path(packed[key]), package)
    kind, _, place = str(packed.get("model") or "").partition(":")
    if kind == "local-dir" and Path(place).is_dir():
        packed["model"] = f"local-dir:{_take(Path(place), package)}"
    copy_code(package / PACKAGE)
    (package / JOB).write_text(yaml.safe_dump(packed, sort_keys=False), encoding="utf-8")
    size = sum(f.stat().st_size for f in package.rglob("*") if f.is_file()) / 2**20
    if size >= LIMIT_MB:
        most = max((package / INPUTS).rglob("*"), key=lambda f: f.stat().st_size)
        raise UserError(
            f"the package is {size:.0f} MiB, and Ray takes less than {LIMIT_MB}; its largest file "
            f"is {most.name}: put it on storage that all nodes see and give the path that it has "
            "there (a path that is not on this machine is not packed)"
        )
    return config


def _take(source: Path, package: Path) -> str:
    """Copy a file or folder into the package, under what it holds; its path in the package."""
    digest = hashlib.sha256()
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    for file in files:
        if file.is_file():
            digest.update(str(file.relative_to(source.parent)).encode())
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    there = Path(INPUTS) / digest.hexdigest()[:16] / source.name
    (package / there).parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, package / there)
    else:
        shutil.copyfile(source, package / there)
    return str(there)


def settle(job: Mapping[str, Any], package: Path, study: Path) -> dict[str, Any]:
    """On the cluster: the packed files put beside the study's results, which outlive the package,
    and the job naming them there. They lie under what they hold: the same job names the same path.
    """
    settled = dict(job)
    kept = study / INPUTS
    source = package / INPUTS
    if not source.is_dir():
        return settled
    for made in source.iterdir():
        there = kept / made.name
        if not there.is_dir():
            kept.mkdir(parents=True, exist_ok=True)
            partial = kept / f".{made.name}.{uuid.uuid4().hex}"
            shutil.copytree(made, partial)
            with contextlib.suppress(OSError):  # another driver was faster
                partial.rename(there)
            shutil.rmtree(partial, ignore_errors=True)
    for key in (*FILES, "model"):
        value = str(settled.get(key) or "")
        scheme = "local-dir:" if value.startswith("local-dir:") else ""
        path = value.removeprefix(scheme)
        if path.startswith(f"{INPUTS}/"):
            settled[key] = scheme + str((kept / Path(path).relative_to(INPUTS)).absolute())
    return settled


# ----------------------------------------------------------------------------------------- the head


class Head:
    """A Ray head's job server. UserError where it does not answer, takes another token or is of
    another Ray.
    """

    def __init__(self, address: str) -> None:
        import ray
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        if "://" not in address:
            raise UserError(
                f"--address is {address!r}: accepted is the head's dashboard, as in "
                "http://head:8265"
            )
        self.address = address
        try:
            self.client = JobSubmissionClient(address)
            there = str(self._version())
            for name in QUIET:  # set anew by the client when it is made
                logging.getLogger(name).setLevel(logging.WARNING)
        except AuthenticationError as error:
            raise UserError(
                f"{address} does not take this token ({str(error).splitlines()[0]}): set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's"
            ) from error
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"no Ray answers at {address} ({' '.join(str(error).split())[:200]}): accepted is "
                "the head's dashboard, as in http://head:8265; is its port forwarded?"
            ) from error
        if there.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise UserError(
                f"the cluster at {address} runs Ray {there}, this is {ray.__version__}: install "
                f"ray=={there} here, or give the cluster an image with {ray.__version__}"
            )

    def _version(self) -> str:
        answer = self.client._do_request("GET", "/api/version")
        answer.raise_for_status()
        return str(answer.json()["ray_version"])

    def submit(self, job: Mapping[str, Any]) -> str:
        """Pack and submit a search; Ray's id of it. UserError as `pack`."""
        with tempfile.TemporaryDirectory(prefix="vitpareto-job-") as kept:
            package = Path(kept)
            config = pack(job, package)
            made = f"{config.name}-{uuid.uuid4().hex[:8]}"
            found = self.client.submit_job(
                entrypoint=f"python -m vitpareto search {JOB} --address auto --packed",
                submission_id=made,
                runtime_env={"working_dir": kept, "env_vars": {"PYTHONUNBUFFERED": "1"}},
                metadata={"study": config.name, "job": "vitpareto"},
            )
        return str(found)

    def jobs(self) -> list[Job]:
        """The searches that were submitted, the latest first."""
        found = []
        for one in self.client.list_jobs():
            about = one.metadata or {}
            if about.get("job") == "vitpareto" and one.submission_id:
                found.append(
                    Job(
                        one.submission_id, about.get("study", ""), str(one.status.value),
                        one.message or "", one.start_time or 0,
                    )
                )  # fmt: skip
        return sorted(found, key=lambda j: -j.begun_ms)

    def find(self, id: str) -> Job:
        """UserError, with the nearest, for an id that is none."""
        known = {j.id: j for j in self.jobs()}
        if id not in known:
            raise UserError(f"there is no job {id!r} at {self.address}{nearest(id, list(known))}")
        return known[id]

    def logs(self, id: str) -> str:
        self.find(id)
        return str(self.client.get_job_logs(id))

    def follow(self, id: str) -> Iterator[str]:
        """The log as it is written, until the job is over."""
        import asyncio

        self.find(id)
        lines: AsyncIterator[str] = self.client.tail_job_logs(id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(RuntimeError):  # whoever reads may have gone
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, id: str) -> Job:
        """Ask a job to stop; it as it stood before."""
        job = self.find(id)
        if not job.over:
            self.client.stop_job(id)
        return job


def described(job: Job) -> str:
    """Why a job failed, in a line; "" where it did not."""
    if job.status != "FAILED":
        return ""
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    # Ray puts the log's end behind its own words
    said = next((line for line in reversed(lines) if "error" in line.lower()), "")
    said = said or (lines[-1] if lines else "")
    return said if len(said) <= 300 else said[:297] + "..."
