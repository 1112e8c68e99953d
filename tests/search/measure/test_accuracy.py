"""Correctness, image by image, is what a plain timm evaluation loop gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from timm.utils import accuracy
from torch import Tensor, nn

from tests.refusals import refused
from tests.search.small import PREPROCESS, image_folder, opened, vit
from vitpareto import methods
from vitpareto.search.data.datasets import Data
from vitpareto.search.data.decoded import Split
from vitpareto.search.measure import macs
from vitpareto.search.measure.accuracy import (
    DTYPES,
    Correctness,
    NonFiniteLogits,
    batches_of,
    evaluate,
)

CLASSES = ("ape", "bee", "cat", "dog", "elk", "fox", "gnu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    place = tmp_path_factory.mktemp("data")
    return opened(image_folder(place / "images", CLASSES, 20), place / "cache")


@pytest.fixture(scope="module")
def search(data: Data) -> Split:
    return data.split("search")


def judged(model: nn.Module, split: Split, **more: Any) -> Correctness:
    given = {"batch": 8, "device": "cpu", "dtype": torch.float32, **more}
    return evaluate(model, split, PREPROCESS, **given)


@pytest.fixture(scope="module")
def plain(data: Data, search: Split) -> tuple[Tensor, Tensor]:
    """Logits and labels of the search images by timm's own transform and nothing of ours."""
    transform = timm.data.create_transform(
        (3, 64, 64), mean=PREPROCESS.mean, std=PREPROCESS.std, interpolation="bicubic", crop_pct=1.0
    )
    listed = data._listed["search"]
    inputs = [transform(listed.load(i)) for i in range(len(listed))]
    with torch.no_grad():
        return vit(7)(torch.stack(inputs)), torch.tensor(search.labels.copy())


@pytest.mark.parametrize("batch", [1, 8, 500])
def test_bits_are_those_of_a_plain_timm_loop(
    search: Split, plain: tuple[Tensor, Tensor], batch: int
) -> None:
    logits, labels = plain
    found = judged(vit(7), search, batch=batch)
    assert found.top1.dtype == found.top5.dtype == bool
    assert len(found.top1) == len(search) == 28
    assert found.top1.tolist() == (logits.argmax(1) == labels).tolist()
    nearest = logits.topk(5, dim=1).indices
    assert found.top5.tolist() == (nearest == labels[:, None]).any(1).tolist()
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    assert 100 * found.top1.mean() == pytest.approx(float(top1), abs=1e-4)
    assert 100 * found.top5.mean() == pytest.approx(float(top5), abs=1e-4)
    assert 0 < found.top1.sum() < found.top5.sum() < 28, (
        "a model that is always right shows nothing"
    )
    assert found.macs is None and found.macs_mean is None


def test_a_pruned_model_is_judged_by_its_own_logits(search: Split) -> None:
    model = methods.prune(vit(7), "topk", keep_rate=0.3, prune_layers=(0,))
    found = judged(model, search)
    (batch, labels), *rest = batches_of(
        search, PREPROCESS, batch=99, device="cpu", dtype=torch.float32
    )
    assert not rest
    with torch.no_grad():
        right = model(batch).argmax(1) == labels
    assert found.top1.tolist() == right.tolist()
    dense = judged(vit(7), search)
    assert (found.top5.tolist(), right.tolist()) != (dense.top5.tolist(), dense.top1.tolist())


def test_head_indices_restrict_the_logits(search: Split) -> None:
    """Seven of twenty classes: only these compete, in the labels' order."""
    model, columns = vit(20), (1, 4, 6, 9, 12, 13, 19)
    found = judged(model, search, head_indices=columns)
    (batch, labels), *_ = batches_of(
        search, PREPROCESS, batch=99, device="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(batch)
    assert found.top1.tolist() == (logits[:, columns].argmax(1) == labels).tolist()
    outside = ~torch.isin(logits.argmax(1), torch.tensor(columns))
    assert outside.any(), "the case must occur"


@pytest.mark.parametrize("cuts", [(0, 10, 28), (0, 1, 27, 28), (0, 8, 16, 28)])
def test_slices_concatenate_to_the_whole(search: Split, cuts: tuple[int, ...]) -> None:
    model = methods.prune(vit(7), "tome", r=4)
    whole = judged(model, search)
    parts = [judged(model, search, start=a, stop=b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert np.concatenate([p.top1 for p in parts]).tolist() == whole.top1.tolist()
    assert np.concatenate([p.top5 for p in parts]).tolist() == whole.top5.tolist()
    assert len(judged(model, search, start=20, stop=99).top1) == 8, "a stop past the end is the end"


def test_a_slice_without_images_is_an_error(search: Split) -> None:
    with refused("empty", name=search.name, got=(28, 28), images=28):
        judged(vit(7), search, start=28)
    with refused("empty", name=search.name, got=(5, 5)):
        judged(vit(7), search, start=5, stop=5)
    with refused("out-of-range", name=search.name, got=(-1, 5)):
        judged(vit(7), search, start=-1, stop=5)


def test_progress_counts_every_image_once(search: Split) -> None:
    heard: list[int] = []
    judged(vit(7), search, start=3, progress=heard.append)
    assert heard == [8, 8, 8, 1]


class Poisoned(nn.Module):
    """The right class, but for one image (by position), whose logits hold `value`."""

    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.at, self.value, self.seen = at, value, 0

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 7)
        for i in range(len(x)):
            if self.seen + i == self.at:
                logits[i, 3] = self.value
        self.seen += len(x)
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("at", "start"), [(0, 0), (13, 0), (2, 5)])
def test_logits_that_are_no_numbers_stop_the_measurement(
    search: Split, value: float, at: int, start: int
) -> None:
    with pytest.raises(NonFiniteLogits) as caught:
        judged(Poisoned(at, value), search, start=start)
    assert caught.value.image == start + at


def test_images_decide_the_cost_of_an_adaptive_recipe(search: Split) -> None:
    model = methods.prune(vit(7), "rajni", gamma=0.5, min_tokens=5, budget="image")
    found = judged(model, search)
    inputs = [
        images
        for images, _ in batches_of(search, PREPROCESS, batch=8, device="cpu", dtype=torch.float32)
    ]
    as_run = sum(len(b) * macs(model, b) for b in inputs) / 28
    alone = sum(macs(model, image[None]) for b in inputs for image in b) / 28
    assert found.macs == pytest.approx(as_run, rel=1e-12)
    assert found.macs_mean == pytest.approx(alone, rel=1e-12)
    assert found.macs is not None and found.macs_mean is not None
    assert found.macs_mean < found.macs < macs(vit(7)) * 1.01
    single = judged(model, search, batch=1)
    assert single.macs == single.macs_mean == pytest.approx(alone, rel=1e-12)
    assert single.top1.tolist() == found.top1.tolist()


def test_with_fewer_than_five_classes_the_top_five_are_all(tmp_path: Path) -> None:
    few = opened(image_folder(tmp_path / "few", CLASSES[:3], 10), tmp_path / "cache")
    found = judged(vit(3), few.split("search"))
    assert found.top5.all() and len(found.top5) == 6
    assert not found.top1.all()


def test_batches_come_normalised_in_the_dtype_asked_for(search: Split) -> None:
    for dtype in DTYPES.values():
        batches = list(
            batches_of(search, PREPROCESS, batch=20, device="cpu", dtype=dtype, start=4, stop=27)
        )
        assert [len(labels) for _, labels in batches] == [20, 3]
        assert all(x.dtype == dtype and x.shape[1:] == (3, 64, 64) for x, _ in batches)
    raw, labels = search.batch(4, 5)
    first, label = next(
        iter(batches_of(search, PREPROCESS, batch=1, device="cpu", dtype=torch.float32, start=4))
    )
    assert label.tolist() == labels.tolist()
    expected = (raw[0].permute(2, 0, 1).double() / 255 - 0.2) / 0.25
    torch.testing.assert_close(first[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_lower_precision_is_judged_in_it(search: Split) -> None:
    model = methods.Recipe().build(vit(7)).to(torch.bfloat16)
    found = judged(model, search, dtype=torch.bfloat16)
    same = found.top1 == judged(vit(7), search).top1
    assert same.mean() > 0.8
