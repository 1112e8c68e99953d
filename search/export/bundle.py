"""Writes a trial as a bundle, a folder to deploy. It is written completely or not at all.

`export` verifies what it wrote before it renames the folder, so that every bundle passes `verify`.
The programs are float32 and for the CPU, whatever device measured the trial.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from torch import Tensor

from vitpareto.methods import Code, Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.export import bundle_result, preprocessing
from vitpareto.search.export.bundle_result import (
    BundleAccuracy,
    BundleResult,
    ExportSettings,
    FileRecord,
    seal_of,
)
from vitpareto.search.export.preprocessing import normalised, preprocess_json
from vitpareto.search.export.program_results import Int8Result, SpecialisedProgram
from vitpareto.search.export.readme import more_programs, readme
from vitpareto.search.export.rebuilt_trial import NotVerified, RebuiltTrial
from vitpareto.search.export.reference_outputs import ReferenceOutputs
from vitpareto.search.export.specialised import write_aoti, write_static
from vitpareto.search.export.verification import check_programs, sha256
from vitpareto.search.models.loading import architecture
from vitpareto.search.runtimes.exported_program import (
    ClassifierGraph,
    trace_program,
    write_onnx,
    write_programs,
)
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import reference_of
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.versions import installed_versions

#: search images that a bundle carries, the first of their fixed order
IMAGES = 20
#: packages whose versions `result.json` holds
PACKAGES = ("vitpareto", "torch", "timm", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExtraPrograms:
    """Programs of a bundle besides ONNX and torch.export in float32.

    `static_batch` is the batch size of an ONNX program with fixed shapes.
    """

    int8: bool = False
    aoti: bool = False
    static_batch: int | None = None


def export(
    folder: StudyFolder,
    result: TrialResult,
    out: Path,
    *,
    cache: str | None = None,
    images: int = IMAGES,
    extra: ExtraPrograms = ExtraPrograms(),
    log: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the verified bundle of a finished trial and return its path.

    Everything is written to a folder next to `out` and renamed at the end.

    Args:
        out: the folder to write; must not exist.
        cache: folder of decoded images; as in the study's job if None.
        images: search images that the bundle carries.
        extra: additional programs, each measured or compared.
        log: called with one line per additional program.

    Raises:
        UserError: `out` exists or cannot be written, the trial cannot be exported, or the study's
            model or images have changed.
        NotVerified: the exported programs are not the measured model.
    """
    _check_absent(out)
    trial = RebuiltTrial.of(folder, result, cache)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.filename}: {error.strerror}",
            Code.UNWRITABLE,
            path=str(out),
        ) from error
    try:
        _BundleWriter(partial, folder, result, trial, log).write(images, extra)
        _check_absent(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(
            f"{out} exists: the output folder must not exist, name another --out",
            Code.EXISTS,
            path=str(out),
        )


@dataclass(frozen=True)
class _BundleWriter:
    bundle: Path
    folder: StudyFolder
    result: TrialResult
    trial: RebuiltTrial
    log: Callable[[str], None]

    def write(self, images: int, extra: ExtraPrograms) -> None:
        steps = preprocess_json(self.trial.preprocess)
        reference, agreement = self.trial.reference_outputs(self.result, images)
        self._write_inputs(steps, reference)
        graph = ClassifierGraph(self.trial.model, self.trial.head_indices)
        inputs = normalised(reference.images, steps)
        seconds = write_programs(graph, inputs, self.bundle)
        draft = self._draft(agreement, seconds)
        text = readme(draft.model, str(self.trial.recipe), _facts(draft), steps, len(draft.labels))
        (self.bundle / "README.md").write_text(text, encoding="utf-8")
        verification = check_programs(self.bundle, draft)
        if not verification.verified:
            raise NotVerified(
                f"the exported programs of trial {self.result.trial} are not the measured model:\n"
                f"{verification.table()}",
                self.result.trial,
            )
        _write_json(self.bundle / "verification.json", verification.to_json())
        int8 = self._int8(inputs) if extra.int8 else None
        if int8 is not None:
            self.log(int8.summary())
        programs = []
        for program in self._specialised(graph, inputs, reference, extra):
            programs.append(program)
            self.log(program.summary())
            self.log(f"  {program.runs}")
        with open(self.bundle / "README.md", "a", encoding="utf-8") as file:
            file.write(more_programs(int8, programs))
        self._seal(
            replace(
                draft,
                verification=verification.summary(),
                int8=int8,
                packages=tuple(programs),
            )
        )

    def _write_inputs(self, steps: dict[str, Any], reference: ReferenceOutputs) -> None:
        """Recipe, weights, verification images, an example image, preprocessing and labels."""
        (self.bundle / "recipe.yaml").write_text(self.trial.recipe.to_yaml(), encoding="utf-8")
        state = {k: v.detach().contiguous() for k, v in self.trial.model.state_dict().items()}
        # files of safetensors' save_file are readable by their owner only
        (self.bundle / "weights.safetensors").write_bytes(safetensors.torch.save(state))
        reference.save(self.bundle / "verify.npz")
        Image.fromarray(reference.images[0]).save(self.bundle / "example.png")
        _write_json(self.bundle / preprocessing.FILE, steps)
        _write_json(self.bundle / "labels.json", list(self.trial.classes))

    def _draft(self, agreement: str, seconds: dict[str, float]) -> BundleResult:
        """`result.json` without verification, additional programs, files and seal."""
        result, provenance = self.result, self.result.provenance
        dense = reference_of(self.folder.trials.all())
        values, job = result.values, self.folder.job()
        return BundleResult(
            model=provenance.model or job.model,
            **architecture(job.model),
            study=self.folder.name,
            trial=result.trial,
            recipe=RecordedRecipe.of(self.trial.recipe),
            accuracy=BundleAccuracy(
                top1=values["top1"],
                top1_low=result.top1_low,
                top1_high=result.top1_high,
                interval="Wilson, 95 %",
                top5=values.get("top5"),
                images=result.images,
                split="search",
            ),
            cost={name: v for name, v in values.items() if name not in ("top1", "top5")},
            latency=self.folder.latencies.read().get(result.trial) or result.latency,
            dense=None if dense is None else dense.values,
            measured_with=provenance,
            exported=ExportSettings(
                dtype="float32",
                device="cpu",
                versions=installed_versions(*PACKAGES),
                seconds=seconds,
            ),
            rebuilt_as_measured=agreement,
            labels=self.trial.classes,
            head_indices=self.trial.head_indices,
        )

    def _specialised(
        self,
        graph: ClassifierGraph,
        inputs: Tensor,
        reference: ReferenceOutputs,
        extra: ExtraPrograms,
    ) -> Iterator[SpecialisedProgram]:
        if extra.aoti:
            yield write_aoti(graph, inputs, reference, self.bundle)
        if extra.static_batch is not None:
            yield write_static(graph, inputs, reference, self.bundle, extra.static_batch)

    def _int8(self, inputs: Tensor) -> Int8Result:
        """Write the program in int8 and measure it beside the dense model in int8."""
        # onnxruntime's quantisation tools are slow to import, and few exports need them
        from vitpareto.search.export.int8 import FILE, measure_int8

        with tempfile.TemporaryDirectory(prefix="vitpareto-dense-") as scratch:
            dense = Path(scratch) / "dense.onnx"
            model = Recipe().build(self.trial.dense).eval()
            graph = ClassifierGraph(model, self.trial.head_indices)
            write_onnx(trace_program(graph, inputs), dense)
            return measure_int8(
                self.bundle / "model.onnx", dense, self.bundle / FILE, self.trial.search,
                self.trial.calibration, self.trial.preprocess,
            )  # fmt: skip

    def _seal(self, result: BundleResult) -> None:
        files = {
            path.name: FileRecord(sha256(path), path.stat().st_size)
            for path in sorted(self.bundle.iterdir())
        }
        # the seal is over what is read back from JSON
        stored = json.loads(json.dumps(replace(result, files=files).to_json()))
        _write_json(self.bundle / bundle_result.FILE, {**stored, "seal": seal_of(stored)})


def _facts(result: BundleResult) -> str:
    """The README's first paragraph."""
    accuracy, cost, measured = result.accuracy, result.cost, result.measured_with
    text = (
        f"Trial {result.trial} of study {result.study}: top-1 {accuracy.top1:.2f} % "
        f"({accuracy.top1_low:.2f} to {accuracy.top1_high:.2f}, {accuracy.images} "
        f"images), {cost['gmacs']:.4g} GMACs per image, {cost['params_m']:.4g} M parameters; "
        f"measured on {measured.device} in {measured.dtype}."
    )
    if (recovered := measured.recovery) is not None:
        text += (
            f" Recovered after the search: {recovered.settings.epochs} epochs of fine-tuning, from "
            f"{recovered.from_top1:.2f} %."
        )
    if measured.dtype != "float32":
        text += " This export is float32, so its accuracy may differ slightly."
    return text


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
