"""`result.json` of a bundle as typed records. Data only: nothing here runs a model.

The keys on disk are those of the fields; `to_json` and `from_json` convert. Bundles of earlier
versions, which lack some keys, are read too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vitpareto.search.export.program_results import Int8Result, SpecialisedProgram
from vitpareto.search.measure.latency import Latency
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe

SCHEMA = 1
FILE = "result.json"


@dataclass(frozen=True)
class BundleAccuracy:
    """Accuracy of the measured model on `images` images of `split`, in percent.

    `top1_low` and `top1_high` are the interval that `interval` names.
    """

    top1: float
    top1_low: float | None
    top1_high: float | None
    interval: str
    top5: float | None
    images: int
    split: str


@dataclass(frozen=True)
class ExportSettings:
    """How the programs were written. `seconds` is the export time by program ("pt2", "onnx")."""

    dtype: str
    device: str
    versions: Mapping[str, str]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class VerificationSummary:
    """What `verification.json` holds in full.

    `tolerance` and `max_difference` are in logits; `near_tied` is the largest count of near-tied
    images; `not_checked` lists what could not be checked and why.
    """

    verified: bool
    images: int
    tolerance: float
    max_difference: float
    near_tied: int
    not_checked: tuple[str, ...]


@dataclass(frozen=True)
class FileRecord:
    """Hash and size of a file of the bundle; the size is None in bundles that do not state it."""

    sha256: str
    bytes: int | None


@dataclass(frozen=True)
class BundleResult:
    """What a bundle is, what it was measured with, and the hash of each of its files.

    Attributes:
        model: the dense model's name. `architecture` and `model_args` are timm's, for a model from
            a local folder; None and empty for any other.
        study, trial: the trial that was exported.
        recipe: the resolved recipe.
        cost: cost objectives by name, in the units of `search.study.objectives.OBJECTIVES`.
        latency: the trial's latency, if it was measured.
        dense: all objectives of the dense model by name.
        measured_with: provenance of the trial.
        rebuilt_as_measured: on how many verification images the rebuilt model is right or wrong as
            the trial was, for example "20 of 20".
        labels: class names. `head_indices` are the logits that stand for them; None: all.
        packages: additional programs, other than int8.
        files: hash and size of each file but `result.json`.
        seal: hash of `result.json` without the seal.
    """

    model: str
    study: str
    trial: int
    recipe: RecordedRecipe
    accuracy: BundleAccuracy
    cost: Mapping[str, float]
    latency: Latency | None
    dense: Mapping[str, float] | None
    measured_with: Provenance
    exported: ExportSettings
    rebuilt_as_measured: str
    labels: tuple[str, ...]
    head_indices: tuple[int, ...] | None
    architecture: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    verification: VerificationSummary | None = None
    int8: Int8Result | None = None
    packages: tuple[SpecialisedProgram, ...] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    seal: str = ""
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`, without the seal."""
        source = {}
        if self.architecture is not None:
            source = {"architecture": self.architecture, "model_args": dict(self.model_args)}
        head, top5 = self.head_indices, self.accuracy.top5
        objectives = ("top1", *(() if top5 is None else ("top5",)), *self.cost)
        return {
            "schema": self.schema,
            "model": self.model,
            **source,
            "study": self.study,
            "trial": self.trial,
            "recipe": self.recipe.to_json(),
            "accuracy": asdict(self.accuracy),
            "cost": {
                **self.cost,
                "units": {n: OBJECTIVES[n].unit for n in objectives if n in OBJECTIVES},
            },
            "latency": None if self.latency is None else self.latency.to_json(),
            "dense": None if self.dense is None else dict(self.dense),
            **_measured_with(self.measured_with),
            "exported": asdict(self.exported),
            "rebuilt_as_measured": self.rebuilt_as_measured,
            "labels": list(self.labels),
            "head_indices": None if head is None else list(head),
            "verification": None if self.verification is None else asdict(self.verification),
            **({} if self.int8 is None else {"int8": self.int8.to_json()}),
            "packages": [asdict(program) for program in self.packages],
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> BundleResult:
        """Read `result.json`, of this or an earlier version.

        Raises KeyError or TypeError for a missing key or a value of another type.
        """
        head, latency, int8 = stored["head_indices"], stored.get("latency"), stored.get("int8")
        verification, exported = stored.get("verification"), stored["exported"]
        return cls(
            schema=stored["schema"],
            model=stored["model"],
            architecture=stored.get("architecture"),
            model_args=stored.get("model_args", {}),
            study=stored["study"],
            trial=stored["trial"],
            recipe=RecordedRecipe.from_json(stored["recipe"]),
            accuracy=BundleAccuracy(**_known(BundleAccuracy, stored["accuracy"])),
            cost={k: v for k, v in stored["cost"].items() if k != "units"},
            latency=None if latency is None else Latency.from_json(latency),
            dense=stored["dense"],
            measured_with=_provenance(stored),
            exported=ExportSettings(**_known(ExportSettings, exported)),
            rebuilt_as_measured=stored["rebuilt_as_measured"],
            labels=tuple(stored["labels"]),
            head_indices=None if head is None else tuple(head),
            verification=None if verification is None else _verification(verification),
            int8=None if int8 is None else Int8Result.from_json(int8),
            packages=tuple(
                SpecialisedProgram(**_known(SpecialisedProgram, program))
                for program in stored.get("packages", ())
            ),
            files={
                name: FileRecord(record["sha256"], record.get("bytes"))
                for name, record in stored.get("files", {}).items()
            },
            seal=stored.get("seal", ""),
        )


def seal_of(stored: Mapping[str, Any]) -> str:
    """sha256 of the content of `result.json` without its `seal`."""
    rest = {k: v for k, v in stored.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _measured_with(provenance: Provenance) -> dict[str, Any]:
    """The keys of `result.json` that hold the provenance: three of its values lie outside."""
    values = provenance.to_json()
    fingerprint = values.pop("data_fingerprint", None)
    versions = values.pop("versions", {})
    return {
        "measured_with": {**values, "versions": versions},
        "seed": provenance.seed,
        "device": provenance.device,
        "data_fingerprint": fingerprint,
    }


def _provenance(stored: Mapping[str, Any]) -> Provenance:
    """The inverse of `_measured_with`."""
    outside = {key: stored.get(key) for key in ("seed", "device", "data_fingerprint")}
    return Provenance.from_json({**outside, **stored["measured_with"]})


def _verification(stored: Mapping[str, Any]) -> VerificationSummary:
    values = _known(VerificationSummary, stored)
    return VerificationSummary(**{**values, "not_checked": tuple(values["not_checked"])})


def _known(record: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record's fields; keys that a later version added are left out."""
    names = {f.name for f in fields(record)}
    return {k: v for k, v in stored.items() if k in names}
