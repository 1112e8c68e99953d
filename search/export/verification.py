"""Verifies a bundle: its files are unchanged, and its programs are the model that was measured.

`verify` hashes every file, rebuilds the eager model from recipe and weights, and runs the ONNX and
torch.export programs in a fresh process that can import neither this project nor timm. It changes
nothing in the bundle. Hashes show that a file was edited, not who wrote it: torch.export.load runs
only after they match, and only bundles from a trusted origin should be verified.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

from vitpareto.methods import BadInput, Code, Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.export import bundle_result, preprocessing
from vitpareto.search.export.bundle_result import BundleResult, VerificationSummary, seal_of
from vitpareto.search.export.isolated_process import BATCHES, IsolatedRun, run_isolated
from vitpareto.search.export.preprocessing import normalised
from vitpareto.search.export.reference_outputs import (
    Comparison,
    Floats,
    ReferenceOutputs,
    compare,
)
from vitpareto.search.models import embedded_model

REQUIRED = (
    "recipe.yaml", "weights.safetensors", "model.onnx", "model.pt2", "preprocess.json",
    "labels.json", "README.md", "verify.npz",
)  # fmt: skip
#: prefixes of the fresh process's outputs, and the runtimes' names in a comparison
RUNTIMES = (("onnx", "onnxruntime"), ("pt2", "torch.export"))


class EditedBundle(UserError):
    """A file of the bundle differs from the one that was exported.

    `details["files"]` maps each file to what is wrong: "edited", "missing", "unlisted" or "outside"
    the bundle; `details["expected"]` maps edited and missing files to their sha256.
    """


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    Attributes:
        tolerance: in logits.
        cannot_import: modules that the fresh process could not import, as required.
        versions: of onnxruntime and torch in the fresh process.
        notes: what could not be checked, and why; anything else that is wrong.
    """

    verified: bool
    images: int
    tolerance: float
    comparisons: tuple[Comparison, ...]
    cannot_import: tuple[str, ...]
    versions: dict[str, str]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The content of `verification.json`."""
        return asdict(self)

    def summary(self) -> VerificationSummary:
        """What `result.json` holds."""
        return VerificationSummary(
            verified=self.verified,
            images=self.images,
            tolerance=self.tolerance,
            max_difference=max(c.max_difference for c in self.comparisons),
            near_tied=max(c.near_tied for c in self.comparisons),
            not_checked=self.notes,
        )

    def table(self) -> str:
        """One row per runtime and batch size, then the verdict and the notes."""
        head = f"{'runtime':<13}{'batch':>5}  {'max difference':>14}  {'same class':>10}  "
        rows = [head + f"{'near-tied':>9}  {'wrong':>5}"]
        for c in self.comparisons:
            rows.append(
                f"{c.runtime:<13}{c.batch:>5}  {c.max_difference:>14.1e}  "
                f"{f'{c.same_class}/{c.images}':>10}  {c.near_tied:>9}  {c.wrong:>5}"
            )
        verdict = "verified" if self.verified else "NOT VERIFIED"
        rows.append(
            f"{verdict}: {self.images} images, tolerance {self.tolerance:.1e} in logits; "
            f"the fresh process could not import {', '.join(self.cannot_import) or 'nothing'}"
        )
        return "\n".join([*rows, *(f"note: {note}" for note in self.notes)])


def verify(bundle: Path) -> Verification:
    """Check all hashes, then compare every runtime with the measured model at batches 1, 2 and 5.

    An export that differs is not an error: `verified` is False.

    Raises:
        UserError: `bundle` is not a bundle.
        EditedBundle: a file differs from the one that was exported.
    """
    return check_programs(bundle, check_files(bundle))


def sha256(path: Path) -> str:
    """Hash of a file, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_files(bundle: Path) -> BundleResult:
    """Read `result.json` and check its seal and the hash of every other file.

    Raises:
        UserError: `bundle` is not a bundle.
        EditedBundle: a file differs from the one that was exported.
    """
    path = bundle / bundle_result.FILE
    if not path.is_file():
        raise UserError(
            f"{bundle} is not a bundle: {path.name} does not exist in it",
            Code.NOT_FOUND,
            path=str(bundle),
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        files = {str(k): str(v["sha256"]) for k, v in stored["files"].items()}
        seal = str(stored["seal"])
        faults = _faults(bundle, files)
        if seal != seal_of(stored):
            faults = {path.name: ("edited", seal, seal_of(stored)), **faults}
        result = None if faults else BundleResult.from_json(stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must be written by vitpareto export ({error!r})",
            Code.UNREADABLE,
            path=str(path),
        ) from error
    if result is None:
        raise _edited(bundle, faults)
    return result


#: file -> (kind of fault, expected hash, actual hash)
_Faults = dict[str, tuple[str, str, str]]


def _faults(bundle: Path, files: dict[str, str]) -> _Faults:
    """What is wrong with the files besides `result.json`; empty if nothing is."""
    faults: _Faults = {name: ("unlisted", "", "") for name in REQUIRED if name not in files}
    for name, expected in files.items():
        if Path(name).name != name:
            faults[name] = ("outside", "", "")
        elif not (bundle / name).is_file():
            faults[name] = ("missing", expected, "")
        elif (actual := sha256(bundle / name)) != expected:
            faults[name] = ("edited", expected, actual)
    return faults


def _edited(bundle: Path, faults: _Faults) -> EditedBundle:
    texts = {
        "edited": "{name} has sha256 {actual}, expected {expected}",
        "missing": "{name} does not exist, expected with sha256 {expected}",
        "unlisted": "{name} is not listed in " + bundle_result.FILE,
        "outside": "{name} is not in the bundle's folder",
    }
    parts = [
        texts[kind].format(name=name, expected=expected, actual=actual)
        for name, (kind, expected, actual) in faults.items()
    ]
    return EditedBundle(
        f"{bundle} was edited after the export: {'; '.join(parts)}",
        Code.MISMATCH,
        path=str(bundle),
        files={name: kind for name, (kind, _, _) in faults.items()},
        expected={name: expected for name, (_, expected, _) in faults.items() if expected},
    )


def rebuild(bundle: Path, result: BundleResult) -> nn.Module:
    """The measured model in eager mode on the CPU, from the bundle's recipe and weights."""
    weights = safetensors.torch.load_file(bundle / "weights.safetensors")
    dense = fresh_dense(result, len(weights["head.weight"]))
    recipe = Recipe.from_yaml((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    return recipe.build(dense, weights=weights).eval()


def fresh_dense(result: BundleResult, outputs: int | None = None) -> nn.Module:
    """The dense model of a bundle, with fresh weights. Raises whatever timm raises.

    outputs: number of outputs of its head; those of its architecture if None.
    """
    if result.model == embedded_model.NAME:
        return embedded_model.build(pretrained=False).eval()
    options = dict(result.model_args)
    if outputs is not None:
        options["num_classes"] = outputs
    return timm.create_model(result.architecture or result.model, **options).eval()


@torch.no_grad()
def eager_logits(
    model: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    batch: int,
    head_indices: Sequence[int] | None,
) -> Floats:
    """Logits [M, K] of an eager model, `batch` images at a time, restricted to `head_indices`."""
    logits = torch.cat([cast(torch.Tensor, model(part)) for part in images.split(batch)])
    return (logits if head_indices is None else logits[:, list(head_indices)]).numpy()


def check_programs(bundle: Path, result: BundleResult) -> Verification:
    """`verify` without the hashes."""
    begin = time.monotonic()
    reference = ReferenceOutputs.load(bundle / "verify.npz")
    eager, notes = _compare_eager(bundle, result, reference)
    run = run_isolated(bundle)
    programs, program_notes = _compare_programs(run, reference)
    comparisons = (*eager, *programs)
    sound = run.isolated and not program_notes
    return Verification(
        verified=sound and all(c.passed for c in comparisons),
        images=len(reference.images),
        tolerance=reference.tolerance,
        comparisons=comparisons,
        cannot_import=run.cannot_import,
        versions=run.versions,
        notes=(*notes, *program_notes),
        seconds=round(time.monotonic() - begin, 2),
    )


def _compare_eager(
    bundle: Path, result: BundleResult, reference: ReferenceOutputs
) -> tuple[list[Comparison], list[str]]:
    """Comparisons of the rebuilt model; a note instead if it cannot be built here."""
    try:
        model = rebuild(bundle, result)
    except BadInput:
        raise
    except Exception as error:  # a hub that cannot be reached, or another version of timm
        return [], [f"eager is not checked, because {result.model} cannot be built here: {error}"]
    steps = json.loads((bundle / preprocessing.FILE).read_text(encoding="utf-8"))
    images = normalised(reference.images, steps)
    return [
        compare(reference, eager_logits(model, images, batch, result.head_indices), "eager", batch)
        for batch in BATCHES
    ], []


def _compare_programs(
    run: IsolatedRun, reference: ReferenceOutputs
) -> tuple[list[Comparison], list[str]]:
    """Comparisons of the exported programs, and notes on what is wrong besides."""
    notes, comparisons = [], []
    if run.error:
        notes.append(f"the fresh process failed: {run.error}")
    elif not run.isolated:
        notes.append(f"the fresh process must not import this project (loaded {run.loaded})")
    for prefix, runtime in RUNTIMES if run.outputs else ():
        for batch in BATCHES:
            logits, score, label = (
                run.outputs[f"{prefix}.{batch}.{output}"] for output in ("logits", "score", "class")
            )
            comparisons.append(compare(reference, logits, runtime, batch))
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            difference = np.abs(1 / exponentials.sum(axis=1) - score).max()
            follows = label.dtype == np.int64 and (label == logits.argmax(1)).all()
            if not follows or not difference < 1e-5:
                notes.append(f"{runtime} at batch {batch}: score or class do not match its logits")
    return comparisons, notes
