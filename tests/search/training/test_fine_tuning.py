"""`vitpareto finetune`: what it trains, keeps, continues and refuses."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from tests.refusals import refused
from tests.search.small import PREPROCESS, images
from vitpareto import cli
from vitpareto.methods import BadInput, Recipe, model_shape, weights_digest
from vitpareto.search.data import embedded_images
from vitpareto.search.data.datasets import open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import evaluate
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import load_model
from vitpareto.search.training.fine_tuning import FinetuneJob, finetune, fit_head
from vitpareto.search.training.finetune_result import FinetuneResult
from vitpareto.search.training.settings import TrainingSettings
from vitpareto.search.training.teachers import Renormalised


def folder(root: Path, labels: dict[int, str], splits: dict[str, tuple[str, int]]) -> Path:
    """ROOT/SPLIT/CLASS/NNN.png: that many of the embedded digits of these labels."""
    for split, (source, count) in splits.items():
        drawn, truth = embedded_images.draw(source)
        chosen = [i for i in range(len(truth)) if truth[i] in labels][:count]
        for i in chosen:
            place = root / split / labels[int(truth[i])]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn[i]).save(place / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training images of the ten digits, and 60 others."""
    splits = {"train": ("train", 64), "val": ("search", 60)}
    return folder(tmp_path_factory.mktemp("ten"), {i: str(i) for i in range(10)}, splits)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits, under the names of ImageNet classes."""
    named = {1: "n01440764", 4: "n01443537", 7: "n01484850"}
    splits = {"train": ("train", 32), "val": ("search", 40)}
    return folder(tmp_path_factory.mktemp("three"), named, splits)


@pytest.fixture
def job(data: Path, cache: Path, tmp_path: Path) -> FinetuneJob:
    settings = TrainingSettings(epochs=2, batch=32, augment="none", smoothing=0.0)
    return FinetuneJob("digits", str(data), tmp_path / "out", settings, cache)


def run_logged(job: FinetuneJob) -> tuple[FinetuneResult, list[str]]:
    said: list[str] = []
    return finetune(job, say=said.append, progress=lambda epoch: said.append(str(epoch))), said


def record(job: FinetuneJob) -> dict:
    return json.loads((job.out / "training.json").read_text())


def test_a_model_is_trained_kept_and_not_trained_again(job: FinetuneJob) -> None:
    trained, said = run_logged(job)
    assert [s.split(":")[0] for s in said] == ["before", "epoch 0", "epoch 1"]
    assert sorted(p.name for p in job.out.iterdir()) == ["model.safetensors", "training.json"]
    weights = job.out / "model.safetensors"
    model = load_model("digits", weights)
    assert weights_digest(safetensors.torch.load_file(weights)) == trained.weights
    before = load_model("digits").state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())

    written = record(job)
    assert written["weights"] == trained.weights and written["recipe_trained"] == {}
    assert written["settings"]["lr"] == 1e-4 and written["settings"]["epochs"] == 2
    assert [e["index"] for e in written["history"]] == [0, 1]
    assert {"torch", "timm", "vitpareto", "python"} == set(written["versions"])
    assert len(written["data_fingerprint"]) == len(written["train_fingerprint"]) == 64
    found = open_data(job.data, PREPROCESS, cache=job.cache).split("search")
    seen = evaluate(model, found, PREPROCESS, batch=64, device="cpu", dtype=torch.float32)
    assert trained.after.top1 == 100 * seen.top1.mean() and trained.after.images == len(seen.top1)
    assert trained.after.low < trained.after.top1 < trained.after.high
    assert trained.next_step("digits", None, job.data, None) == (
        f"search with it: vitpareto search --model digits --weights {weights} --data {job.data}"
    )

    stamp = weights.stat().st_mtime_ns
    again, said = run_logged(job)
    assert again == trained and said == [f"{job.out} already holds this training, finished"]
    assert weights.stat().st_mtime_ns == stamp
    other = replace(job, settings=replace(job.settings, lr=0.5, epochs=3))
    with refused("mismatch", UserError, path=str(job.out), keys=["epochs", "lr"]):
        finetune(other)
    assert record(job) == written
    (job.out / "training.json").write_text("{}")
    with refused("unreadable", UserError, path=str(job.out / "training.json")):
        finetune(job)


@pytest.mark.parametrize("recipe", [
    Recipe(),
    Recipe.of("tnt", prune_layers=[2], keep_rates=[0.6]),
], ids=["dense", "tnt"])  # fmt: skip
def test_an_interrupted_training_is_continued(
    job: FinetuneJob, recipe: Recipe, tmp_path: Path
) -> None:
    job = replace(job, recipe=recipe)
    whole = finetune(replace(job, out=tmp_path / "whole"))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(job, progress=stop)
    assert [p.name for p in job.out.iterdir()] == ["state.pt"]
    # other settings do not go on from it, nor lose it
    with refused("mismatch", UserError, path=str(job.out / "state.pt"), keys=["smoothing"]):
        finetune(replace(job, settings=replace(job.settings, smoothing=0.1)))
    trained, said = run_logged(job)
    assert said[1] == f"continuing from {job.out / 'state.pt'}"
    assert [s.split(":")[0] for s in said[2:]] == ["epoch 1"]
    assert trained == replace(whole, out=job.out)
    assert not (job.out / "state.pt").exists()


RECIPES = {
    "patchmerger": {"prune_layers": [2], "num_tokens": 24},
    "dynamicvit": {"prune_layers": [3], "keep_rates": [0.6]},
    "topk": {"keep_rate": 0.5},
}


@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_is_trained_and_rebuilt_from_its_files(job: FinetuneJob, method: str) -> None:
    recipe = Recipe.of(method, **RECIPES[method])
    job = replace(job, recipe=recipe, settings=replace(job.settings, epochs=1))
    trained, _ = run_logged(job)
    weights = safetensors.torch.load_file(job.out / "model.safetensors")
    kept = Recipe.from_yaml((job.out / "recipe.yaml").read_text())
    assert kept == trained.recipe and kept.weights == trained.weights == weights_digest(weights)
    assert record(job)["recipe_trained"] == kept.to_dict()
    # the model itself is who it followed
    assert record(job)["teacher"] == record(job)["model_fingerprint"]
    dense = load_model("digits")
    built = kept.build(dense, weights=weights)
    found = open_data(job.data, PREPROCESS, cache=job.cache).split("search")
    seen = evaluate(built, found, PREPROCESS, batch=64, device="cpu", dtype=torch.float32)
    assert trained.after.top1 == 100 * seen.top1.mean()
    fresh = built.state_dict()
    moved = {k for k, v in dense.state_dict().items() if not torch.equal(v, fresh[k])}
    assert moved
    begin, out = f"measure it: vitpareto measure --model digits --data {job.data}", job.out
    assert trained.next_step("digits", Path("w.pth"), job.data, Path("r.yaml")) == (
        f"{begin} --weights w.pth --recipe {out / 'recipe.yaml'} --trained "
        f"{out / 'model.safetensors'}"
    )
    assert replace(trained, fresh=True).next_step("digits", None, job.data, Path("r.yaml")) == (
        f"{begin} --weights {out / 'model.safetensors'} --recipe r.yaml"
    )


def test_revit_is_trained_from_scratch(job: FinetuneJob) -> None:
    recipe = Recipe.of("revit", embedding=32)
    settings = replace(job.settings, epochs=1, lr=1e-3)
    job = replace(job, recipe=recipe, from_scratch=True, settings=settings)
    trained, said = run_logged(job)
    assert said[0].endswith("(fresh)") and record(job)["teacher"] is None
    model = load_model("digits", job.out / "model.safetensors")
    assert model_shape(model).dim == 32
    assert "vitpareto search" in trained.next_step("digits", None, job.data, None)
    # the same seed, the same fresh weights and the same training
    again = finetune(replace(job, out=job.out.with_name("again")))
    assert again.weights == trained.weights
    other = replace(job, out=job.out.with_name("other"), settings=replace(settings, seed=1))
    assert finetune(other).weights != trained.weights


def test_another_number_of_classes_gets_a_new_head(job: FinetuneJob, three: Path) -> None:
    job = replace(job, data=str(three), settings=replace(job.settings, epochs=1))
    trained, said = run_logged(job)
    assert trained.fresh and said[0] == "new head with 3 classes (the model had 10)"
    assert load_model("digits", job.out / "model.safetensors").head.out_features == 3
    # no teacher: the model's head is untrained
    assert record(job)["teacher"] is None
    with refused("conflict", UserError, name="teacher", got="dense"):
        finetune(replace(job, teacher="dense", out=job.out.with_name("other")))


def test_a_head_of_imagenet_keeps_the_rows_of_its_classes(three: Path, cache: Path) -> None:
    data = open_data(str(three), PREPROCESS, cache=cache)
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=1000
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    batch = images(4)
    before = model(batch)
    assert fit_head(model, data, 0) == "head reduced to the data's 3 of 1000 classes"
    assert model.num_classes == 3
    torch.testing.assert_close(model(batch), before[:, [0, 1, 2]])
    assert fit_head(model, data, 0) == ""


def test_a_teacher_sees_images_as_it_is_used_to() -> None:
    teacher = load_model("digits")
    own = Preprocess.of(teacher)
    raw = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8)
    other = replace(own, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    shown = Renormalised(teacher, other, own)(other.normalise(raw))
    torch.testing.assert_close(shown, teacher(own.normalise(raw)), rtol=0, atol=1e-4)


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(
    job: FinetuneJob, data: Path, three: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "three.safetensors"
    own = embedded_model.build()
    own.reset_classifier(3)
    safetensors.torch.save_file(own.state_dict(), weights)
    train_less = folder(tmp_path / "held", {0: "a", 1: "b"}, {"val": ("search", 20)})
    named = replace(Recipe.of("topk", keep_rate=0.5), weights="0123456789abcdef")
    deep = Recipe.of("topk", keep_rate=0.5, prune_layers=[12])
    cases: list[tuple[dict[str, Any], str | None, dict[str, Any]]] = [
        ({"data": str(train_less)}, "missing",
         {"name": "train", "splits": ["calibration", "search", "held-out"]}),
        ({"teacher": "digits", "teacher_weights": weights}, "mismatch",
         {"name": "teacher", "got": 3, "expected": 10}),
        ({"weights": weights, "from_scratch": True}, "conflict", {"name": "weights"}),
        ({"recipe": named}, "conflict", {"got": "0123456789abcdef"}),
        # refused by other rooms
        ({"teacher": "digist"}, None, {}),
        ({"recipe": deep, "data": "nowhere"}, None, {}),
    ]  # fmt: skip
    for change, code, details in cases:
        with pytest.raises(BadInput) if code is None else refused(code, **details):
            finetune(replace(job, **change))
        assert not job.out.exists()


@pytest.mark.parametrize("wrong", [
    {"epochs": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"smoothing": 1.0}, {"mixup": -1.0},
    {"parts_scale": 0.0},
], ids=str)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with refused("out-of-range", UserError, name=next(iter(wrong))):
        TrainingSettings(**wrong)


def test_an_unknown_distillation_is_refused() -> None:
    with refused("unknown-name", UserError, name="distill", got="sfot"):
        TrainingSettings(distill="sfot")


def test_a_loss_that_is_not_finite_is_refused_with_its_step(job: FinetuneJob) -> None:
    with refused("out-of-range", UserError, name="lr", got=1e30):
        finetune(replace(job, settings=replace(job.settings, lr=1e30)))
    assert list(job.out.iterdir()) == []


def test_the_command(
    data: Path, cache: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text("tokens: {method: patchmerger, prune_layers: [2], num_tokens: 24}\n")

    def call(*arguments: object) -> int:
        line = ["vitpareto", "finetune", "--data", data, "--cache", cache, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(a) for a in (*line, *arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    common = ("--recipe", recipe, "--epochs", 1, "--batch", 32, "--mixup", 0.2, "--device", "cpu")
    assert call(*common, "--teacher", "none") == 0
    said = capsys.readouterr()
    assert re.search(r"^epoch 0: loss [\d.]+, learning rate \S+; 0 to go, \d+ s$", said.err, re.M)
    lines = said.out.splitlines()
    assert lines[0].startswith("patchmerger prune_layers=[2] num_tokens=24 weights=")
    assert re.search(r"after  [\d.]+ % \([\d.]+–[\d.]+, 12 images\)$", lines[1])
    assert lines[3].startswith("measure it: vitpareto measure --model digits --data ")
    assert call(*common) == 2
    said = capsys.readouterr()
    assert str(out) in said.err and "teacher was null, now" in said.err
    assert call("--epochs", 1, "--augment", "flip", "--out", tmp_path / "other") == 2
    assert "unknown augmentation 'flip'" in capsys.readouterr().err
