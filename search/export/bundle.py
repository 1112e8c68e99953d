"""A trial as a folder to deploy: the bundle, written whole or not at all, and proven when written.

`choose_trial` says which trial, `export` writes its bundle and leaves none behind that its own
`verify` would not pass. The exported graph is float32 and for the CPU, whatever measured it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.methods.engine.reduction import Trace
from vitpareto.search.data.datasets import check_head, open_data
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.export.readme import more_programs, readme, resize_rule
from vitpareto.search.export.specialised import SpecialisedProgram, write_aoti, write_static
from vitpareto.search.export.verification import (
    NEAR_TIED,
    RESULT,
    ReferenceOutputs,
    Verification,
    check_programs,
    eager_logits,
    normalised,
    seal,
    sha256,
)
from vitpareto.search.models.loading import (
    architecture,
    check_trained,
    fingerprint,
    load_model,
    num_classes,
)
from vitpareto.search.runtimes.exported_program import (
    ClassifierGraph,
    trace_program,
    write_onnx,
    write_programs,
)
from vitpareto.search.study.choice import NothingUnderBudget, choose
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.objectives import OBJECTIVES, Objective, objectives_named
from vitpareto.search.study.results import TrialResult, unpack_bits

if TYPE_CHECKING:
    from vitpareto.search.export.int8 import Int8

SCHEMA = 1
#: Search images a bundle carries, the first of their fixed order.
IMAGES = 20
#: Relative sizes of the noise under which a selection that changes is called near-tied, and how
#: many draws of each: float32 rounding is 1e-7 an operation, and a block has hundreds in a row.
NOISE, DRAWS = (1e-6, 1e-5), 4


class NotVerified(RuntimeError):
    """The exported programs are not the measured model; the message holds the table."""


def choose_trial(
    results: Sequence[TrialResult],
    objectives: Sequence[Objective],
    *,
    max_gmacs: float | None = None,
    max_latency_ms: float | None = None,
    min_top1: float | None = None,
    knee: bool = False,
    trial: int | None = None,
) -> TrialResult:
    """The finished trial that the caller's words mean: budgets, or the knee, or one by number.

    UserError: no or more than one kind of choice; a budget under which nothing lies (the nearest
    trials are named); a front without a knee; a trial that is not there or not finished.
    """
    budgets = {
        "max_gmacs": max_gmacs, "max_latency_ms": max_latency_ms, "min_top1": min_top1,
    }  # fmt: skip
    asked = any(v is not None for v in budgets.values())
    if [asked, knee, trial is not None].count(True) != 1:
        raise UserError(
            "which trial? Give budgets (--max-gmacs, --max-latency-ms, --min-top1), "
            "or --knee, or --trial N, and one of the three kinds only"
        )
    finished = [r for r in results if r.state == "finished"]
    if not finished:
        raise UserError(f"none of {len(results)} trials is finished: there is nothing to export")
    if trial is not None:
        return _numbered(results, finished, trial)
    if knee:
        found = knee_trial(finished, [o.name for o in objectives])
        if found is None:
            front = front_of(finished, objectives)
            raise UserError(
                f"the front has no knee (an end of it is none): {_shown(front)}; "
                "give --max-gmacs or --trial N"
            )
        return found
    try:
        return choose(finished, **budgets)
    except (NothingUnderBudget, ValueError) as error:
        raise UserError(str(error)) from error


def knee_trial(results: Sequence[TrialResult], objectives: Sequence[str]) -> TrialResult | None:
    """The knee of the front of these results; None where it has none."""
    axes = objectives_named(objectives)
    return knee_of(front_of(results, axes), axes, reference_of(results))


def _numbered(
    results: Sequence[TrialResult], finished: Sequence[TrialResult], trial: int
) -> TrialResult:
    result = next((r for r in results if r.trial == trial), None)
    if result is None:
        near = sorted(finished, key=lambda r: abs(r.trial - trial))
        raise UserError(f"there is no trial {trial}; nearest: {_shown(near)}")
    if result.state != "finished":
        raise UserError(
            f"trial {trial} is {result.state}{f' ({result.reason})' if result.reason else ''}: "
            "only finished trials are exported"
        )
    return result


def _shown(results: Sequence[TrialResult]) -> str:
    return "; ".join(
        f"trial {r.trial} ({r.method}): top1 {r.values['top1']:.4g} %, "
        f"gmacs {r.values['gmacs']:.4g} G"
        for r in results[:3]
    )


@dataclass(frozen=True)
class Candidate:
    """A trial's model rebuilt on the CPU in float32, with the images it was measured on; `dense` is
    the model that it was made of, as timm has it.
    """

    model: nn.Module
    dense: nn.Module
    recipe: Recipe
    preprocess: Preprocess
    search: Split
    calibration: Split
    classes: tuple[str, ...]
    head_indices: tuple[int, ...] | None

    @classmethod
    def of(cls, folder: StudyFolder, result: TrialResult, cache: str | None) -> Candidate:
        """UserError where the study's model or images are no longer what they were."""
        job = SearchConfig.of({**folder.job(), "store": folder.store, "cache": cache or None})
        recipe = Recipe.from_dict(result.resolved or result.recipe)
        dense = load_model(job.model, folder.weights)
        known = folder.identity.read()
        if fingerprint(dense) != known["model_fingerprint"]:
            raise UserError(
                f"study {folder.name} measured a model with fingerprint "
                f"{known['model_fingerprint']}; {job.model} with {folder.weights.name} is now "
                f"{fingerprint(dense)} (another timm version?)"
            )
        weights = None if recipe.weights is None else folder.artifacts.load(recipe.weights)
        shape, _ = recipe.reshape(methods.model_shape(dense), dense, weights)
        if recipe.tokens is not None:
            declared = recipe.tokens.declared
            refused = declared.refuses_export(declared.check(recipe.tokens.params, shape), shape)
            if refused:
                raise UserError(f"trial {result.trial} ({recipe}) {refused}")
        check_trained(recipe.checked(shape), shape)
        preprocess = Preprocess.of(dense)
        data = open_data(
            job.data, preprocess, cache=Path(job.cache), seed=job.seed, images=job.images
        )
        if data.fingerprint != known["data_fingerprint"]:
            raise UserError(
                f"study {folder.name} measured images with fingerprint "
                f"{known['data_fingerprint'][:16]}; {job.data} now has {data.fingerprint[:16]}: "
                "it has changed since"
            )
        head = check_head(num_classes(dense), data)
        return cls(
            recipe.build(dense, weights=weights).eval(), dense, recipe, preprocess,
            data.split("search"), data.split("calibration"), data.classes, head,
        )  # fmt: skip


@dataclass(frozen=True)
class Extras:
    """What a bundle holds besides its two programs."""

    int8: bool = False
    aoti: bool = False
    static: int | None = None


def export(
    folder: StudyFolder,
    result: TrialResult,
    out: Path,
    *,
    cache: str | None = None,
    images: int = IMAGES,
    int8: bool = False,
    aoti: bool = False,
    static: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the bundle of a finished trial to `out`, verified, and return it.

    int8: with the program in int8 as well (`search.export.int8`), measured; aoti, static: with an
    AOTInductor package, with ONNX of that batch alone (`search.export.specialised`); `say` gets
    what came of each.

    cache: the decoded images' folder (None: as the study's job says). images: how many search
    images it carries. Everything is written beside `out` and renamed: `out` is whole or not there.
    UserError: `out` exists or cannot be written, the trial has no program of fixed shape, or the
    study's model or images have changed. NotVerified: what was written is not what was measured.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: nothing is overwritten, name another --out")
    candidate = Candidate.of(folder, result, cache)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.filename}: {error.strerror}") from error
    try:
        _write(partial, folder, result, candidate, images, Extras(int8, aoti, static), say)
        if os.path.lexists(out):
            raise UserError(f"{out} has come to exist meanwhile: nothing is overwritten")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write(
    bundle: Path,
    folder: StudyFolder,
    result: TrialResult,
    candidate: Candidate,
    count: int,
    extras: Extras,
    say: Callable[[str], None],
) -> None:
    model, head = candidate.model, candidate.head_indices
    preprocess = _preprocess(candidate.preprocess)
    measured, agree = _measure(candidate, preprocess, result, count)
    (bundle / "recipe.yaml").write_text(candidate.recipe.to_yaml(), encoding="utf-8")
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    # not save_file: its files are for their owner alone, and a bundle is read by others
    (bundle / "weights.safetensors").write_bytes(safetensors.torch.save(state))
    measured.save(bundle / "verify.npz")
    Image.fromarray(measured.images[0]).save(bundle / "example.png")
    _write_json(bundle / "preprocess.json", preprocess)
    _write_json(bundle / "labels.json", list(candidate.classes))
    deployed, images = ClassifierGraph(model, head), normalised(measured.images, preprocess)
    seconds = write_programs(deployed, images, bundle)
    said = _result(folder, result, candidate, agree, seconds)
    (bundle / "README.md").write_text(
        readme(said["model"], str(candidate.recipe), _facts(said), preprocess, len(said["labels"])),
        encoding="utf-8",
    )
    checked = check_programs(bundle, said)
    if not checked.verified:
        raise NotVerified(
            f"the export of trial {result.trial} is not its model:\n{checked.table()}"
        )
    _write_json(bundle / "verification.json", checked.plain())
    said["verification"] = _summary(checked)
    fast = ""
    if extras.int8:
        found = _int8(bundle, candidate, images)
        said["int8"], fast = found.plain(), found.said()
        say(fast)
    said["packages"] = []
    for package in _packages(bundle, deployed, images, measured, extras):
        said["packages"].append(package.plain())
        say(package.said())
        say(f"  {package.runs}")
    with open(bundle / "README.md", "a", encoding="utf-8") as text:
        text.write(more_programs(fast, said["packages"]))
    said["files"] = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(bundle.iterdir())
    }
    # through JSON first, so that the seal is over what will be read back
    said = json.loads(json.dumps(said))
    _write_json(bundle / RESULT, {**said, "seal": seal(said)})


def _packages(
    bundle: Path,
    deployed: ClassifierGraph,
    images: Tensor,
    measured: ReferenceOutputs,
    extras: Extras,
) -> Iterator[SpecialisedProgram]:
    if extras.aoti:
        yield write_aoti(deployed, images, measured, bundle)
    if extras.static is not None:
        yield write_static(deployed, images, measured, bundle, extras.static)


def _int8(bundle: Path, candidate: Candidate, images: Tensor) -> Int8:
    """The bundle's program in int8, measured beside the dense model's; images: to trace with."""
    from vitpareto.search.export.int8 import FILE, measure_int8

    with tempfile.TemporaryDirectory(prefix="vitpareto-dense-") as scratch:
        dense = Path(scratch) / "dense.onnx"
        model = Recipe().build(candidate.dense).eval()
        write_onnx(trace_program(ClassifierGraph(model, candidate.head_indices), images), dense)
        return measure_int8(
            bundle / "model.onnx", dense, bundle / FILE, candidate.search, candidate.calibration,
            candidate.preprocess,
        )  # fmt: skip


@torch.no_grad()
def _measure(
    candidate: Candidate, preprocess: dict[str, Any], result: TrialResult, count: int
) -> tuple[ReferenceOutputs, str]:
    """The measured model on the first search images, as it is and with rounding-sized noise; and
    how many of those images it gets right or wrong as the trial did ("20 of 20").

    NotVerified where it disagrees with the trial on more images than near-ties explain.
    """
    count = min(count, len(candidate.search))
    raw, labels = candidate.search.batch(0, count)
    images = normalised(raw.numpy(), preprocess)
    head = None if candidate.head_indices is None else list(candidate.head_indices)

    def run(noise: Tensor) -> tuple[np.ndarray, Trace]:
        logits, trace = candidate.model(images * (1 + noise), trace=True)
        return (logits if head is None else logits[:, head]).numpy(), trace

    logits = eager_logits(candidate.model, images, count, head)
    _, trace = run(torch.zeros(()))
    draw = torch.Generator().manual_seed(0)
    other_logits, other_selection = [], []
    for size in NOISE:
        for _ in range(DRAWS):
            found, moved = run(size * torch.randn(images.shape, generator=draw))
            pairs = zip(trace.group, moved.group, strict=True)
            other_logits.append(found)
            other_selection.append(
                torch.stack([(a != b).any(dim=1) for a, b in pairs]).any(dim=0).numpy()
            )
    right = logits.argmax(axis=1) == labels.numpy()
    same = int((right == unpack_bits(result.bits, result.images)[:count]).sum())
    exact = result.provenance.get("dtype") == "float32"
    if exact and count - same > max(1, int(NEAR_TIED * count)):
        raise NotVerified(
            f"trial {result.trial} rebuilt is right or wrong as it was measured on only {same} of "
            f"{count} images"
        )
    measured = ReferenceOutputs(
        raw.numpy(), labels.numpy(), logits, np.stack(other_logits), np.stack(other_selection)
    )
    return measured, f"{same} of {count}"


def _preprocess(preprocess: Preprocess) -> dict[str, Any]:
    """preprocess.json: what an image goes through, with timm's sizes worked out."""
    height, width = preprocess.input_size[1:]
    said = {
        "size": [height, width],
        "scale_size": [math.floor(side / preprocess.crop_pct) for side in (height, width)],
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_pct,
        "crop_mode": preprocess.crop_mode,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "colour": "RGB",
        "layout": "NCHW",
        "scale": "(pixel / 255 - mean) / std",
    }
    return {**said, "resize": resize_rule(said)}


def _result(
    folder: StudyFolder,
    result: TrialResult,
    candidate: Candidate,
    agree: str,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """result.json, but for verification, files and seal."""
    made = dict(result.provenance)
    versions = dict(made.get("versions", {}))
    here = {
        name: importlib.metadata.version(name)
        for name in ("vitpareto", "torch", "timm", "onnx", "onnxscript", "onnxruntime")
    }
    values = result.values
    timed = folder.latencies.read().get(result.trial) or result.timed
    dense = reference_of(folder.trials.all())
    return {
        "schema": SCHEMA,
        "model": made.get("model", folder.job().get("model")),
        **architecture(folder.job()["model"]),
        "study": folder.name,
        "trial": result.trial,
        "recipe": candidate.recipe.to_dict(),
        "accuracy": {
            "top1": values["top1"],
            "top1_low": result.top1_low,
            "top1_high": result.top1_high,
            "interval": "Wilson, 95 %",
            "top5": values.get("top5"),
            "images": result.images,
            "split": "search",
        },
        "cost": {
            **{name: v for name, v in values.items() if name not in ("top1", "top5")},
            "units": {name: OBJECTIVES[name].unit for name in values if name in OBJECTIVES},
        },
        "latency": None if timed is None else timed.to_json(),
        "dense": None if dense is None else dense.values,
        "measured_with": {
            **{k: v for k, v in made.items() if k not in ("versions", "data_fingerprint")},
            "versions": versions,
        },
        "seed": made.get("seed"),
        "device": made.get("device"),
        "data_fingerprint": made.get("data_fingerprint"),
        "exported": {"dtype": "float32", "device": "cpu", "versions": here, "seconds": seconds},
        "rebuilt_as_measured": agree,
        "labels": list(candidate.classes),
        "head_indices": None if candidate.head_indices is None else list(candidate.head_indices),
    }


def _facts(said: dict[str, Any]) -> str:
    """The README's first paragraph."""
    accuracy, cost, measured = said["accuracy"], said["cost"], said["measured_with"]
    text = (
        f"Trial {said['trial']} of study {said['study']}: top-1 {accuracy['top1']:.2f} % "
        f"({accuracy['top1_low']:.2f} to {accuracy['top1_high']:.2f}, {accuracy['images']} "
        f"images), {cost['gmacs']:.4g} GMACs an image, {cost['params_m']:.4g} M parameters; "
        f"measured on {measured.get('device')} in {measured.get('dtype')}."
    )
    if recovered := measured.get("recovery"):
        text += (
            f" Recovered after the search: {recovered['epochs']} epochs of fine-tuning, from "
            f"{recovered['from_top1']:.2f} %."
        )
    if measured.get("dtype") != "float32":
        text += " This export is float32: its accuracy may differ a little from that."
    return text


def _summary(checked: Verification) -> dict[str, Any]:
    """What result.json says of the verification; verification.json has the whole."""
    return {
        "verified": checked.verified,
        "images": checked.images,
        "tolerance": checked.tolerance,
        "max_difference": max(c.max_difference for c in checked.comparisons),
        "near_tied": max(c.near_tied for c in checked.comparisons),
        "not_checked": list(checked.notes),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
