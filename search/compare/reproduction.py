"""Published accuracies of untrained methods, measured again on all evaluation images.

Models and images are loaded and evaluated as in a study. All splits are evaluated, because nothing
is chosen. A row that cannot be measured has a reason instead of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, Recipe, recipe_of
from vitpareto.search.compare.published import PublishedRow, recompute
from vitpareto.search.data.datasets import Data, check_head, open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.data.splits import EVALUATION
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import DTYPES, NonFiniteLogits, batches_of, evaluate
from vitpareto.search.measure.closed_form import schedule_macs
from vitpareto.search.models.loading import fresh_model, load_model, num_classes
from vitpareto.search.stats.intervals import wilson_interval

NO_DATA = "no data"
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class ReproducedAccuracy:
    """Top-1 in percent with its 95 % interval, and the dense model's.

    `gmacs` is the mean per image; `unreadable` counts images that could not be decoded.
    """

    top1: float
    top1_low: float
    top1_high: float
    dense_top1: float
    gmacs: float
    images: int
    unreadable: int


@dataclass(frozen=True)
class ReproducedRow:
    """A published row beside our measurement.

    `gflops` is recomputed in the source's convention (`published.recompute`). `accuracy` is None if
    it was not measured; `why` is the reason.
    """

    row: PublishedRow
    gflops: float | None
    accuracy: ReproducedAccuracy | None
    why: str = ""


@dataclass(frozen=True)
class EvaluationSetup:
    """Images, weights and device with which rows are measured.

    Attributes:
        weights: folder of TIMM_TAG.safetensors (or .pth) files, used instead of timm's downloads.
        decode: called with (images decoded, images in total).
        seen: called with (what is measured, images seen, images in total).
    """

    data: str
    cache: Path
    weights: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 64
    decode: Callable[[int, int], None] | None = None
    seen: Callable[[str, int, int], None] | None = None


def select(rows: Sequence[PublishedRow], models: Sequence[str] = ()) -> tuple[PublishedRow, ...]:
    """Rows of these models; all if none is named. Raises BadInput for a model without rows."""
    known = {row.model for row in rows}
    for name in models:
        if name not in known:
            raise BadInput.unknown(
                f"no figure is published for model {name!r}",
                name,
                known,
                name=name,
            )
    return tuple(row for row in rows if not models or row.model in models)


def is_measurable(row: PublishedRow) -> bool:
    """Whether the row has an accuracy that needs only public weights and the setting."""
    return not row.trained and row.top1 is not None and row.recipe is not None


def _unmeasurable(row: PublishedRow) -> str:
    if row.trained:
        return "fine-tuned by its source"
    return "no top-1 is published" if row.top1 is None else row.why


def reproduce(
    rows: Sequence[PublishedRow], setup: EvaluationSetup | None
) -> Iterator[ReproducedRow]:
    """Yield every row as soon as it is measured, grouped by model and preprocessing.

    Args:
        rows: published results.
        setup: None skips measurement.

    Raises:
        UserError: the data do not match the models (missing folder, other classes). Raised before
            anything is downloaded or decoded.
    """
    groups: dict[tuple[str, float | None], list[PublishedRow]] = {}
    for row in rows:
        if not is_measurable(row):
            yield ReproducedRow(row, recompute(row), None, _unmeasurable(row))
        elif setup is None:
            yield ReproducedRow(row, recompute(row), None, NO_DATA)
        else:
            groups.setdefault((row.timm_tag or row.model, row.crop_pct), []).append(row)
    if setup is None:
        return
    if setup.weights is not None and not setup.weights.is_dir():
        raise UserError(
            f"weights folder {setup.weights} does not exist",
            Code.NOT_FOUND,
            path=str(setup.weights),
        )
    opened = {key: _open(*key, setup) for key in groups}
    for key, (preprocess, data, head) in opened.items():
        tag, group = key[0], groups[key]
        try:
            model = load_model(tag, _weights_file(setup.weights, tag))
        except UserError as error:
            # the reason without its advice, which names another option
            why = str(error.details.get("reason", error))
            yield from (ReproducedRow(row, recompute(row), None, why) for row in group)
            continue
        model = model.to(setup.device, DTYPES[setup.dtype])
        evaluator = _RowEvaluator(setup, model, preprocess, data, head)
        for row in group:
            try:
                yield ReproducedRow(row, recompute(row), evaluator.measure(row))
            except NonFiniteLogits as error:
                yield ReproducedRow(row, recompute(row), None, str(error))


def _open(
    tag: str, crop_pct: float | None, setup: EvaluationSetup
) -> tuple[Preprocess, Data, tuple[int, ...] | None]:
    """The source's preprocessing, the images, and the logits that stand for their labels."""
    with torch.device("meta"):
        skeleton = fresh_model(tag)
    preprocess = Preprocess.of(skeleton)
    if crop_pct is not None:
        preprocess = replace(preprocess, crop_pct=crop_pct)
    data = open_data(setup.data, preprocess, cache=setup.cache, progress=setup.decode)
    return preprocess, data, check_head(num_classes(skeleton), data)


def _weights_file(folder: Path | None, tag: str) -> Path | None:
    """The file of these weights; None for timm's own. Raises UserError if the folder has none."""
    if folder is None:
        return None
    for suffix in WEIGHT_FILES:
        if (folder / f"{tag}{suffix}").is_file():
            return folder / f"{tag}{suffix}"
    raise UserError(
        f"{tag}.safetensors (or .pth) does not exist in {folder}",
        Code.NOT_FOUND,
        name=tag,
        path=str(folder),
    )


class _RowEvaluator:
    """One dense model and all its images; the dense model is measured once."""

    def __init__(
        self,
        setup: EvaluationSetup,
        dense: nn.Module,
        preprocess: Preprocess,
        data: Data,
        head: tuple[int, ...] | None,
    ) -> None:
        self.setup, self.dense, self.preprocess, self.head = setup, dense, preprocess, head
        self.splits = [data.split(name) for name in EVALUATION]
        self.images = sum(len(split) for split in self.splits)
        self.unreadable = sum(len(split.corrupt) for split in self.splits)
        self.dense_right: np.ndarray | None = None

    def measure(self, row: PublishedRow) -> ReproducedAccuracy:
        """Measure one row. A method that calibrates uses part of the images, without labels."""
        assert row.recipe is not None, "the row must be measurable"
        if self.dense_right is None:
            self.dense_right = self._right(self.dense, f"{row.timm_tag}, dense")[0]
        batches = batches_of(
            self.splits[EVALUATION.index("calibration")],
            self.preprocess,
            batch=self.setup.batch,
            device=self.setup.device,
            dtype=DTYPES[self.setup.dtype],
        )
        model = row.recipe.build(self.dense, calibration=(images for images, _ in batches))
        if row.recipe == Recipe():
            right, macs_mean = self.dense_right, None
        else:
            right, macs_mean = self._right(model, row.label)
        recipe = recipe_of(model)
        shape = methods.model_shape(model)
        counts: tuple[int, ...] | None = shape.dense_counts()
        if recipe.tokens is not None:
            counts = recipe.tokens.declared.counts(recipe.tokens.params, shape)
        macs = macs_mean if counts is None else schedule_macs(recipe, shape, counts)
        assert macs is not None, "an input-adaptive model's evaluation gives its cost"
        low, high = wilson_interval(int(right.sum()), len(right))
        return ReproducedAccuracy(
            top1=100 * float(right.mean()),
            top1_low=low,
            top1_high=high,
            dense_top1=100 * float(self.dense_right.mean()),
            gmacs=macs / 1e9,
            images=len(right),
            unreadable=self.unreadable,
        )

    def _right(self, model: nn.Module, what: str) -> tuple[np.ndarray, float | None]:
        """Whether the top class of each image is right, bool [M], and the mean MACs per image, None
        unless images decide them.
        """
        right: list[np.ndarray] = []
        macs: list[float] = []
        done = 0

        def progress(images: int) -> None:
            nonlocal done
            done += images
            if self.setup.seen is not None:
                self.setup.seen(what, done, self.images)

        for split in self.splits:
            found = evaluate(
                model,
                split,
                self.preprocess,
                batch=self.setup.batch,
                device=self.setup.device,
                dtype=DTYPES[self.setup.dtype],
                head_indices=self.head,
                progress=progress,
            )
            right.append(found.top1)
            if found.macs_mean is not None:
                macs.append(found.macs_mean * len(found.top1))
        return np.concatenate(right), sum(macs) / self.images if macs else None
