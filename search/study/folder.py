"""A study on disk: one folder, which is the truth about the study.

STORE/NAME/study.json     what the numbers depend on (`identity`)
STORE/NAME/job.yaml       the job, as last requested
STORE/NAME/model.safetensors   the dense weights, mapped by every worker
STORE/NAME/optuna.journal Optuna's storage, or storage.json, which names the database that is
STORE/NAME/trials/*.json  one result per trial, written before Optuna is told (`trial_files`)
STORE/NAME/by_key/*.json  the same files by candidate
STORE/NAME/epoch          the driver's session
STORE/NAME/latency.json   latencies of the front (this and the following: `records`)
STORE/NAME/certified/*.json   the front's results on held-out images
STORE/NAME/prepared.json  preparations that trials share
STORE/NAME/recovered/*.json   the front's trials after fine-tuning
STORE/NAME/weights/*.safetensors   trained weights by content hash, which recipes name
STORE/NAME/training/KEY/  training in progress, by candidate; removed once its result is written
STORE/NAME/pictures/*.png token pictures of the front
STORE/NAME/explorer.html  the study as a page (`dashboards.explorer_page`)
STORE/NAME/lock           held by the one driver (`study_lock`)
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from vitpareto.search.errors import Code, UserError, closest, nearest
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.object_store import ObjectStore, store_folder
from vitpareto.search.files.write_through import fetch_if_missing, object_store_of
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.study.identity import StudyIdentity
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.records import (
    CertificationFiles,
    LatencyFile,
    PreparationsFile,
    RecoveryFiles,
)
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.study_lock import StudyLock
from vitpareto.search.study.trial_files import TrialFiles

DEFAULT_OBJECTIVES = ("top1", "gmacs")


def studies_in(store: Path) -> tuple[str, ...]:
    """Return the names of the studies in a store."""
    remote = object_store_of(store)
    if isinstance(remote, ObjectStore):
        return remote.list_folders(store)
    if not store.is_dir():
        return ()
    return tuple(sorted(p.parent.name for p in store.glob("*/study.json")))


def _missing(study: StudyFolder, store: str) -> UserError:
    """The error for a study that does not exist, which names what does."""
    root, name = study.folder.parent, study.name
    known = studies_in(root)
    if known:
        problem = f"study {name!r} does not exist in {store}{nearest(name, known)}"
    elif object_store_of(root) is None and not root.is_dir():
        problem = (
            f"the store must be a folder that exists (got {store}): give the folder that holds "
            f"study {name!r} with --store, or in VITPARETO_STORE"
        )
    else:
        problem = (
            f"study {name!r} does not exist in {store}, which holds no study: give another store "
            "with --store, or in VITPARETO_STORE"
        )
    return UserError(
        problem, Code.NOT_FOUND, study=name, store=store, known=list(known),
        closest=closest(name, known),
    )  # fmt: skip


@dataclass(frozen=True)
class StudyFolder:
    """The location of a study, its job, and access to its files by kind. Workers carry it."""

    folder: Path

    @classmethod
    def open(cls, store: str, name: str) -> StudyFolder:
        """Return the study, which need not exist; from object storage its files are fetched."""
        root = store_folder(store)
        remote = object_store_of(root)
        if isinstance(remote, ObjectStore):
            remote.download_tree(root / name)
        return cls(root / name)

    @classmethod
    def find(cls, store: str | Path, name: str) -> StudyFolder:
        """Return an existing study.

        Raises:
            UserError: the study does not exist, or a newer version wrote it.
        """
        study = cls.open(str(store), name)
        if not study.exists:
            raise _missing(study, str(store))
        study.identity.read()
        return study

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def store(self) -> str:
        """The store that holds the study, as a job names it."""
        remote = object_store_of(self.folder)
        return remote.url if isinstance(remote, ObjectStore) else str(self.folder.parent)

    @property
    def exists(self) -> bool:
        return self.identity.exists

    def create(self) -> None:
        """Create the folder, and check that it can be written.

        Raises:
            UserError: it cannot.
        """
        try:
            for name in ("trials", "by_key"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            # a temporary name: another driver may do the same
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            path = str(error.filename or self.folder)
            raise UserError(
                f"the store must be writable (got {path}: {error.strerror})",
                Code.UNWRITABLE, path=path,
            ) from error  # fmt: skip

    def publish(self) -> None:
        """Upload pages and pictures to the object storage that holds the study, if one does."""
        remote = object_store_of(self.folder)
        if isinstance(remote, ObjectStore):
            remote.upload_tree(self.folder)

    # -- files by kind ---------------------------------------------------------------------------

    @property
    def identity(self) -> StudyIdentity:
        return StudyIdentity(self.folder)

    @property
    def lock(self) -> StudyLock:
        return StudyLock(self.folder)

    @property
    def trials(self) -> TrialFiles:
        return TrialFiles(self.folder)

    @property
    def latencies(self) -> LatencyFile:
        return LatencyFile(self.folder / "latency.json")

    @property
    def preparations(self) -> PreparationsFile:
        return PreparationsFile(self.folder / "prepared.json")

    @property
    def recovery(self) -> RecoveryFiles:
        return RecoveryFiles(self.folder / "recovered")

    def certification(self, recovered: bool = False) -> CertificationFiles:
        """Return the certification of the front, or of the recovered trials."""
        folder = self.recovery.folder if recovered else self.folder
        return CertificationFiles(folder / "certified")

    @property
    def journal(self) -> Path:
        return self.folder / "optuna.journal"

    @property
    def database(self) -> Path:
        """The file that names the database with Optuna's trials, if that is not the journal."""
        return self.folder / "storage.json"

    @property
    def weights(self) -> Path:
        """The dense model's weights."""
        path = self.folder / "model.safetensors"
        fetch_if_missing(path)
        return path

    @property
    def artifacts(self) -> WeightStore:
        """Trained weights, by digest."""
        return WeightStore(self.folder / "weights")

    def picture(self, trial: int) -> Path:
        """Return the path of a trial's token picture."""
        return self.folder / "pictures" / f"{trial:06d}.png"

    def training(self, key: str) -> Path:
        """Return the folder of a candidate's training, by `Recipe.key` as proposed."""
        return self.folder / "training" / key

    # -- job and measurements ----------------------------------------------------------------------

    def job(self) -> JobRequest:
        """Return the job as last requested; empty if there is none."""
        path = self.folder / "job.yaml"
        if not path.is_file():
            return JobRequest()
        return JobRequest(yaml.safe_load(path.read_text(encoding="utf-8")) or {})

    def write_job(self, job: JobRequest) -> None:
        write_atomic(self.folder / "job.yaml", yaml.safe_dump(dict(job.keys), sort_keys=False))

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives of the search."""
        return self.job().objectives or DEFAULT_OBJECTIVES

    def measured(self) -> list[TrialResult]:
        """Return all results, with the front's latencies among their values."""
        latencies = self.latencies.read()
        results = []
        for result in self.trials.all():
            timed = latencies.get(result.trial)
            if timed is not None and "latency_ms" not in result.values:
                values = {
                    **result.values,
                    "latency_ms": timed.p50_ms,
                    "images_per_s": timed.images_per_s,
                }
                result = dataclasses.replace(result, values=values)
            results.append(result)
        return results
