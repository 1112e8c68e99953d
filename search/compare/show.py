"""Token traces of a recipe on image files, or on the first images of a data set's search split.

Models run on the CPU in float32. `search.compare.token_trace` records the traces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Code, Recipe, Untrained
from vitpareto.search.compare.token_trace import TokenTrace, trace_tokens
from vitpareto.search.data.datasets import Data, check_head, open_data
from vitpareto.search.data.decode_chunks import IMAGE_ERRORS
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import fingerprint, load_model, num_classes
from vitpareto.search.study.folder import StudyFolder

#: number of images traced if no file is given, and the largest number of images
IMAGES, MOST = 4, 64
CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class TraceRequest:
    """A recipe on a model, to be traced.

    Attributes:
        data: data set for class names, calibration and, if no file is given, images. The embedded
            data set if None and one is needed.
        fingerprint: required fingerprint of the model, if a study measured it.
        trained: the weights that the recipe names.
    """

    recipe: Recipe
    model: str = embedded_model.NAME
    weights: Path | None = None
    data: str | None = None
    seed: int = 0
    fingerprint: str | None = None
    trained: Mapping[str, Tensor] | None = None

    @classmethod
    def of_trial(cls, folder: StudyFolder, number: int) -> TraceRequest:
        """A trial of a study. Raises UserError if it does not exist or was not measured."""
        results = folder.trials.all()
        result = next((r for r in results if r.trial == number), None)
        if result is None:
            span = f"{results[0].trial} to {results[-1].trial}" if results else "none yet"
            raise UserError(
                f"trial {number} does not exist in study {folder.name} (its trials: {span})",
                Code.NOT_FOUND,
                study=folder.name,
                trial=number,
            )
        if result.state not in ("finished", "raced_out"):
            raise UserError(
                f"trial {number} of study {folder.name} must be measured "
                f"(got {result.state}: {result.reason})",
                Code.UNSUPPORTED,
                trial=number,
                state=result.state,
            )
        job = folder.job().config(store=folder.store)
        recipe = result.rebuilt_from.to_recipe()
        known = str(folder.identity.read()["model_fingerprint"])
        trained = None if recipe.weights is None else folder.artifacts.load(recipe.weights)
        return cls(recipe, job.model, folder.weights, job.data, job.seed, known, trained)


def trace_images(
    asked: TraceRequest,
    files: Sequence[Path] = (),
    *,
    images: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> TokenTrace:
    """Trace the files, or the first `images` (default 4) of the data's search split.

    A recipe that needs calibration is calibrated on the data's calibration split, or on the files
    if no data is named; a note says so.

    Raises:
        UserError: an image cannot be read, or a study's model has changed.
        BadInput: the recipe does not fit the model.
    """
    if files and images is not None:
        raise UserError(
            "--images must not be given with image files: it counts images of the data",
            Code.CONFLICT,
            name="images",
        )
    if len(files) > MOST or (images is not None and not 1 <= images <= MOST):
        raise UserError(
            f"the number of images must be between 1 and {MOST} (got {len(files) or images})",
            Code.OUT_OF_RANGE,
            name="images",
            got=len(files) or images,
        )
    for file in files:
        _check_there(file)
    dense = load_model(asked.model, asked.weights)
    if asked.fingerprint is not None and (now := fingerprint(dense)) != asked.fingerprint:
        raise UserError(
            f"{asked.model} must have the study's fingerprint {asked.fingerprint} (got {now}); "
            "another timm version may be installed",
            Code.MISMATCH,
            key="model_fingerprint",
            got=now,
            expected=asked.fingerprint,
        )
    shape, _ = asked.recipe.reshape(methods.model_shape(dense), dense, asked.trained)
    recipe = asked.recipe.checked(shape)
    preprocess = Preprocess.of(dense)
    # the embedded data set has class names for the embedded model only
    known = asked.data is not None or asked.model == embedded_model.NAME
    spec = asked.data or (embedded_model.NAME if known or not files else None)
    data = None
    if spec is not None:
        data = open_data(spec, preprocess, cache=cache, seed=asked.seed, progress=progress)
    classes, head = _classes(dense, asked, data if known else None)
    names = [str(Path(*file.parts[-2:])) for file in files]
    truths: list[str | None] = [None] * len(files)
    if files:
        pictures = [read_image(file) for file in files]
        transform = preprocess.transform()
        raw = torch.stack([transform(p).permute(1, 2, 0) for p in pictures])
    else:
        assert data is not None and spec is not None
        count = min(IMAGES if images is None else images, data.sizes["search"])
        # decodes only the first images of the split
        few = open_data(
            spec, preprocess, cache=cache, seed=asked.seed, images=count, progress=progress
        ).split("search")
        raw, labels = few.batch(0, len(few))
        place = Path(spec.partition(":")[0]).name
        names = [f"{place} search {i}" for i in range(len(few))]
        truths = [classes[i] if known and classes else None for i in labels.tolist()]
    shown = preprocess.normalise(raw)
    notes: list[str] = []
    pruned = _build(recipe, dense, data, preprocess, shown, notes, asked.trained)
    return trace_tokens(
        dense,
        pruned,
        shown,
        model=asked.model,
        names=names,
        truths=truths,
        classes=classes,
        head_indices=head,
        notes=notes,
    )


def _check_there(file: Path) -> None:
    if not file.is_file():
        folder = file.is_dir()
        raise UserError(
            f"image {file} {'must be a file (got a folder)' if folder else 'does not exist'}",
            Code.WRONG_TYPE if folder else Code.NOT_FOUND,
            path=str(file),
        )


def read_image(file: Path) -> Image.Image:
    """An image as RGB. Raises UserError if the file does not exist or is not an image."""
    _check_there(file)
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except IMAGE_ERRORS as error:
        raise UserError(
            f"image {file} cannot be read: {type(error).__name__}: {error}",
            Code.UNREADABLE,
            path=str(file),
        ) from error


def _build(
    recipe: Recipe,
    dense: nn.Module,
    data: Data | None,
    preprocess: Preprocess,
    shown: Tensor,
    notes: list[str],
    trained: Mapping[str, Tensor] | None,
) -> nn.Module:
    """The pruned model. Appends to `notes` what it was calibrated on and its untrained parts."""
    calibration: Iterator[Tensor] | None = None
    step = recipe.tokens
    if step is not None and step.declared.needs_calibration(step.params):
        if data is None:
            calibration = iter(shown.split(CALIBRATION_BATCH))
            notes.append(
                f"{step.method} is calibrated on the images shown ({len(shown)}): name --data, or "
                "give the recipe the counts= of an earlier calibration"
            )
        else:
            split = data.split("calibration")
            batches = batches_of(
                split,
                preprocess,
                batch=CALIBRATION_BATCH,
                device="cpu",
                dtype=torch.float32,
            )
            calibration = (images for images, _ in batches)
            notes.append(
                f"{step.method} is calibrated on the {len(split)} calibration images of {data.spec}"
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Untrained)
        built = recipe.build(dense, calibration=calibration, weights=trained).eval()
    for warning in caught:
        if issubclass(warning.category, Untrained):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return built


def _classes(
    dense: nn.Module, asked: TraceRequest, data: Data | None
) -> tuple[Sequence[str] | None, tuple[int, ...] | None]:
    """Class names and the logits that stand for them; None if unknown."""
    outputs = num_classes(dense)
    if data is not None:
        head = check_head(outputs, data)
        if data.head_indices is not None:
            return _imagenet_names(data.head_indices), head
        return data.classes, head
    # 1,000 outputs of a user's own weights need not be ImageNet's classes
    own = asked.weights is not None or asked.model.startswith("local-dir:")
    return (_imagenet_names(range(outputs)) if outputs == 1000 and not own else None), None


def _imagenet_names(indices: Sequence[int]) -> list[str]:
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(i).split(",")[0] for i in indices]
