"""The MLflow model registry: `vitpareto-STUDY` with one ONNX version per exported bundle.

`mlflow models serve -m models:/vitpareto-STUDY@champion` needs onnxruntime and nothing of this
project. Aliases: `champion` is the version to deploy, `knee` and `fastest` are the versions of
these members of the study's front.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitpareto.search.errors import Code, UserError
from vitpareto.search.export.bundle_result import BundleResult
from vitpareto.search.export.preprocessing import normalised
from vitpareto.search.export.reference_outputs import ReferenceOutputs
from vitpareto.search.export.verification import check_files
from vitpareto.search.runtimes.exported_program import load_onnx
from vitpareto.search.study.certificates import measured
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking.client import configure_environment
from vitpareto.search.tracking.connection import connect
from vitpareto.search.tracking.server_address import shown_uri, tracking_uri
from vitpareto.search.tracking.study_runs import StudyRuns
from vitpareto.search.tracking.sync import sync
from vitpareto.search.versions import package_versions

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ALIASES = ("champion", "knee", "fastest")
#: name of the model among the artifacts of its run
MODEL_ARTIFACT = "model"
#: files of the bundle stored with the model: preprocessing, class names, recipe and figures
BUNDLE_FILES = ("preprocess.json", "labels.json", "recipe.yaml", "result.json", "README.md")
#: packages needed to serve the model
REQUIREMENTS = ("onnx", "onnxruntime", "numpy", "pandas")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model on the server at `uri` (shown without a password)."""

    name: str
    version: str
    aliases: tuple[str, ...]
    uri: str

    @property
    def address(self) -> str:
        """models:/NAME@ALIAS, or models:/NAME/VERSION if it has no alias."""
        version = f"@{self.aliases[0]}" if self.aliases else f"/{self.version}"
        return f"models:/{self.name}{version}"


def model_name(study: str) -> str:
    """The name of a study's registered model. MLflow does not allow / and : in it."""
    return f"vitpareto-{study}"


def aliases_of(folder: StudyFolder, result: TrialResult, recovered: bool) -> tuple[str, ...]:
    """Which of `knee` and `fastest` a trial is on the front, or on the recovered front."""
    axes = objectives_named(folder.objectives)
    results = measured(folder, recovered)
    front = front_of(results, axes)
    found = {"knee": knee_of(front, axes, reference_of(results)), "fastest": fastest(front)}
    return tuple(k for k, r in found.items() if r is not None and r.trial == result.trial)


def check_aliases(
    folder: StudyFolder, result: TrialResult, aliases: Sequence[str], recovered: bool
) -> None:
    """Raises UserError for an unknown alias, or one that describes another trial."""
    for alias in aliases:
        if alias not in ALIASES:
            raise UserError.unknown(
                f"unknown alias {alias!r}",
                alias,
                ALIASES,
                alias=alias,
                accepted=ALIASES,
            )
    valid = ("champion", *aliases_of(folder, result, recovered))
    for alias in aliases:
        if alias not in valid:
            raise UserError(
                f"trial {result.trial} is not the {alias} of the front of study {folder.name!r}",
                Code.MISMATCH,
                alias=alias,
                trial=result.trial,
            )


def fastest(front: Sequence[TrialResult]) -> TrialResult | None:
    """The member with the lowest latency; the lowest GMACs if one has no latency."""
    if not front:
        return None
    cost = "latency_ms" if all("latency_ms" in r.values for r in front) else "gmacs"
    return min(front, key=lambda r: (r.values[cost], r.trial))


def register(
    folder: StudyFolder,
    result: TrialResult,
    bundle: Path,
    *,
    aliases: Sequence[str] = (),
    uri: str | None = None,
    recovered: bool = False,
) -> RegisteredVersion:
    """Add a bundle's ONNX program to the registry as a version of the study's model.

    Args:
        folder: the study.
        result: the trial that was exported. The model is stored with its run.
        bundle: the exported bundle.
        aliases: aliases to move to this version. By default `knee` and `fastest` if the trial is
            that, and `champion` if no version has it.
        uri: as for `tracking_uri`.
        recovered: whether the fine-tuned model was exported.

    Raises:
        UserError: an alias is not valid, tracking is off, or the server does not answer.
    """
    check_aliases(folder, result, aliases, recovered)
    bundle_result = check_files(bundle)
    if uri == "none":
        raise UserError(
            "the study has no MLflow server (tracking_uri is 'none'): name one with --tracking-uri",
            Code.MISSING,
            key="tracking_uri",
        )
    server = tracking_uri(folder, uri)
    tags = _tags(folder, result, bundle_result, recovered)
    try:
        runs = connect(folder, server)
        if result.trial not in runs.runs:
            sync(folder, uri)
            runs.read()
        name = model_name(folder.name)
        made = _create_version(runs, folder, result.trial, bundle, tags)
        given = tuple(aliases) or _default_aliases(runs, folder, result, recovered)
        for alias in given:
            runs.client.set_registered_model_alias(name, alias, made)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {shown_uri(server)} failed: {error}",
            Code.UNAVAILABLE,
            server=shown_uri(server),
        ) from error
    return RegisteredVersion(name, made, given, shown_uri(server))


def _default_aliases(
    runs: StudyRuns, folder: StudyFolder, result: TrialResult, recovered: bool
) -> tuple[str, ...]:
    """`champion` if no version has it, and what the trial is on the front."""
    stored = runs.client.get_registered_model(model_name(folder.name)).aliases
    champion = () if "champion" in stored else ("champion",)
    return (*champion, *aliases_of(folder, result, recovered))


def _create_version(
    runs: StudyRuns, folder: StudyFolder, trial: int, bundle: Path, tags: dict[str, str]
) -> str:
    """Upload the model to the trial's run and create a version from it."""
    client: MlflowClient = runs.client
    run_id, name = runs.runs[trial].run_id, model_name(folder.name)
    with tempfile.TemporaryDirectory(prefix="vitpareto-register-") as scratch:
        model = Path(scratch) / MODEL_ARTIFACT
        save_model(bundle, model)
        client.log_artifacts(run_id, str(model), MODEL_ARTIFACT)
    if not any(m.name == name for m in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, description=_description(folder))
    source = client.get_run(run_id).info.artifact_uri + f"/{MODEL_ARTIFACT}"
    return str(client.create_model_version(name, source, run_id, tags=tags).version)


def save_model(bundle: Path, folder: Path) -> None:
    """Write the bundle as an MLflow model (ONNX flavour) with signature and input example."""
    preprocess = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    reference = ReferenceOutputs.load(bundle / "verify.npz")
    image = normalised(reference.images[:1], preprocess).numpy()
    logits = reference.logits[:1].astype(np.float32)
    outputs = {
        "logits": logits,
        "score": np.zeros(1, np.float32),
        "class": logits.argmax(axis=1).astype(np.int64),
    }
    configure_environment()
    with warnings.catch_warnings():
        # raised by modules of MLflow when they are imported
        warnings.filterwarnings("ignore", ".*Any type hint is inferred")
        import mlflow.onnx
        from mlflow.models import infer_signature

        mlflow.onnx.save_model(
            load_onnx(bundle / "model.onnx"),
            str(folder),
            signature=infer_signature({"images": image}, outputs),
            input_example={"images": image},
            pip_requirements=[
                f"{name}=={version}" for name, version in package_versions(*REQUIREMENTS).items()
            ],
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    for name in BUNDLE_FILES:
        shutil.copy(bundle / name, folder / name)


def _description(folder: StudyFolder) -> str:
    job = folder.job()
    return (
        f"Models of the study {folder.name}: {job.model} on {job.data}. Input: images "
        "[N, 3, H, W] in float32, preprocessed as in preprocess.json next to the model. Outputs: "
        "logits, score and class; labels.json has the names of the classes."
    )


def _tags(
    folder: StudyFolder, result: TrialResult, bundle_result: BundleResult, recovered: bool
) -> dict[str, str]:
    axes = objectives_named(folder.objectives)
    front = [r.trial for r in front_of(measured(folder, recovered), axes)]
    position = "none"
    if result.trial in front:
        position = f"{front.index(result.trial) + 1} of {len(front)}"
    certified, verification = result.certified, bundle_result.verification
    assert verification is not None, "every bundle that is written completely is verified"
    tags = {
        "study": folder.name,
        "trial": str(result.trial),
        "recipe": bundle_result.recipe.to_recipe().to_yaml(),
        "front": position,
        "recovered": str(recovered).lower(),
        "top1": f"{result.values['top1']:.4f}",
        "gmacs": f"{result.values['gmacs']:.6g}",
        "verified": str(verification.verified).lower(),
        "verified.images": str(verification.images),
        "verified.max_difference": f"{verification.max_difference:.2e}",
        "seal": bundle_result.seal,
    }
    if certified is not None:
        tags["certified_top1"] = (
            f"{certified.top1:.4f} ({certified.low:.4f} to {certified.high:.4f})"
        )
    return tags
