"""The bundle: every method exported and verified, its programs run as they stand, bad refused.

The embedded model is cut to two of its blocks: what an export has to get right is in each of
them, and twelve would take six times as long.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.search.data import embedded_images
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.export.bundle import export
from vitpareto.search.export.bundle_result import BundleResult, seal_of
from vitpareto.search.export.isolated_process import REFUSED
from vitpareto.search.export.preprocessing import preprocess_json, resize_rule
from vitpareto.search.export.readme import programs, readme
from vitpareto.search.export.rebuilt_trial import NotVerified
from vitpareto.search.export.reference_outputs import ReferenceOutputs, compare
from vitpareto.search.export.trial_choice import choose_trial
from vitpareto.search.export.verification import (
    EditedBundle,
    check_files,
    check_programs,
    rebuild,
    verify,
)
from vitpareto.search.models import embedded_model
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import TrialResult
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

DEPTH, IMAGES = 2, 10
RECIPES: dict[str, dict] = {
    "dense": {},
    "topk": {"keep_rate": 0.6, "prune_layers": (0, 1)},
    "tram": {"keep_rate": 0.6, "prune_layers": (0, 1)},
    "evit": {"keep_rate": 0.6, "prune_layers": (0, 1)},
    "random": {"keep_rate": 0.6, "prune_layers": (0, 1), "seed": 3},
    "centre": {"keep_rate": 0.6, "prune_layers": (0, 1)},
    "resize": {"size": 48},
    "tome": {"r": 9},
    "rajni": {"gamma": 0.5, "min_tokens": 8},
    "ats": {"prune_layers": (0, 1), "max_tokens": (30, 12)},
    "ppt": {"r": 9, "prune_layers": (0, 1), "threshold": 3e-4},
}
TRIALS = {name: i for i, name in enumerate(RECIPES)}
_build = embedded_model.build


def shallow(pretrained: bool = True):
    """The embedded model's first blocks."""
    model = _build(pretrained)
    model.blocks = model.blocks[:DEPTH]
    return model


@dataclass
class Study:
    folder: StudyFolder
    worker: Worker
    root: Path
    results: dict[str, TrialResult]

    def bundle(self, name: str) -> Path:
        """The method's bundle, exported once for the whole file."""
        out = self.root / name
        if not out.exists():
            assert export(self.folder, self.results[name], out, images=IMAGES) == out
        return out


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    root = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_model, "build", shallow)
        config = SearchConfig.of(
            {"name": "small", "store": str(root / "store"), "cache": str(root / "cache"),
             "images": 40, "device": "cpu", "latency": "off"}
        )  # fmt: skip
        prepared = check_job(config)
        prepared.folder.create()
        prepared.folder.write_job(JobRequest(config.plain()))
        prepared.folder.identity.settle(prepared.identity)
        worker = Worker.open(study_task(prepared, threads=1))
        results = {}
        for name, params in RECIPES.items():
            results[name] = measure_recipe(worker, TRIALS[name], Recipe.of(name, **params))
            prepared.folder.trials.write(results[name])
        yield Study(prepared.folder, worker, root / "bundles", results)


def test_every_method_is_exported() -> None:
    """A method that is not in the table above breaks this file."""
    untrained = [n for n in methods.names() if methods.get(n).training in ("none", "calibration")]
    assert sorted(RECIPES) == sorted(untrained)


#: of the fast lane: dropping, merging and adaptive counts
FAST = ("topk", "tome", "rajni")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_each_method_exports_and_verifies(study: Study, name: str) -> None:
    """`export` itself verifies in a fresh process, and refuses to leave what does not pass."""
    bundle = study.bundle(name)
    found = json.loads((bundle / "verification.json").read_text())
    assert found["verified"] and found["notes"] == []
    assert found["cannot_import"] == list(REFUSED)
    seen = {(c["runtime"], c["batch"]) for c in found["comparisons"]}
    assert seen == {(r, b) for r in ("eager", "onnxruntime", "torch.export") for b in (1, 2, 5)}
    for row in found["comparisons"]:
        assert (row["same_class"], row["near_tied"], row["wrong"]) == (IMAGES, 0, 0)
        # an order below the tolerance: float32 rounding of logits below 10, see TOLERANCE
        assert row["max_difference"] < 5e-5
    said = check_files(bundle)
    assert said.recipe == study.results[name].resolved
    assert said.rebuilt_as_measured == f"{IMAGES} of {IMAGES}"


def test_the_contents_of_result_json(study: Study) -> None:
    bundle, result = study.bundle("topk"), study.results["topk"]
    said = check_files(bundle)
    stored = json.loads((bundle / "result.json").read_text())
    assert said.accuracy.top1 == result.values["top1"]
    assert said.accuracy.top1_low == result.top1_low
    assert said.cost["gmacs"] == result.values["gmacs"]
    assert stored["data_fingerprint"] == result.provenance.data_fingerprint
    assert (stored["seed"], stored["device"]) == (0, result.provenance.device)
    assert said.measured_with == result.provenance
    assert stored["measured_with"]["versions"]["torch"] == torch.__version__
    written = json.loads(json.dumps({**said.to_json(), "seal": said.seal}))
    assert written == stored, "every key on disk is in the record"
    assert stored["cost"]["units"]["top1"] == "%" and stored["cost"]["units"]["gmacs"] == "G"
    assert set(said.files) == {p.name for p in bundle.iterdir()} - {"result.json"}
    assert json.loads((bundle / "labels.json").read_text()) == list(embedded_images.CLASSES)
    text = (bundle / "recipe.yaml").read_text()
    assert RecordedRecipe.of(Recipe.from_yaml(text)) == result.resolved


@pytest.mark.parametrize("batch", [1, 2, 5, 7])
def test_any_batch_size_gives_the_same_results(study: Study, batch: int) -> None:
    import onnxruntime

    bundle = study.bundle("tome")
    images = study.worker.search_batch(batch)
    with torch.no_grad():
        expected = rebuild(bundle, check_files(bundle))(images)
        pt2 = torch.export.load(bundle / "model.pt2").module()(images)
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    onnx = session.run(["logits", "score", "class"], {"images": images.numpy()})
    for logits, score, label in (onnx, [t.numpy() for t in pt2]):
        # rounding of logits below 10 through two blocks
        np.testing.assert_allclose(logits, expected, atol=2e-5)
        np.testing.assert_allclose(score, expected.softmax(1).amax(1), atol=1e-6)
        assert label.dtype == np.int64 and label.tolist() == expected.argmax(1).tolist()


def test_readme_programs_run_as_they_stand(study: Study) -> None:
    """In the bundle's folder, on its own example and on a photo of another shape; they agree."""
    bundle = study.bundle("rajni")
    photo = study.root / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 121, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    preprocess = Preprocess.of(study.worker.dense)
    tensor = preprocess.transform()(Image.open(photo))
    images = torch.as_tensor(np.asarray(tensor)).permute(1, 2, 0)[None]
    example = torch.from_numpy(ReferenceOutputs.load(bundle / "verify.npz").images[:1])
    model = rebuild(bundle, check_files(bundle))
    for raw, arguments in ((example, []), (images, [str(photo)])):
        with torch.no_grad():
            score, label = model(preprocess.normalise(raw)).softmax(1).max(1)
        for program in programs((bundle / "README.md").read_text()):
            done = subprocess.run(
                [sys.executable, "-I", "-c", program, *arguments],
                cwd=bundle, capture_output=True, text=True, check=True,
            )  # fmt: skip
            said, share = done.stdout.split()
            assert said == embedded_images.CLASSES[int(label)]
            assert float(share) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
@pytest.mark.parametrize("photo", [(90, 121), (200, 71), (64, 64)])
def test_readme_shows_pixels_as_timm_does(mode: str, size: tuple, photo: tuple) -> None:
    """The lines up to the crop, run, against timm's own transform: equal in every pixel."""
    preprocess = Preprocess((3, *size), (0.5, 0.4, 0.3), (0.2,) * 3, "bicubic", 0.9, mode)
    said = preprocess_json(preprocess)
    assert said["resize"] == resize_rule(said)
    program = programs(readme("m", "r", "f", said, 10))[0].split("\npixels")[0]
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*photo, 3), dtype=np.uint8))
    lines = program.split("image = Image.open")
    body = lines[1].split("\n", 1)[1]
    names = {"Image": Image, "preprocess": said, "image": image}
    exec(body, names)
    expected = np.asarray(preprocess.transform()(image)).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(names["image"]), expected)


# --- bad input


def _edited(study: Study, tmp_path: Path, name: str = "topk") -> Path:
    return Path(shutil.copytree(study.bundle(name), tmp_path / "edited"))


def test_edited_file_is_named_with_both_hashes(study: Study, tmp_path: Path) -> None:
    bundle = _edited(study, tmp_path)
    before = check_files(bundle).files["model.onnx"].sha256
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    with refused("mismatch", EditedBundle, files={"model.onnx": "edited"}) as error:
        verify(bundle)
    assert error.value.details["expected"]["model.onnx"] == before and before in str(error.value)
    (bundle / "labels.json").unlink()
    files = {"labels.json": "missing", "model.onnx": "edited"}
    with refused("mismatch", EditedBundle, files=files):
        verify(bundle)


def test_edited_result_breaks_its_seal(study: Study, tmp_path: Path) -> None:
    bundle = _edited(study, tmp_path)
    said = json.loads((bundle / "result.json").read_text())
    said["accuracy"]["top1"] = 99.0
    (bundle / "result.json").write_text(json.dumps(said))
    with refused("mismatch", EditedBundle, files={"result.json": "edited"}):
        verify(bundle)
    del said["files"]["model.pt2"]
    (bundle / "result.json").write_text(json.dumps({**said, "seal": seal_of(said)}))
    with refused("mismatch", EditedBundle, files={"model.pt2": "unlisted"}):
        verify(bundle)
    said["files"]["../x"] = {"sha256": "0"}
    (bundle / "result.json").write_text(json.dumps({**said, "seal": seal_of(said)}))
    with refused("mismatch", EditedBundle, files={"model.pt2": "unlisted", "../x": "outside"}):
        verify(bundle)


def test_not_a_bundle(tmp_path: Path) -> None:
    with refused("not-found", UserError, path=str(tmp_path)):
        verify(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with refused("unreadable", UserError, path=str(tmp_path / "result.json")):
        verify(tmp_path)


def test_wrong_program_is_not_verified(study: Study, tmp_path: Path) -> None:
    """Another method's ONNX program in the bundle: every batch size says how many are wrong."""
    bundle = _edited(study, tmp_path)
    shutil.copy(study.bundle("rajni") / "model.onnx", bundle / "model.onnx")
    found = check_programs(bundle, check_files(study.bundle("topk")))
    assert not found.verified and "NOT VERIFIED" in found.table()
    wrong = {c.runtime: c.wrong for c in found.comparisons}
    assert wrong["onnxruntime"] > IMAGES // 2 and wrong["eager"] == wrong["torch.export"] == 0


def test_existing_out_is_left_alone(study: Study, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "link"):
        with refused("exists", UserError, path=str(tmp_path / name)):
            export(study.folder, study.results["topk"], tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


def test_a_failed_export_leaves_nothing(study: Study, tmp_path: Path) -> None:
    """A result whose correctness is another model's: what was rebuilt is not what was measured."""
    other = replace(study.results["topk"], bits=study.results["topk"].bits.swapcase())
    with pytest.raises(NotVerified) as caught:
        export(study.folder, other, tmp_path / "out", images=IMAGES)
    assert caught.value.trial == other.trial
    assert list(tmp_path.iterdir()) == []


def test_a_changed_study_is_refused(study: Study, tmp_path: Path) -> None:
    copied = StudyFolder(Path(shutil.copytree(study.folder.folder, tmp_path / "changed")))
    for key in ("data_fingerprint", "model_fingerprint"):
        identity = study.folder.identity.read()
        (copied.folder / "study.json").write_text(json.dumps({**identity, key: "0" * 16}))
        with refused("mismatch", UserError, key=key, expected="0" * 16):
            export(copied, study.results["topk"], tmp_path / "out")


def test_image_budget_names_the_calibrated_one(study: Study, tmp_path: Path) -> None:
    recipe = Recipe.of("rajni", gamma=0.5, min_tokens=8, budget="image")
    result = measure_recipe(study.worker, 90, recipe)
    with refused("unsupported", UserError, trial=90, method="rajni"):
        export(study.folder, result, tmp_path / "out")


def test_a_result_of_an_earlier_version_is_read(study: Study) -> None:
    """Before int8 and packages existed, and without sizes of files."""
    stored = json.loads((study.bundle("topk") / "result.json").read_text())
    del stored["packages"], stored["latency"]
    stored["files"] = {k: {"sha256": v["sha256"]} for k, v in stored["files"].items()}
    found = BundleResult.from_json(stored)
    assert found.packages == () and found.int8 is None and found.latency is None
    assert found.files["model.onnx"].bytes is None and found.verification is not None


# --- the rule for near ties


def _measured(images: int = 40) -> ReferenceOutputs:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (images, 10)).astype(np.float32)
    others = np.stack([logits, logits])
    others[1, 0] += 0.5
    selection = np.zeros((2, images), dtype=bool)
    selection[1, 0] = True
    empty = np.zeros((images, 1, 1, 3), np.uint8)
    return ReferenceOutputs(empty, np.zeros(images, np.int64), logits, others, selection)


def test_untrained_parts_are_refused(study: Study, tmp_path: Path) -> None:
    """No search measures one; a result that names one all the same has no weights to export."""
    recipe = RecordedRecipe.of(Recipe.of("patchmerger", prune_layers=[0], num_tokens=[9]))
    result = replace(study.results["topk"], recipe=recipe, resolved=recipe)
    with refused("missing", UserError, method="patchmerger"):
        export(study.folder, result, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_near_tied_must_equal_a_run_of_the_measured_model() -> None:
    measured = _measured()
    found = compare(measured, measured.other_logits[1], "x", 1)
    assert (found.near_tied, found.wrong, found.passed) == (1, 0, True)
    assert found.max_difference == 0.0
    elsewhere = measured.logits.copy()
    elsewhere[0] += 0.25
    assert compare(measured, elsewhere, "x", 1).wrong == 1
    unmoved = replace(measured, other_selection=np.zeros_like(measured.other_selection))
    assert compare(unmoved, measured.other_logits[1], "x", 1).wrong == 1


def test_few_images_may_be_near_tied_and_none_may_be_nan() -> None:
    measured = _measured()
    logits = measured.logits + 0.5
    many = replace(
        measured, other_logits=logits[None], other_selection=np.ones((1, len(logits)), bool)
    )
    found = compare(many, logits, "x", 1)
    assert (found.near_tied, found.wrong, found.passed) == (40, 0, False)
    broken = measured.logits.copy()
    broken[3, 3] = np.nan
    assert compare(measured, broken, "x", 1).wrong == 1
    assert not compare(measured, broken, "x", 1).passed


def test_fresh_process_cannot_import_what_others_can(study: Study) -> None:
    """The project is installed, so `python -I` alone would find it: the guard has work to do."""
    asks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vitpareto') is None)"
    alone = subprocess.run([sys.executable, "-I", "-c", asks])
    assert alone.returncode == 0
    found = json.loads((study.bundle("topk") / "verification.json").read_text())
    assert "vitpareto" in found["cannot_import"] and "timm" in found["cannot_import"]


# --- which trial


def _finished(trial: int, top1: float, gmacs: float, method: str = "topk") -> TrialResult:
    tokens = None if method == "dense" else RecordedStep(method, {})
    recipe = RecordedRecipe(tokens=tokens)
    return TrialResult(trial, "finished", recipe, str(trial), {"top1": top1, "gmacs": gmacs})


RESULTS = [
    _finished(0, 80.0, 4.0, "dense"), _finished(1, 79.0, 2.0), _finished(2, 71.0, 1.0),
    TrialResult(3, "failed", RecordedRecipe(), "3", reason="it broke"),
]  # fmt: skip
AXES = [OBJECTIVES["top1"], OBJECTIVES["gmacs"]]


def test_choice_by_budget_knee_and_number() -> None:
    assert choose_trial(RESULTS, AXES, max_gmacs=3).trial == 1
    assert choose_trial(RESULTS, AXES, min_top1=70).trial == 2
    assert choose_trial(RESULTS, AXES, knee=True).trial == 1
    assert choose_trial(RESULTS, AXES, trial=0).trial == 0


@pytest.mark.parametrize(
    ("options", "code", "details"),
    [
        ({}, "missing", {}),
        ({"knee": True, "trial": 1}, "conflict", {}),
        ({"max_gmacs": 0.5}, "empty", {"budget": {"gmacs": 0.5}}),
        ({"min_top1": 90.0}, "empty", {"budget": {"top1": 90.0}}),
        ({"max_latency_ms": 2.0}, "empty", {"untimed": 3}),
        ({"max_gmacs": float("nan")}, "out-of-range", {"name": "gmacs"}),
        ({"trial": 3}, "unsupported", {"trial": 3, "state": "failed"}),
        ({"trial": 9}, "not-found", {"trial": 9, "nearest": (2, 1, 0)}),
    ],
)
def test_an_impossible_choice_is_refused(options: dict, code: str, details: dict) -> None:
    with refused(code, UserError, **details):
        choose_trial(RESULTS, AXES, **options)


def test_a_front_without_a_knee() -> None:
    with refused("empty", UserError, front=(1, 0)):
        choose_trial(RESULTS[:2], AXES, knee=True)
    with refused("empty", UserError, trials=1):
        choose_trial(RESULTS[3:], AXES, knee=True)
