"""Pack a search job for a Ray cluster, and unpack its files there.

A package holds the project's own code, the job, and the files of this machine that the job names.
The cluster needs only the dependencies of the project. A package holds no secrets: tokens and
passwords come from the environment, on this machine and on the cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import yaml

from vitpareto.methods import Code
from vitpareto.search.code_identity import PACKAGE, copy_code
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_keys import KEYS
from vitpareto.search.study.job_request import JobRequest

#: folder of the job's files in a package, and the job file
INPUTS, JOB = "inputs", "job.yaml"
#: Ray's limit of a package in MiB; Ray's name for it is GCS_STORAGE_MAX_SIZE
LIMIT_MB = 512


def pack_job(job: JobRequest, package: Path) -> SearchConfig:
    """Write what the cluster runs into an empty folder: code, job, and the files that it names.

    Raises UserError for a wrong job, a store that ends with the cluster, and a package above Ray's
    limit.
    """
    config = job.config()
    store = job.store
    if "://" not in store and not os.path.isabs(store):
        raise UserError(
            f"store must outlive the cluster (got {store!r}); give --store with a folder that all "
            "nodes mount (/shared/studies) or object storage (s3://BUCKET/studies)",
            Code.UNSUPPORTED,
            key="store",
            got=store,
        )
    inputs = {
        name: scheme + _add_input(path, package)
        for name, scheme, path in _paths(job)
        if path.exists()
    }
    packed = job.changed(**inputs)
    copy_code(package / PACKAGE)
    text = yaml.safe_dump(dict(packed.keys), sort_keys=False)
    (package / JOB).write_text(text, encoding="utf-8")
    _check_size(package)
    return config


def _paths(job: JobRequest) -> Iterator[tuple[str, str, Path]]:
    """(key, what precedes the path, path) for each key that names a file or folder."""
    for key in KEYS.values():
        value, scheme = job.text(key.name), key.path_after
        if scheme is not None and value.startswith(scheme) and value != scheme:
            yield key.name, scheme, Path(value.removeprefix(scheme))


def _check_size(package: Path) -> None:
    """Raise UserError if a package is above Ray's limit."""
    files = [f for f in package.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files) / 2**20
    if size >= LIMIT_MB:
        largest = max((package / INPUTS).rglob("*"), key=lambda f: f.stat().st_size)
        raise UserError(
            f"a package must be below {LIMIT_MB} MiB (got {size:.0f}, largest file "
            f"{largest.name}); put the file on storage that all nodes see and give its path there "
            "(a path that does not exist on this machine is not packed)",
            Code.OUT_OF_RANGE,
            got=round(size),
            accepted=LIMIT_MB,
            largest=largest.name,
        )


def _add_input(source: Path, package: Path) -> str:
    """Copy a file or folder into the package, under a hash of its content.

    Returns its path in the package. The same content gets the same path.
    """
    digest = hashlib.sha256()
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    for file in files:
        if file.is_file():
            digest.update(str(file.relative_to(source.parent)).encode())
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    path = Path(INPUTS) / digest.hexdigest()[:16] / source.name
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, package / path)
    else:
        shutil.copyfile(source, package / path)
    return str(path)


def store_inputs(job: JobRequest, package: Path, study: Path) -> JobRequest:
    """On the cluster: copy a package's files to the study, which outlives the package.

    Returns the job with their new paths. The same job submitted again gets the same paths.
    """
    target = study / INPUTS
    if not (package / INPUTS).is_dir():
        return job
    for source in (package / INPUTS).iterdir():
        _copy_once(source, target / source.name)
    stored = {
        name: scheme + str((target / path.relative_to(INPUTS)).absolute())
        for name, scheme, path in _paths(job)
        if path.is_relative_to(INPUTS)
    }
    return job.changed(**stored)


def _copy_once(source: Path, target: Path) -> None:
    """Copy a folder completely or not at all; an existing one is not changed."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copytree(source, partial)
    with contextlib.suppress(OSError):  # another driver copied the same content first
        partial.rename(target)
    shutil.rmtree(partial, ignore_errors=True)
