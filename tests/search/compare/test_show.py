"""From names and files to what is followed: whose images, whose class names, whose calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.refusals import refused
from tests.search import small
from vitpareto.methods import BadInput, Recipe
from vitpareto.search.compare.show import MOST, trace_images
from vitpareto.search.compare.trace_request import TraceRequest
from vitpareto.search.data import embedded_images
from vitpareto.search.errors import UserError
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import fingerprint
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult

TOPK = Recipe.of("topk", keep_rate=0.6, prune_layers=[3, 6, 9])
RAJNI = Recipe.of("rajni", gamma=0.3, min_tokens=8)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    out = []
    for i, pixels in enumerate(embedded_images.draw("search")[0][:2]):
        out.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(out[-1])
    return out


def test_without_files_the_first_search_images_are_shown(cache: Path) -> None:
    seen = trace_images(TraceRequest(TOPK), cache=cache)
    pixels, labels = embedded_images.draw("search")
    assert [image.name for image in seen.images] == [f"digits search {i}" for i in range(4)]
    for image, expected, label in zip(seen.images, pixels, labels, strict=False):
        assert np.array_equal(image.pixels, expected) and image.truth == str(label)
    assert seen.recipe == TOPK and seen.notes == ()
    assert len(trace_images(TraceRequest(TOPK), images=2, cache=cache).images) == 2


def test_files_are_shown_as_the_model_sees_them(cache: Path, files: list[Path]) -> None:
    seen = trace_images(TraceRequest(TOPK), files, cache=cache)
    parent = files[0].parent.name
    assert [image.name for image in seen.images] == [f"{parent}/0.png", f"{parent}/1.png"]
    own = trace_images(TraceRequest(TOPK), images=2, cache=cache)
    for a, b in zip(seen.images, own.images, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.group, b.group)
        assert a.pruned == b.pruned and a.truth is None


def test_calibration_uses_the_datas_images_or_a_note_names_others(
    cache: Path, files: list[Path], tmp_path: Path
) -> None:
    whole = trace_images(TraceRequest(RAJNI), files, cache=cache)
    assert whole.notes == ("rajni is calibrated on the 200 calibration images of digits",)
    model = embedded_model.build()
    images = embedded_images.normalise(embedded_images.draw("calibration")[0])
    assert whole.recipe == RAJNI.build(model, calibration=images).recipe

    # a model of nobody's classes, and files alone: there are no other images
    name = own_model(tmp_path / "own")
    few = trace_images(TraceRequest(RAJNI, name), files, cache=cache)
    (note,) = few.notes
    assert "calibrated on the images shown (2)" in note
    assert few.recipe.tokens is not None and len(few.recipe.tokens.params["counts"]) == 12
    assert few.images[0].dense.name == f"class {few.images[0].dense.label}"
    # with its data named, theirs
    named = trace_images(TraceRequest(RAJNI, name, data="digits"), files, cache=cache)
    assert named.notes == whole.notes
    assert named.images[0].dense.name in embedded_images.CLASSES


def own_model(folder: Path) -> str:
    """A user's own model of 10 classes, as timm's `local-dir:` takes it; weights are random."""
    folder.mkdir()
    settings = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 12, "num_heads": 2}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": settings,
        "pretrained_cfg": {"input_size": [3, 64, 64], "num_classes": 10},
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **settings)
    save_file(model.state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"


def test_a_method_without_trained_parts_is_noted(cache: Path) -> None:
    recipe = Recipe.of("patchmerger", prune_layers=[4], num_tokens=12)
    (note,) = trace_images(TraceRequest(recipe), images=1, cache=cache).notes
    assert note.startswith("patchmerger needs training")


def test_classes_are_named_by_the_data(cache: Path, tmp_path: Path) -> None:
    classes = ("n01440764", "n02123045", "n02123159")  # tench, tabby, tiger cat
    folder = small.image_folder(tmp_path / "data", classes, 8)
    weights = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    save_file(model.state_dict(), weights)
    asked = TraceRequest(Recipe(), "vit_tiny_patch16_224", weights, str(folder))
    (image,) = trace_images(asked, images=1, cache=cache).images
    assert image.dense.name in ("tench", "tabby", "tiger cat") and image.dense.label < 3
    assert image.truth in ("tench", "tabby", "tiger cat") and image.name == "data search 0"
    with refused("mismatch", UserError, got=1000, accepted=(10,)):
        trace_images(replace(asked, data="digits"), cache=cache)


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """A study as a search leaves it, with a calibrated trial 1 and a failed trial 2."""
    folder = StudyFolder(tmp_path / "studies" / "s")
    folder.create()
    model = embedded_model.build()
    folder.identity.settle({"model_fingerprint": fingerprint(model)})
    folder.write_job(JobRequest({"name": "s", "model": "digits", "data": "digits", "images": 30}))
    save_file(model.state_dict(), folder.weights)
    counts = [64, 60, 50, *[40] * 9]
    tokens = {**RAJNI.to_dict()["tokens"], "counts": counts}
    resolved = RecordedRecipe.from_json({"tokens": tokens})
    folder.trials.write(
        TrialResult(1, "finished", RecordedRecipe.of(RAJNI), "k", {"top1": 90.0}, resolved)
    )
    folder.trials.write(
        TrialResult(2, "failed", RecordedRecipe.of(TOPK), "f", reason="ValueError: no")
    )
    return folder


def test_a_trial_is_shown_as_it_was_measured(study: StudyFolder, cache: Path) -> None:
    seen = trace_images(TraceRequest.of_trial(study, 1), images=2, cache=cache)
    assert seen.images[0].patches == (64, 60, 50, *[40] * 9) and seen.notes == ()
    assert seen.images[0].truth is not None

    with refused("not-found", UserError, study="s", trial=7):
        TraceRequest.of_trial(study, 7)
    with refused("unsupported", UserError, trial=2, state="failed"):
        TraceRequest.of_trial(study, 2)
    (study.folder / "study.json").write_text('{"schema": 1, "model_fingerprint": "0123"}')
    with refused("mismatch", UserError, key="model_fingerprint", expected="0123"):
        trace_images(TraceRequest.of_trial(study, 1), cache=cache)


def test_bad_input_is_named(cache: Path, files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:200])
    cases = (
        ([tmp_path / "no.png"], None, "not-found", {"path": str(tmp_path / "no.png")}),
        ([tmp_path], None, "wrong-type", {"path": str(tmp_path)}),
        ([broken], None, "unreadable", {"path": str(broken)}),
        (files, 2, "conflict", {"name": "images"}),
        ([], MOST + 1, "out-of-range", {"got": MOST + 1}),
        ([], 0, "out-of-range", {"got": 0}),
        (files * MOST, None, "out-of-range", {"got": len(files) * MOST}),
    )
    for given, images, code, details in cases:
        with refused(code, UserError, **details):
            trace_images(TraceRequest(TOPK), given, images=images, cache=cache)
    with pytest.raises(BadInput):
        trace_images(TraceRequest(Recipe.of("topk", keep_rate=0.5, prune_layers=[12])), cache=cache)
