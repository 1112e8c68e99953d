"""Uploading a study's files and the table of its front to an MLflow run."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front_table import FrontRow
from vitpareto.search.tracking.page import StudyPage

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: name of the front's table among the artifacts
TABLE = "front.json"


@dataclass(frozen=True)
class ArtifactSet:
    """Artifacts of a run. `digest` is a hash of all of them, so that equal ones are not uploaded.

    `files` are local files by artifact name, `table` the rows of the front.
    """

    files: Mapping[str, Path]
    table: Sequence[FrontRow]
    digest: str

    @classmethod
    def of(cls, folder: StudyFolder, page: StudyPage) -> ArtifactSet:
        """The files of a page that exist, its table, and the study's job file."""
        files = {name: path for name, path in page.artifacts.items() if path.is_file()}
        job = folder.folder / "job.yaml"
        if job.is_file():
            files.setdefault("job.yaml", job)
        table = json.dumps([row.to_json() for row in page.table], default=str)
        digest = hashlib.sha256(table.encode())
        for name, path in sorted(files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return cls(files, page.table, digest.hexdigest())

    @property
    def names(self) -> set[str]:
        return set(self.files) | ({TABLE} if self.table else set())


def artifact_names(client: MlflowClient, run_id: str) -> set[str]:
    """The artifacts of a run, at most one folder deep, as this package names them."""
    found = client.list_artifacts(run_id)
    return {f.path for f in found if not f.is_dir} | {
        f.path for d in found if d.is_dir for f in client.list_artifacts(run_id, d.path)
    }


def upload(client: MlflowClient, run_id: str, artifacts: ArtifactSet, existing: set[str]) -> None:
    """Upload all artifacts; `existing` are the names that the run has."""
    for name, path in artifacts.files.items():
        _upload_file(client, run_id, name, path)
    if artifacts.table:
        _upload_table(client, run_id, artifacts.table, replace=TABLE in existing)


def _upload_file(client: MlflowClient, run_id: str, name: str, path: Path) -> None:
    folder, _, file_name = name.rpartition("/")
    if path.name == file_name:
        client.log_artifact(run_id, str(path), folder or None)
        return
    with tempfile.TemporaryDirectory(prefix="vitpareto-mlflow-") as scratch:
        copied = shutil.copy(path, Path(scratch) / file_name)
        client.log_artifact(run_id, str(copied), folder or None)


def _upload_table(
    client: MlflowClient, run_id: str, table: Sequence[FrontRow], *, replace: bool
) -> None:
    import pandas as pd

    # log_table selects columns of dtype object, and pandas warns about other dtypes
    frame = pd.DataFrame([row.to_json() for row in table], dtype=object)
    if replace:  # log_table would append to the existing table
        text = frame.to_json(orient="split", index=False, date_format="iso")
        client.log_text(run_id, text, TABLE)
    else:
        client.log_table(run_id, frame, TABLE)
