"""The images, labels and splits of a study: decided by the data and a seed, the same everywhere.

Nothing here reads pixels: `search.data.decoding` does, once per node, for the splits that are used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitpareto.search.data.decoded import Split
from vitpareto.search.data.decoding import DecodeRequest, Progress, decode_split
from vitpareto.search.data.folders import ImageFiles, list_folder
from vitpareto.search.data.imagenet import IMAGENET_CLASSES, imagenet_indices
from vitpareto.search.data.named import NAMES, list_named
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.data.splits import EVALUATION, ListedSplit
from vitpareto.search.errors import Code, UserError, closest, nearest
from vitpareto.search.files.filesystems import download_folder, is_remote


@dataclass(frozen=True)
class Data:
    """Images with labels, divided into splits. It pickles with the list of files, without images.

    Attributes:
        spec: what was opened.
        classes: label names, label 0 first.
        head_indices: the logits of an ImageNet-1k head that stand for the labels, ascending; None
            if the head must have the data's own classes (`check_head`).
        fingerprint: covers classes, preprocessing and the evaluation splits in their order; not the
            folder's path nor any library's version.
        sizes: listed images per split. A decoded split has fewer if some are corrupt.
    """

    spec: str
    classes: tuple[str, ...]
    head_indices: tuple[int, ...] | None
    fingerprint: str
    sizes: dict[str, int]
    _listed: dict[str, ListedSplit] = field(repr=False, compare=False)
    _preprocess: Preprocess = field(repr=False)
    _cache: Path = field(repr=False, compare=False)
    _workers: int | None = field(repr=False, compare=False)
    _progress: Progress | None = field(repr=False, compare=False)

    def split(self, name: str) -> Split:
        """The decoded split, from the cache if this node has decoded it before.

        Raises UserError for a split that does not exist, and what `decode_split` raises.
        """
        if name not in self._listed:
            hint = "; to have one, add a train/ folder beside val/" if name == "train" else ""
            raise UserError(
                f"{self.spec} has no split {name!r}{nearest(name, self._listed)}{hint}",
                Code.UNKNOWN_NAME,
                name=name,
                accepted=tuple(self._listed),
                closest=closest(name, self._listed),
            )
        listed = self._listed[name]
        request = DecodeRequest(
            name, listed, listed.stamp(), self._preprocess, self._workers, self._progress
        )
        return decode_split(request, self._cache)

    def only(self, *names: str) -> Data:
        """A copy with these splits only: the list of a training split is large to send."""
        return replace(self, _listed={n: v for n, v in self._listed.items() if n in names})

    def at(self, cache: Path | None = None) -> Data:
        """A copy for this node, with another cache if one is given. Images from object storage are
        downloaded if they are missing.
        """
        cache = self._cache if cache is None else cache.expanduser().absolute()
        listed = self._listed
        if is_remote(self.spec):
            before = self._cache / "objects"
            folder = download_folder(self.spec, cache)
            listed = {
                name: replace(files, root=folder / files.root.relative_to(before / folder.name))
                for name, files in listed.items()
                if isinstance(files, ImageFiles)
            }
        return replace(self, _cache=cache, _listed=listed)

    def decoded(self, name: str) -> Path:
        """The cache folder of a decoded split, from its name (`Split.folder.name`)."""
        return self._cache / "decoded" / name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_progress": None}  # a callback stays in its process


def open_data(
    spec: str,
    preprocess: Preprocess,
    *,
    cache: Path,
    seed: int = 0,
    images: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Data:
    """List the images of `spec` and split them. Nothing is decoded yet.

    Args:
        spec: "digits" (embedded), "cifar10[:ROOT]", "fashionmnist[:DIR]", "imagenette[:DIR]"; an
            image folder DIR/CLASS/*.jpg, also s3://… and gs://…; or a folder that holds such
            folders: val/ with train/ beside it, or calibration/, search/ and held-out/.
        preprocess: how images are resized, cropped and normalised for the model.
        cache: folder for decoded and downloaded images.
        seed: of splits and order; digits has fixed ones.
        images: number of images of the search split to use, from its start; all if None.
        workers: number of decoding processes (`decode_chunks.decode_chunks`).
        progress: called with (images decoded, images in all).

    Raises:
        UserError: the data does not exist, cannot be read or cannot be split.
    """
    if workers is not None and workers < 0:
        raise UserError(
            f"workers must be at least 0 (got {workers})",
            Code.OUT_OF_RANGE,
            name="workers",
            got=workers,
        )
    cache = cache.expanduser().absolute()
    found = list_named(spec, cache, seed)
    if found is None:
        folder = download_folder(spec, cache) if is_remote(spec) else _existing_folder(spec)
        found = list_folder(folder, seed)
    classes, listed = found
    if images is not None:
        listed["search"] = _first_images(listed["search"], images)
    sizes = {split: len(source) for split, source in listed.items()}
    return Data(
        spec, classes, imagenet_indices(classes), _fingerprint(classes, preprocess, listed), sizes,
        listed, preprocess, cache, workers, progress,
    )  # fmt: skip


def _first_images(search: ListedSplit, images: int) -> ListedSplit:
    """The first images of the search split. Raises UserError if it does not have as many."""
    most = len(search)
    if not 1 <= images <= most:
        raise UserError(
            f"images must be 1 to {most}, the size of the search split (got {images})",
            Code.OUT_OF_RANGE,
            name="images",
            got=images,
            most=most,
        )
    return search.first(images)


def check_head(num_classes: int, data: Data) -> tuple[int, ...] | None:
    """The logits that stand for `data`'s labels, in order; None if all logits do, in order.

    Raises UserError if a head of `num_classes` cannot be evaluated on these labels.
    """
    if num_classes == len(data.classes):
        return None
    if data.head_indices is not None and num_classes == IMAGENET_CLASSES:
        return data.head_indices
    accepted: tuple[int, ...] = (len(data.classes),)
    if data.head_indices is not None:
        accepted += (IMAGENET_CLASSES,)
    raise UserError(
        f"the model must have {' or '.join(map(str, accepted))} classes for {data.spec} (got "
        f"{num_classes})",
        Code.MISMATCH,
        got=num_classes,
        accepted=accepted,
    )


def _fingerprint(
    classes: tuple[str, ...], preprocess: Preprocess, listed: dict[str, ListedSplit]
) -> str:
    identity = {
        "classes": classes,
        "preprocess": preprocess.describe(),
        "splits": {split: listed[split].stamp() for split in EVALUATION},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _existing_folder(spec: str) -> Path:
    folder = Path(spec).expanduser().absolute()  # Ray's workers have other working directories
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(
            f"data must be a folder DIR/CLASS/*.jpg (got the file {spec})",
            Code.WRONG_TYPE,
            path=spec,
        )
    if spec == Path(spec).name:  # without a separator it may be a misspelt name
        match = closest(spec.lower().replace("_", "-"), NAMES)
        hint = "" if match is None else f" (did you mean {match!r}?)"
        raise UserError(
            f"unknown data {spec!r}{hint}: must be one of {', '.join(NAMES)} (all except digits "
            "also as NAME:DIR), or a folder DIR/CLASS/*.jpg",
            Code.UNKNOWN_NAME,
            name=spec,
            accepted=NAMES,
            closest=match,
        )
    raise UserError(f"folder {spec} does not exist", Code.NOT_FOUND, path=spec)
