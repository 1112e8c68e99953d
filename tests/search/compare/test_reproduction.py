"""Published accuracies measured again: the whole folder, the source's crop, and never a number that
was not measured. Real images, the embedded model's real weights, no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.refusals import refused
from vitpareto.methods import Recipe
from vitpareto.search.compare import published
from vitpareto.search.compare.published import PublishedRow
from vitpareto.search.compare.reproduction import (
    NO_DATA,
    EvaluationSetup,
    ReproducedAccuracy,
    ReproducedRow,
    reproduce,
    select,
)
from vitpareto.search.data import embedded_images
from vitpareto.search.data.datasets import open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.data.splits import EVALUATION
from vitpareto.search.measure.accuracy import evaluate
from vitpareto.search.models import embedded_model
from vitpareto.search.stats.intervals import wilson_interval

DENSE = PublishedRow("dense", "digits", {}, "here", False, "embedded", top1=90.0, timm_tag="digits")
TOPK = replace(
    DENSE, method="topk", setting={"keep_rate": 0.25, "prune_layers": [3, 6, 9]}, gflops=1.0,
    counter="fvcore", top1=80.0, dense_top1=90.0,
)  # fmt: skip
RAJNI = replace(
    DENSE, method="rajni", setting={"gamma": 0.5, "min_tokens": 4}, reproducible=False, why="w"
)
ATS = replace(DENSE, method="ats", setting={"prune_layers": [3, 6]})
TRAINED = replace(TOPK, trained=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits as an image folder: DIR/CLASS/*.png, lossless."""
    root = tmp_path_factory.mktemp("digits") / "val"
    pixels, labels = embedded_images.draw("held-out")
    for i, (image, label) in enumerate(zip(pixels[:60], labels[:60], strict=True)):
        of_class = root / embedded_images.CLASSES[label]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(of_class / f"{i:03}.png")
    return root


@pytest.fixture
def evaluation(folder: Path, tmp_path: Path) -> EvaluationSetup:
    return EvaluationSetup(str(folder), tmp_path / "cache", batch=16)


def measured(one: ReproducedRow) -> ReproducedAccuracy:
    assert one.accuracy is not None, one.why
    return one.accuracy


def test_dense_and_pruned_are_measured_on_every_image(
    evaluation: EvaluationSetup, folder: Path
) -> None:
    """The figures are those of the evaluation itself, over all splits of the folder."""
    model = embedded_model.build()
    data = open_data(str(folder), Preprocess.of(model), cache=evaluation.cache)
    splits = [data.split(name) for name in EVALUATION]
    assert sum(map(len, splits)) == 60

    def right(recipe: Recipe) -> np.ndarray:
        built = recipe.build(model)
        options = {"batch": 16, "device": "cpu", "dtype": torch.float32}
        found = [evaluate(built, s, Preprocess.of(model), **options).top1 for s in splits]
        return np.concatenate(found)

    seen: list[tuple[str, int, int]] = []
    watched = replace(evaluation, seen=lambda *what: seen.append(what))
    dense, topk = list(reproduce([DENSE, TOPK], watched))
    expected = right(Recipe.of("topk", keep_rate=0.25, prune_layers=[3, 6, 9]))
    ours = measured(topk)
    assert ours.top1 == pytest.approx(100 * expected.mean()) and ours.images == 60
    assert (ours.top1_low, ours.top1_high) == wilson_interval(int(expected.sum()), 60)
    assert ours.dense_top1 == pytest.approx(100 * right(Recipe()).mean())
    assert measured(dense).top1 == ours.dense_top1 != ours.top1
    assert topk.gflops == pytest.approx(ours.gmacs) and dense.gflops is None
    assert 0.25 < ours.gmacs / measured(dense).gmacs < 0.4 and ours.unreadable == 0
    # dense once, not once a row
    whats = list(dict.fromkeys(what for what, _, _ in seen))
    assert whats == ["digits, dense", TOPK.label] and seen[-1][1:] == (60, 60)


def test_what_images_decide_is_calibrated_or_averaged(evaluation: EvaluationSetup) -> None:
    rajni, ats = list(reproduce([RAJNI, ATS], evaluation))
    dense = 0.0334
    assert 0.2 * dense < measured(rajni).gmacs < dense and rajni.gflops is None
    assert 0.2 * dense < measured(ats).gmacs < dense


def test_the_sources_crop_is_taken(evaluation: EvaluationSetup) -> None:
    """A crop of 0.5 enlarges the middle: other pixels, another result."""
    plain, cropped = list(reproduce([DENSE, replace(DENSE, crop_pct=0.5)], evaluation))
    assert measured(cropped).top1 < measured(plain).top1


def test_unreadable_images_are_counted_and_left_out(
    evaluation: EvaluationSetup, folder: Path
) -> None:
    pixels, labels = embedded_images.draw("search")
    root = Path(evaluation.cache).parent / "many"
    for i in range(200):
        kind = root / embedded_images.CLASSES[labels[i]]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(kind / f"{i:03}.png")
    broken = next(iter(sorted(root.glob("0/*.png"))))
    broken.write_bytes(broken.read_bytes()[:40])
    (one,) = reproduce([DENSE], replace(evaluation, data=str(root)))
    assert measured(one).images == 199 and measured(one).unreadable == 1


def test_weights_from_a_folder(evaluation: EvaluationSetup, tmp_path: Path) -> None:
    """The file named like the tag, and these weights: zeros give one class for every image."""
    state = {k: torch.zeros_like(v) for k, v in embedded_model.build().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "digits.safetensors")
    (one,) = reproduce([DENSE], replace(evaluation, weights=tmp_path))
    assert measured(one).top1 < 20


# --- no number where nothing was measured


def numbers(found: Iterator[ReproducedRow]) -> list[ReproducedAccuracy | None]:
    return [one.accuracy for one in found]


def test_without_data_no_published_row_has_a_number() -> None:
    found = list(reproduce(published.rows(), None))
    assert len(found) == len(published.rows()) and not any(one.accuracy for one in found)
    whys = {one.row.method: one.why for one in found if not one.row.trained}
    assert set(whys.values()) == {NO_DATA} and {"tome", "ppt", "rajni"} <= set(whys)
    assert {one.why for one in found if one.row.trained} == {"fine-tuned by its source"}
    assert sum(one.gflops is not None for one in found) == 25, "costs need neither"


def test_a_row_without_weights_names_them(evaluation: EvaluationSetup, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (one,) = reproduce([DENSE], replace(evaluation, weights=tmp_path / "w"))
    assert one.accuracy is None
    assert "digits.safetensors" in one.why and str(tmp_path / "w") in one.why


def test_weights_that_cannot_be_downloaded(
    evaluation: EvaluationSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loader says is the reason, without the advice for another command."""
    import timm

    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> object:
        if pretrained:
            raise ConnectionError("no route to host")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    row = replace(
        DENSE, model="vit_tiny_patch16_224", timm_tag="vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    )
    names = ("n01440764", "n01443537")
    root = evaluation.cache.parent / "imagenet"
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    (one,) = reproduce([row], replace(evaluation, data=str(root)))
    assert one.accuracy is None
    assert one.why.endswith("are not available (ConnectionError: no route to host)")


def test_a_model_with_non_finite_logits_is_reported_and_the_next_row_runs(
    evaluation: EvaluationSetup, tmp_path: Path
) -> None:
    state = {
        k: torch.full_like(v, torch.nan) for k, v in embedded_model.build().state_dict().items()
    }
    safetensors.torch.save_file(state, tmp_path / "digits.safetensors")
    found = list(reproduce([DENSE, TOPK], replace(evaluation, weights=tmp_path)))
    assert numbers(iter(found)) == [None, None]
    assert all("non-finite logits" in one.why for one in found)


def test_trained_rows_are_never_measured(evaluation: EvaluationSetup) -> None:
    (one,) = reproduce([TRAINED], evaluation)
    assert one.accuracy is None and one.why == "fine-tuned by its source"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"data": "/nowhere/val"}, "not-found"),
        ({"data": "OTHER"}, "mismatch"),
        ({"weights": Path("/nowhere/w")}, "not-found"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(
    evaluation: EvaluationSetup,
    change: dict,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if change.get("data") == "OTHER":
        for name in ("cat", "dog"):
            (tmp_path / "other" / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "other" / name / f"{i}.png")
        change = {"data": str(tmp_path / "other")}

    def never(*_: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("vitpareto.search.compare.reproduction.load_model", never)
    with refused(code):
        list(reproduce([DENSE], replace(evaluation, **change)))


def test_rows_of_a_model_by_name() -> None:
    chosen = select(published.rows(), ["deit_small_patch16_224"])
    assert {r.method for r in chosen} == {"ppt", "evit", "dynamicvit"}
    assert select(published.rows()) == published.rows()
    with refused("unknown-name", name="deit_smal_patch16_224"):
        select(published.rows(), ["deit_smal_patch16_224"])
