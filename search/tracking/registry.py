"""A bundle in MLflow's model registry: `vitpareto-STUDY`, a version an export, ONNX flavour.

`mlflow models serve -m models:/vitpareto-STUDY@champion` needs onnxruntime and nothing of ours.
Aliases say what a version is: `champion` (what the user ships), and of the study's front the `knee`
and the `fastest`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitpareto.methods import Recipe
from vitpareto.methods.engine.errors import nearest
from vitpareto.search.errors import UserError
from vitpareto.search.export.bundle import knee_trial
from vitpareto.search.export.verification import Measured, check_files, normalised
from vitpareto.search.study.certificates import measured
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking import client as mlflow_client
from vitpareto.search.tracking.mirror import connect, shown_uri, sync, tracking_uri

ALIASES = ("champion", "knee", "fastest")
#: where the model lies among its run's artifacts
PLACE = "model"
#: of the bundle, beside the model: what an image goes through, and what a class is called
BESIDE = ("preprocess.json", "labels.json", "recipe.yaml", "result.json", "README.md")
#: what the model needs to be served
NEEDS = ("onnx", "onnxruntime", "numpy", "pandas")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and how it is addressed."""

    name: str
    version: str
    aliases: tuple[str, ...]
    uri: str

    @property
    def address(self) -> str:
        """models:/NAME@ALIAS, or /VERSION where it has no alias."""
        where = f"@{self.aliases[0]}" if self.aliases else f"/{self.version}"
        return f"models:/{self.name}{where}"


def model_name(study: str) -> str:
    """Of the registered model: MLflow takes no / and no : in one."""
    return f"vitpareto-{study}"


def aliases_of(folder: StudyFolder, result: TrialResult, recovered: bool) -> tuple[str, ...]:
    """Which of `knee` and `fastest` this trial is, of the study's front (or the recovered one)."""
    objectives = folder.job()["objectives"]
    results = measured(folder, recovered)
    knee = knee_trial(results, objectives)
    fast = fastest(front_of(results, objectives_named(objectives)))
    found = {"knee": knee, "fastest": fast}
    return tuple(k for k, r in found.items() if r is not None and r.trial == result.trial)


def check_aliases(
    folder: StudyFolder, result: TrialResult, asked: Sequence[str], recovered: bool
) -> None:
    """UserError for an alias that is none, with the nearest, or that the trial is not."""
    for alias in asked:
        if alias not in ALIASES:
            raise UserError(f"alias {alias!r}{nearest(alias, ALIASES)}")
    is_it = ("champion", *aliases_of(folder, result, recovered))
    for alias in asked:
        if alias not in is_it:
            raise UserError(f"trial {result.trial} is not the {alias} of {folder.name}'s front")


def fastest(front: Sequence[TrialResult]) -> TrialResult | None:
    """The front's member of least latency, where all of it was timed; else that of fewest MACs."""
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
) -> Registered:
    """Put the bundle's ONNX program into the registry, as a version of the study's model, beside
    the trial's run; aliases are moved to it.

    aliases: those asked for; none: `knee` and `fastest` where the trial is that, and `champion`
    where the model has none yet. UserError: an alias that the trial is not, a server that cannot be
    reached, no server.
    """
    check_aliases(folder, result, aliases, recovered)
    said = check_files(bundle)
    if uri == "none":
        raise UserError("the job's tracking_uri is none: name a server with --tracking-uri")
    where = tracking_uri(folder, uri)
    try:
        mirror = connect(folder, where)
        if result.trial not in mirror.runs:
            sync(folder, uri)
            mirror.read()
        client, run_id = mirror.client, mirror.runs[result.trial].run_id
        name = model_name(folder.name)
        with tempfile.TemporaryDirectory(prefix="vitpareto-register-") as scratch:
            place = Path(scratch) / PLACE
            save_model(bundle, place)
            client.log_artifacts(run_id, str(place), PLACE)
        if not any(m.name == name for m in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name, description=_about(folder))
        source = client.get_run(run_id).info.artifact_uri + f"/{PLACE}"
        made = client.create_model_version(
            name, source, run_id, tags=_tags(folder, result, said, recovered)
        )
        known = client.get_registered_model(name).aliases
        given = tuple(aliases) or (
            *(() if "champion" in known else ("champion",)),
            *aliases_of(folder, result, recovered),
        )
        for alias in given:
            client.set_registered_model_alias(name, alias, made.version)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {shown_uri(where)} failed: {error}") from error
    return Registered(name, str(made.version), given, shown_uri(where))


def save_model(bundle: Path, place: Path) -> None:
    """The bundle as an MLflow model of ONNX flavour, with signature and input example."""
    import onnx

    preprocess = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    known = Measured.load(bundle / "verify.npz")
    image = normalised(known.images[:1], preprocess).numpy()
    logits = known.logits[:1].astype(np.float32)
    outputs = {
        "logits": logits,
        "score": np.zeros(1, np.float32),
        "class": logits.argmax(axis=1).astype(np.int64),
    }
    mlflow_client.quiet()
    with warnings.catch_warnings():
        # of modules of MLflow's own, when they are imported
        warnings.filterwarnings("ignore", ".*Any type hint is inferred")
        import mlflow.onnx
        from mlflow.models import infer_signature

        mlflow.onnx.save_model(
            onnx.load(bundle / "model.onnx"),
            str(place),
            signature=infer_signature({"images": image}, outputs),
            input_example={"images": image},
            pip_requirements=_requirements(),
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    for name in BESIDE:
        shutil.copy(bundle / name, place / name)


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in NEEDS]


def _about(folder: StudyFolder) -> str:
    job = folder.job()
    return (
        f"Models of the study {folder.name}: {job['model']} on {job['data']}. Input: images "
        "[N, 3, H, W] in float32, as preprocess.json beside the model says; outputs: logits, score "
        "and class, whose names are in labels.json."
    )


def _tags(
    folder: StudyFolder, result: TrialResult, said: dict[str, Any], recovered: bool
) -> dict[str, str]:
    axes = objectives_named(folder.job()["objectives"])
    front = [r.trial for r in front_of(measured(folder, recovered), axes)]
    place = f"{front.index(result.trial) + 1} of {len(front)}" if result.trial in front else "none"
    own, verification = result.certified, said["verification"]
    tags = {
        "study": folder.name,
        "trial": str(result.trial),
        "recipe": Recipe.from_dict(said["recipe"]).to_yaml(),
        "front": place,
        "recovered": str(recovered).lower(),
        "top1": f"{result.values['top1']:.4f}",
        "gmacs": f"{result.values['gmacs']:.6g}",
        "verified": str(verification["verified"]).lower(),
        "verified.images": str(verification["images"]),
        "verified.max_difference": f"{verification['max_difference']:.2e}",
        "seal": said["seal"],
    }
    if own is not None:
        tags["certified_top1"] = f"{own.top1:.4f} ({own.low:.4f} to {own.high:.4f})"
    return tags
