"""Token traces of a recipe on image files, or on the first images of a data set's search split.

Models run on the CPU in float32. `search.compare.token_trace` records the traces.
"""

from __future__ import annotations

import functools
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
from vitpareto.search.compare.trace_request import TraceRequest
from vitpareto.search.data.datasets import Data, check_head, open_data
from vitpareto.search.data.decode_chunks import IMAGE_ERRORS
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import fingerprint, load_model, num_classes

#: number of images traced if no file is given, and the largest number of images
IMAGES, MOST = 4, 64
CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class ShownImages:
    """The images to trace.

    Attributes:
        pixels: normalised, [B, 3, H, W].
        names: [B].
        truths: [B], the class of each image; None if unknown.
    """

    pixels: Tensor
    names: Sequence[str]
    truths: Sequence[str | None]


@dataclass(frozen=True)
class ShownClasses:
    """The classes of the logits.

    Attributes:
        names: None if unknown.
        head_indices: the logits that stand for `names`; None for all.
    """

    names: Sequence[str] | None = None
    head_indices: tuple[int, ...] | None = None


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
    _check_count(files, images)
    for file in files:
        _check_exists(file)
    dense = _dense_model(asked)
    shape, _ = asked.recipe.reshape(methods.model_shape(dense), dense, asked.trained)
    recipe = asked.recipe.checked(shape)
    preprocess = Preprocess.of(dense)
    # the embedded data set has class names for the embedded model only
    known = asked.data is not None or asked.model == embedded_model.NAME
    spec = asked.data or (embedded_model.NAME if known or not files else None)
    data = None
    if spec is not None:
        opened = functools.partial(
            open_data, spec, preprocess, cache=cache, seed=asked.seed, progress=progress
        )
        data = opened()
    classes = _classes(dense, asked, data if known else None)
    if files:
        shown = _images_of_files(files, preprocess)
    else:
        assert data is not None and spec is not None
        count = min(IMAGES if images is None else images, data.sizes["search"])
        first = opened(images=count).split("search")  # decodes only these images
        name = Path(spec.partition(":")[0]).name
        shown = _images_of_data(first, name, preprocess, classes.names if known else None)
    pruned, notes = _build(recipe, dense, data, preprocess, shown.pixels, asked.trained)
    return trace_tokens(
        dense,
        pruned,
        shown.pixels,
        model=asked.model,
        names=shown.names,
        truths=shown.truths,
        classes=classes.names,
        head_indices=classes.head_indices,
        notes=notes,
    )


def _check_count(files: Sequence[Path], images: int | None) -> None:
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


def _dense_model(asked: TraceRequest) -> nn.Module:
    """The dense model. Raises UserError if it is not the one that a study measured."""
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
    return dense


def _images_of_files(files: Sequence[Path], preprocess: Preprocess) -> ShownImages:
    transform = preprocess.transform()
    raw = torch.stack([transform(read_image(file)).permute(1, 2, 0) for file in files])
    names = [str(Path(*file.parts[-2:])) for file in files]
    return ShownImages(preprocess.normalise(raw), names, [None] * len(files))


def _images_of_data(
    split: Split, name: str, preprocess: Preprocess, classes: Sequence[str] | None
) -> ShownImages:
    """All images of a split; `name` is that of the data."""
    raw, labels = split.batch(0, len(split))
    truths = [classes[i] if classes else None for i in labels.tolist()]
    names = [f"{name} search {i}" for i in range(len(split))]
    return ShownImages(preprocess.normalise(raw), names, truths)


def _check_exists(file: Path) -> None:
    if not file.is_file():
        folder = file.is_dir()
        raise UserError(
            f"image {file} {'must be a file (got a folder)' if folder else 'does not exist'}",
            Code.WRONG_TYPE if folder else Code.NOT_FOUND,
            path=str(file),
        )


def read_image(file: Path) -> Image.Image:
    """An image as RGB. Raises UserError if the file does not exist or is not an image."""
    _check_exists(file)
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
    trained: Mapping[str, Tensor] | None,
) -> tuple[nn.Module, list[str]]:
    """The pruned model, and notes on what it was calibrated on and on its untrained parts."""
    calibration: Iterator[Tensor] | None = None
    notes: list[str] = []
    step = recipe.tokens
    if step is not None and step.declared.needs_calibration(step.params):
        calibration, note = _calibration(data, preprocess, shown)
        notes.append(f"{step.method} is calibrated on {note}")
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
    return built, notes


def _calibration(
    data: Data | None, preprocess: Preprocess, shown: Tensor
) -> tuple[Iterator[Tensor], str]:
    """Batches of the data's calibration split, or of the shown images; and which they are."""
    if data is None:
        return iter(shown.split(CALIBRATION_BATCH)), (
            f"the images shown ({len(shown)}): name --data, or give the recipe the counts= of an "
            "earlier calibration"
        )
    split = data.split("calibration")
    batches = batches_of(
        split, preprocess, batch=CALIBRATION_BATCH, device="cpu", dtype=torch.float32
    )
    return (images for images, _ in batches), f"the {len(split)} calibration images of {data.spec}"


def _classes(dense: nn.Module, asked: TraceRequest, data: Data | None) -> ShownClasses:
    """The classes of the data, or ImageNet-1k's for weights of timm with 1,000 outputs."""
    outputs = num_classes(dense)
    if data is not None:
        head = check_head(outputs, data)
        if data.head_indices is not None:
            return ShownClasses(_imagenet_names(data.head_indices), head)
        return ShownClasses(data.classes, head)
    # 1,000 outputs of a user's own weights need not be ImageNet's classes
    own = asked.weights is not None or asked.model.startswith("local-dir:")
    return ShownClasses(_imagenet_names(range(outputs)) if outputs == 1000 and not own else None)


def _imagenet_names(indices: Sequence[int]) -> list[str]:
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(i).split(",")[0] for i in indices]
