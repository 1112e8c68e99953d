"""Losses against their formulas, and training batches against what they promise."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from tests.refusals import refused
from tests.search.small import PREPROCESS, images, vit
from vitpareto import methods
from vitpareto.search.data.datasets import Data, open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.training.batches import (
    AUGMENTATIONS,
    AugmentedBatches,
    augment,
    choose_augmentation,
)
from vitpareto.search.training.losses import Distillation, check_teacher, supervised, two_heads

LABELS = torch.tensor([3, 1, 4, 1])


def distilled(classes: int = 10) -> VisionTransformerDistilled:
    torch.manual_seed(0)
    model = VisionTransformerDistilled(
        img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=classes
    )
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    target = torch.eye(logits.shape[1])[labels] * (1 - smoothing) + smoothing / logits.shape[1]
    return -(target * log_softmax(logits)).sum(dim=1).mean()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = log_softmax(student), log_softmax(teacher)
    return (theirs.exp() * (theirs - ours)).sum(dim=1).mean()


def test_labels_smoothing_and_soft_targets() -> None:
    model, batch = vit(), images(4)
    logits = model(batch)
    for smoothing in (0.0, 0.1):
        found = supervised(smoothing=smoothing)(model, batch, LABELS)
        torch.testing.assert_close(found, cross_entropy(logits, LABELS, smoothing))
        # soft targets have been smoothed by mixup, and are not once more
        soft = torch.eye(10)[LABELS] * 0.7 + 0.03
        found = supervised(smoothing=smoothing)(model, batch, soft)
        torch.testing.assert_close(found, -(soft * log_softmax(logits)).sum(dim=1).mean())


@pytest.mark.parametrize("reduced", [False, True])
def test_soft_and_hard_distillation_are_the_papers(reduced: bool) -> None:
    teacher, batch = distilled().train(), images(4)
    model = methods.prune(vit(), "topk", keep_rate=0.5) if reduced else vit()
    ours, theirs = model(batch), copy.deepcopy(teacher).eval()(batch)
    labels = cross_entropy(ours, LABELS, 0.1)
    found = supervised(teacher, smoothing=0.1)(model, batch, LABELS)
    torch.testing.assert_close(found, 0.9 * labels + 0.1 * 9 * divergence(ours / 3, theirs / 3))
    found = supervised(teacher, Distillation("hard"), 0.1)(model, batch, LABELS)
    hard = cross_entropy(ours, theirs.argmax(dim=1))
    torch.testing.assert_close(found, 0.5 * labels + 0.5 * hard)
    found = supervised(teacher, Distillation("soft", 1.0, 1.0))(model, batch, LABELS)
    torch.testing.assert_close(found, divergence(ours, theirs))
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    for p in vit().parameters():
        p.grad = None


@pytest.mark.parametrize("reduced", [False, True])
def test_two_heads_are_taught_apart(reduced: bool) -> None:
    """DeiT's: labels to the class head, the teacher to the distillation head."""
    model, teacher, batch = distilled().train(), vit(), images(4)
    if reduced:
        model = methods.prune(model, "topk", keep_rate=0.5)
    with two_heads(model, True):
        of_labels, of_teacher = model(batch)
        found = supervised(teacher, Distillation("hard"))(model, batch, LABELS)
        alone = supervised()(model, batch, LABELS)
    expected = cross_entropy(of_labels, LABELS), cross_entropy(of_teacher, teacher(batch).argmax(1))
    torch.testing.assert_close(found, sum(expected) / 2)
    torch.testing.assert_close(alone, (expected[0] + cross_entropy(of_teacher, LABELS)) / 2)
    # closed again, and for who does not ask: one answer
    torch.testing.assert_close(model(batch), (of_labels + of_teacher) / 2)
    with two_heads(model, False), two_heads(vit(), True):
        assert isinstance(model(batch), Tensor) and isinstance(vit()(batch), Tensor)


@pytest.mark.filterwarnings("ignore::vitpareto.methods.Untrained")
def test_dynamicvits_losses_are_the_papers() -> None:
    model = methods.prune(vit(), "dynamicvit", prune_layers=[1, 4], keep_rates=[0.6, 0.3]).train()
    batch = images(4)
    torch.manual_seed(0)
    tokens, _ = model.run(batch)
    logits = model.classify(tokens)
    features = vit().forward_features(batch)
    kept, own = tokens.kept, model.norm(tokens.x)
    off = ((own - features) ** 2)[:, 1:].mean(dim=2)
    distance = sum((k * o).sum() for k, o in zip(kept, off, strict=True)) / kept.sum()
    expected = cross_entropy(logits, LABELS, 0.1) + model.reduction.penalty(tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(supervised(smoothing=0.1)(model, batch, LABELS), expected)
    taught = 0.5 * divergence(logits, vit()(batch)) + 0.5 * distance
    torch.manual_seed(0)
    found = supervised(vit(), smoothing=0.1)(model, batch, LABELS)
    torch.testing.assert_close(found, expected + taught)
    assert distance > 0
    # a teacher of another form is followed by its logits alone
    teacher = distilled()
    torch.manual_seed(0)
    other = supervised(teacher, smoothing=0.1)(model, batch, LABELS)
    theirs = teacher(batch)
    torch.testing.assert_close(other, expected + 0.5 * divergence(logits, theirs))


def test_a_teacher_of_other_classes_is_refused_with_both_numbers() -> None:
    with refused("mismatch", UserError, got=7, expected=10):
        check_teacher(distilled(7), vit())
    with refused("mismatch", UserError, got=7, expected=10):
        supervised(distilled(7))(vit(), images(4), LABELS)


@pytest.mark.parametrize("make, code, name, got", [
    (lambda: Distillation("sof"), "unknown-name", "distill", "sof"),
    (lambda: Distillation("soft", 1.5), "out-of-range", "weight", 1.5),
    (lambda: Distillation("soft", 0.5, 0.0), "out-of-range", "temperature", 0.0),
    (lambda: supervised(smoothing=1.0), "out-of-range", "smoothing", 1.0),
    (lambda: choose_augmentation("shfit", PREPROCESS, "x"), "unknown-name", "augment", "shfit"),
])  # fmt: skip
def test_invalid_settings_are_refused(make, code, name, got) -> None:
    with refused(code, UserError, name=name, got=got):
        make()


# --- batches


@pytest.fixture(scope="module")
def digits(cache: Path) -> Data:
    return open_data("digits", PREPROCESS, cache=cache)


def of(digits: Data, **settings: object) -> AugmentedBatches:
    return AugmentedBatches(
        digits.split("calibration"),
        PREPROCESS,
        10,
        64,
        **settings,  # type: ignore[arg-type]
    )


def all_of(batches: AugmentedBatches, epoch: int) -> list[tuple[Tensor, Tensor]]:
    return list(batches(epoch))


def test_every_image_is_seen_once_an_epoch_in_another_order(digits: Data) -> None:
    split = digits.split("calibration")
    batches = AugmentedBatches(split, PREPROCESS, 10, 50)
    whole = PREPROCESS.normalise(split.batch(0, 200)[0])
    known = {image.numpy().tobytes(): i for i, image in enumerate(whole.split(1))}
    orders = []
    for epoch in (0, 1):
        order = [
            (known[image.numpy().tobytes()], int(label))
            for shown, labels in batches(epoch)
            for image, label in zip(shown.split(1), labels, strict=True)
        ]
        assert sorted(i for i, _ in order) == list(range(200))
        assert all(split.labels[i] == label for i, label in order)
        orders.append([i for i, _ in order])
    assert orders[0] != orders[1]
    # the last, smaller one is left out, unless it is all there is
    assert [len(x) for x, _ in of(digits)(0)] == [64, 64, 64] and len(of(digits)(0)) == 3
    assert [len(x) for x, _ in AugmentedBatches(split, PREPROCESS, 10, 999)(0)] == [200]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batches_follow_from_seed_and_epoch_alone(digits: Data, augmentation: str) -> None:
    settings = {"augmentation": augmentation, "mixup": 0.4, "smoothing": 0.1, "seed": 3}
    np.random.seed(0)
    torch.manual_seed(0)
    first = all_of(of(digits, **settings), 5)
    after = np.random.rand(), torch.rand(1)
    np.random.seed(0)
    torch.manual_seed(0)
    # neither global generator is touched
    assert (np.random.rand(), torch.rand(1)) == after
    again = all_of(of(digits, **settings), 5)
    for (a, x), (b, y) in zip(first, again, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    for seed, epoch in ((3, 6), (4, 5)):
        other = all_of(of(digits, **{**settings, "seed": seed}), epoch)
        assert not torch.equal(other[0][0], first[0][0])


def test_mixup_mixes_images_and_labels_alike(digits: Data) -> None:
    plain = all_of(of(digits), 0)
    mixed = all_of(of(digits, mixup=0.8, smoothing=0.1), 0)
    shares = []
    for (x, labels), (y, soft) in zip(plain, mixed, strict=True):
        # x lambda + its mirror in the batch (1 - lambda)
        other = x.flip(0)
        share = float(((y - other) * (x - other)).sum() / ((x - other) ** 2).sum())
        torch.testing.assert_close(y, share * x + (1 - share) * other, rtol=0, atol=1e-4)
        smooth = torch.eye(10)[labels] * 0.9 + 0.01
        torch.testing.assert_close(
            soft, share * smooth + (1 - share) * smooth.flip(0), rtol=0, atol=1e-4
        )
        shares.append(share)
    assert len(set(shares)) == 3 and all(0 <= s <= 1 for s in shares)


def test_labels_of_a_part_of_a_head_are_its_rows(digits: Data) -> None:
    rows = tuple(range(5, 105, 10))
    for (_, a), (_, b) in zip(of(digits)(0), of(digits, head_indices=rows)(0), strict=True):
        assert b.tolist() == [rows[i] for i in a]


def pattern(count: int = 6, height: int = 16, width: int = 24) -> Tensor:
    """Images whose every pixel tells its row, column and image; none is black."""
    out = torch.empty(count, height, width, 3, dtype=torch.uint8)
    out[..., 0] = 10 + torch.arange(height)[:, None]
    out[..., 1] = 100 + torch.arange(width)
    out[..., 2] = 200 + torch.arange(count)[:, None, None]
    return out


def test_a_shift_moves_whole_images_and_brings_in_black() -> None:
    raw = pattern()
    corners = torch.tensor([[0, 0], [0.999, 0.999], [0.5, 0.5], [0.5, 0], [0.1, 0.7], [0.9, 0.3]])
    chance = torch.cat([corners, torch.ones(6, 3) * 0.99], dim=1)
    moved = augment(raw, chance, "shift")
    assert moved.dtype == torch.uint8 and moved.shape == raw.shape
    # up to an eighth: 2 rows and 3 columns either way
    for image, (y, x) in enumerate([(-2, -3), (2, 3), (0, 0), (0, -3), (-2, 1), (2, -1)]):
        there = moved[image]
        inside = there[max(0, -y) : 16 - max(0, y), max(0, -x) : 24 - max(0, x)]
        expected = raw[image, max(0, y) : 16 + min(0, y), max(0, x) : 24 + min(0, x)]
        assert torch.equal(inside, expected)
        assert (there == 0).all(dim=2).sum() == 16 * 24 - inside.shape[0] * inside.shape[1]


def test_a_crop_shows_a_part_and_a_flip_mirrors() -> None:
    raw = pattern()
    chance = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    chance[:, 4] = 0.9
    chance[0, 2], chance[0, 3] = 1.0, 0.5  # all of the area, of its own ratio
    shown = augment(raw, chance, "crop")
    assert torch.equal(shown[0], raw[0])
    for image in range(1, 6):
        own = shown[image].float()
        assert own[..., 2].unique().tolist() == [200 + image]
        rows, columns = own[:, 0, 0], own[0, :, 1]
        assert (rows.diff() >= 0).all() and (columns.diff() >= 0).all()
        covered = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / (16 * 24)
        assert 0.2 < covered < 1
    chance[:, 4] = torch.tensor([0.0, 0.9] * 3)
    for how in ("crop", "shift"):
        plain, mirrored = augment(raw, chance, how), augment(raw, chance, f"{how}-flip")
        assert torch.equal(mirrored[1::2], plain[1::2])
        assert torch.equal(mirrored[::2], plain[::2].flip(2))
    assert torch.equal(augment(raw, chance, "none"), raw)


def test_auto_augments_by_the_images() -> None:
    large = Preprocess((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    assert choose_augmentation("auto", PREPROCESS, "digits") == "none"
    assert choose_augmentation("auto", PREPROCESS, "cifar10") == "shift-flip"
    assert choose_augmentation("auto", large, "/imagenet") == "crop-flip"
    assert choose_augmentation("crop", PREPROCESS, "digits") == "crop"


@pytest.mark.parametrize("settings, details", [
    ({"batch": 0}, {"images": 200, "batch": 0}),
    ({"mixup": -1.0}, {"name": "mixup", "got": -1.0}),
    ({"batch": 33, "mixup": 0.1}, {"name": "batch", "got": 33}),
])  # fmt: skip
def test_impossible_batches_are_refused(digits: Data, settings, details) -> None:
    with refused("out-of-range", UserError, **details):
        AugmentedBatches(digits.split("calibration"), PREPROCESS, 10, **{"batch": 8, **settings})
