"""Pack a search job for a Ray cluster, and unpack its files there.

A package holds the project's own code, the job, and the files of this machine that the job names,
so that a cluster needs the packages that the project depends on and nothing else. It holds no
secrets: tokens and passwords come from the environment, here and there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vitpareto.methods import Code
from vitpareto.search.code_identity import PACKAGE, copy_code
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig

#: folder of the job's files in a package, and the job file
INPUTS, JOB = "inputs", "job.yaml"
#: Ray's limit of a package in MiB; Ray's name for it is GCS_STORAGE_MAX_SIZE
LIMIT_MB = 512
#: job keys that may name files of this machine
FILE_KEYS = ("weights", "profile")
LOCAL_MODEL = "local-dir:"


def pack_job(job: Mapping[str, Any], package: Path) -> SearchConfig:
    """Write what the cluster runs into an empty folder: code, job, and the files that it names.

    Raises UserError for a wrong job, a store that ends with the cluster, and a package above Ray's
    limit.
    """
    config = SearchConfig.of(job)
    store = str(job.get("store") or "")
    if "://" not in store and not os.path.isabs(store):
        raise UserError(
            f"store must outlive the cluster (got {store!r}); give --store with a folder that all "
            "nodes mount (/shared/studies) or object storage (s3://BUCKET/studies)",
            Code.UNSUPPORTED,
            key="store",
            got=store,
        )
    packed = dict(job)
    for key in FILE_KEYS:
        if packed.get(key) and Path(packed[key]).is_file():
            packed[key] = _add_input(Path(packed[key]), package)
    model = str(packed.get("model") or "")
    folder = Path(model.removeprefix(LOCAL_MODEL))
    if model.startswith(LOCAL_MODEL) and folder.is_dir():
        packed["model"] = f"{LOCAL_MODEL}{_add_input(folder, package)}"
    copy_code(package / PACKAGE)
    (package / JOB).write_text(yaml.safe_dump(packed, sort_keys=False), encoding="utf-8")
    _check_size(package)
    return config


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


def store_inputs(job: Mapping[str, Any], package: Path, study: Path) -> dict[str, Any]:
    """On the cluster: copy a package's files to the study, which outlives the package.

    Returns the job with their new paths. The same job submitted again gets the same paths.
    """
    stored = dict(job)
    target = study / INPUTS
    if not (package / INPUTS).is_dir():
        return stored
    for source in (package / INPUTS).iterdir():
        _copy_once(source, target / source.name)
    for key in (*FILE_KEYS, "model"):
        value = str(stored.get(key) or "")
        scheme = LOCAL_MODEL if value.startswith(LOCAL_MODEL) else ""
        path = value.removeprefix(scheme)
        if path.startswith(f"{INPUTS}/"):
            stored[key] = scheme + str((target / Path(path).relative_to(INPUTS)).absolute())
    return stored


def _copy_once(source: Path, target: Path) -> None:
    """Copy a folder so that it exists whole or not at all; an existing one is left as it is."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copytree(source, partial)
    with contextlib.suppress(OSError):  # another driver copied the same content first
        partial.rename(target)
    shutil.rmtree(partial, ignore_errors=True)
