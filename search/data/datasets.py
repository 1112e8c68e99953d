"""Which images, labels and splits a study sees: fixed by the data and a seed, the same everywhere.

Nothing here reads a pixel: `search.data.decoding` does that, once per node, for the splits asked
for.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from vitpareto.search.data.decoding import Preprocess, Progress, Split, decode_split
from vitpareto.search.data.named import (
    NAMES,
    check_imagenette,
    imagenette_folder,
    list_cifar10,
    list_digits,
    list_fashionmnist,
)
from vitpareto.search.data.splits import EVALUATION, Listed, divide, stratified_order
from vitpareto.search.errors import UserError
from vitpareto.search.files.filesystems import download_folder, is_remote

__all__ = ["Data", "Preprocess", "Split", "check_head", "open_data"]

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"))
VALIDATION_FOLDERS = ("val", "validation")
SPLIT_FOLDERS = frozenset((*EVALUATION, *VALIDATION_FOLDERS, "test", "train"))
SAMPLED_FILES = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Images with labels, split for a study. Pickles with its file list, without an image.

    `classes` are the label names, label 0 first. `head_indices` are the logits those labels stand
    for in an ImageNet-1k head, ascending; None where the head has the data's own classes (see
    `check_head`). `sizes` is images listed per split: a decoded split has fewer where some are
    corrupt. `fingerprint` covers classes, preprocessing and the evaluation splits in their order,
    not the folder's place nor any library's version.
    """

    spec: str
    classes: tuple[str, ...]
    head_indices: tuple[int, ...] | None
    fingerprint: str
    sizes: dict[str, int]
    _listed: dict[str, Listed] = field(repr=False, compare=False)
    _preprocess: Preprocess = field(repr=False)
    _cache: Path = field(repr=False, compare=False)
    _workers: int | None = field(repr=False, compare=False)
    _progress: Progress | None = field(repr=False, compare=False)

    def split(self, name: str) -> Split:
        """The decoded split, from the cache where this node has decoded it before.

        Raises `UserError` for a split that is not there, and what `decode_split` raises.
        """
        if name not in self._listed:
            hint = "; put a train/ folder beside val/ to have one" if name == "train" else ""
            raise UserError(
                f"{self.spec} has no split '{name}'{_did_you_mean(name, self._listed)}: "
                f"it has {', '.join(self._listed)}{hint}"
            )
        listed = self._listed[name]
        return decode_split(
            name,
            listed,
            self._preprocess,
            self._cache,
            stamp=listed.stamp(),
            workers=self._workers,
            progress=self._progress,
        )

    def only(self, *names: str) -> Data:
        """The same with these splits alone: a training split's list is long, and travels."""
        return replace(self, _listed={n: v for n, v in self._listed.items() if n in names})

    def at(self, cache: Path | None = None) -> Data:
        """The same on this node, in a cache of its own if one is given: images from object storage
        are fetched where they are not there.
        """
        cache = self._cache if cache is None else cache.expanduser().absolute()
        listed = self._listed
        if is_remote(self.spec):
            before = self._cache / "objects"
            folder = download_folder(self.spec, cache)
            listed = {
                name: replace(files, root=folder / files.root.relative_to(before / folder.name))
                for name, files in listed.items()
                if isinstance(files, _Files)
            }
        return replace(self, _cache=cache, _listed=listed)

    def decoded(self, name: str) -> Path:
        """Where the cache has a decoded split of this name (`Split.folder`)."""
        return self._cache / "decoded" / name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_progress": None}  # a console's callback stays in its process


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
    """List the images that `spec` names and split them; nothing is decoded yet.

    `spec` is "digits" (embedded), "cifar10" or "cifar10:ROOT" (downloaded where it is not there),
    "fashionmnist[:DIR]", "imagenette[:DIR]" (without DIR they are looked for in the cache), or an
    image folder `DIR/CLASS/*.jpg` (s3://… and gs://… are fetched into the cache), or one that
    holds such folders: val/ with train/ beside it, or calibration/, search/ and held-out/. `images`
    keeps that many of the search split, its prefix. `seed` fixes splits and order, save for digits,
    which brings its own. `workers` and `progress` are `decode_split`'s.

    Raises `UserError` for anything that is not so.
    """
    if workers is not None and workers < 0:
        raise UserError(f"workers cannot be negative but got {workers}")
    cache = cache.expanduser().absolute()
    name, _, place = spec.partition(":")
    fetched = is_remote(spec)
    root = Path(place).expanduser().absolute() if place and not fetched else None
    if spec == "digits":
        classes, listed = list_digits()
    elif name == "cifar10":
        classes, listed = list_cifar10(root, cache, seed)
    elif name == "fashionmnist":
        classes, listed = list_fashionmnist(root, cache, seed)
    elif name == "imagenette":
        folder = imagenette_folder(root, cache)
        classes, listed = _list_folder(folder, seed)
        check_imagenette(folder, classes)
    else:
        folder = download_folder(spec, cache) if fetched else _existing_folder(spec)
        classes, listed = _list_folder(folder, seed)
    if images is not None:
        there = len(listed["search"])
        if not 1 <= images <= there:
            raise UserError(f"images must be 1 to {there}, the size of the search split: {images}")
        listed["search"] = listed["search"].first(images)
    head_indices = _imagenet_indices(classes)
    identity = {
        "classes": classes,
        "preprocess": preprocess.describe(),
        "splits": {split: listed[split].stamp() for split in EVALUATION},
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    sizes = {split: len(source) for split, source in listed.items()}
    return Data(
        spec, classes, head_indices, fingerprint, sizes,
        listed, preprocess, cache, workers, progress,
    )  # fmt: skip


def check_head(num_classes: int, data: Data) -> tuple[int, ...] | None:
    """The logits that stand for `data`'s labels, in order; None where all do as they are.

    Raises `UserError` where a head of `num_classes` cannot be judged on these labels.
    """
    if num_classes == len(data.classes):
        return None
    if data.head_indices is not None and num_classes == 1000:
        return data.head_indices
    also = " (or an ImageNet-1k head of 1000)" if data.head_indices is not None else ""
    raise UserError(
        f"the model has {num_classes} classes and {data.spec} has {len(data.classes)}: "
        f"they must be the same{also}"
    )


# --- image folders


@dataclass(frozen=True)
class _Files:
    """Image files below `root`, by their paths relative to it."""

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def load(self, index: int) -> Image.Image:
        with Image.open(self.root / self.paths[index]) as image:
            return image.convert("RGB")

    def first(self, images: int) -> _Files:
        return _Files(self.root, self.paths[:images], self.labels[:images])

    def stamp(self) -> str:
        return self._stamp

    def __getstate__(self) -> dict[str, Any]:
        # not the stamp: another node's files have one of their own
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _stamp(self) -> str:
        """Paths, sizes and labels in order, and the content of a few files.

        The content is for formats whose files all have one size: there, other images under the
        same names would otherwise pass for the old ones.
        """
        digest = hashlib.sha256()
        step = max(1, len(self.paths) // SAMPLED_FILES)
        for i, (path, label) in enumerate(zip(self.paths, self.labels, strict=True)):
            try:
                size = os.stat(self.root / path).st_size
                content = (self.root / path).read_bytes() if i % step == 0 else b""
            except OSError:  # reported when it is decoded
                size, content = -1, b""
            digest.update(f"{path}\t{size}\t{label}\n".encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(content).digest() if content else b"")
        return digest.hexdigest()


def _existing_folder(spec: str) -> Path:
    folder = Path(spec).expanduser().absolute()  # Ray's workers run in folders of their own
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{spec} is a file: data is a folder DIR/CLASS/*.jpg")
    if spec == Path(spec).name:  # no separator in it: as likely a name as a path
        raise UserError(
            f"unknown data '{spec}'{_did_you_mean(spec, NAMES)}: accepted are {', '.join(NAMES)} "
            "(all but digits also with :DIR) and a folder DIR/CLASS/*.jpg"
        )
    raise UserError(f"no such folder: {spec}")


def _list_folder(root: Path, seed: int) -> tuple[tuple[str, ...], dict[str, Listed]]:
    folders, train = _layout(root)
    trees = {name: _class_tree(folder) for name, folder in folders.items()}
    names = set().union(*trees.values())
    train_tree = _class_tree(train) if train is not None else {}
    if _imagenet_indices(tuple(names)) is None:
        names |= set(train_tree)  # a head trained there has them all, in their order
    classes = tuple(sorted(names))
    trees["train"] = {name: paths for name, paths in train_tree.items() if name in names}
    empty = [c for c in classes if not any(tree.get(c) for tree in trees.values())]
    if len(empty) == len(classes):
        raise UserError(f"no images in {root} (looked for {', '.join(sorted(EXTENSIONS))})")
    if empty:
        raise UserError(f"the class folder '{empty[0]}' in {root} holds no image: remove it")
    if len(classes) == 1:
        raise UserError(f"{root} has one class only, '{classes[0]}': accuracy needs two or more")
    natural = sorted(classes, key=natural_key)
    if natural != list(classes):
        logger.warning(
            "the class folders of %s are labelled in the order of their names (%s, ...), as "
            "torchvision does; a model trained with timm's reader has them in the order %s, ...",
            root, ", ".join(classes[:3]), ", ".join(natural[:3]),
        )  # fmt: skip
    listed: dict[str, Listed] = {}
    if trees["train"]:
        assert train is not None
        listed["train"] = _ordered(train, trees["train"], classes, seed)
    if "" in folders:
        paths, labels = _flatten(trees[""], classes)
        for name, members in divide(paths, labels, seed).items():
            own = tuple(paths[i] for i in members)
            listed[name] = _Files(folders[""], own, labels[members])
    for name in EVALUATION:
        if name in folders:
            listed[name] = _ordered(folders[name], trees[name], classes, seed)
            if not len(listed[name]):
                raise UserError(f"no images in {folders[name]}")
    return classes, listed


def _layout(root: Path) -> tuple[dict[str, Path], Path | None]:
    """The split folders a user named, or {"": the one to divide}; and the train folder if any."""
    names = _subfolders(root)
    named = {name: root / name for name in EVALUATION if name in names}
    train = root / "train" if "train" in names else None
    only_splits = bool(names) and set(names) <= SPLIT_FOLDERS
    if len(named) == len(EVALUATION):
        places = [folder.resolve() for folder in (*named.values(), *([train] if train else []))]
        if len(set(places)) < len(places):
            raise UserError(f"two split folders of {root} are one and the same: {places[0]}")
        return named, train
    if named and only_splits:
        missing = ", ".join(f"{name}/" for name in EVALUATION if name not in named)
        raise UserError(f"{root} names split folders but has no {missing}")
    for name in VALIDATION_FOLDERS:
        if name in names and _subfolders(root / name):
            return {"": root / name}, train
    if "test" in names and only_splits:
        return {"": root / "test"}, train
    if names == ["train"]:
        raise UserError(f"{root} holds only train/: add val/, or give {root / 'train'} to split it")
    beside = root.parent / "train"
    if root.name in (*VALIDATION_FOLDERS, "test") and beside.is_dir():
        return {"": root}, beside
    return {"": root}, None


def _subfolders(folder: Path) -> list[str]:
    """Names, sorted; hidden folders and `__MACOSX` and its like are none of a user's classes."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__"))]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    return sorted(names)


def _class_tree(folder: Path) -> dict[str, list[str]]:
    """Class -> paths of its images relative to `folder`, sorted, at any depth."""
    classes = _subfolders(folder)
    if not classes:
        if any(folder.iterdir()):
            raise UserError(f"{folder} has no class folders: images belong in {folder}/CLASS/")
        raise UserError(f"{folder} is empty")
    return {name: _images_below(folder, name) for name in classes}


def _images_below(folder: Path, name: str) -> list[str]:
    def stop(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found = []
    for place, _, files in os.walk(folder / name, onerror=stop, followlinks=True):
        below = Path(place).relative_to(folder).as_posix()
        found += [
            f"{below}/{file}"
            for file in files
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")
        ]
    return sorted(found)


def _flatten(tree: dict[str, list[str]], classes: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    paths = [path for name in classes for path in tree.get(name, [])]
    counts = [len(tree.get(name, [])) for name in classes]
    return paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts)


def _ordered(
    folder: Path, tree: dict[str, list[str]], classes: tuple[str, ...], seed: int
) -> _Files:
    paths, labels = _flatten(tree, classes)
    order = stratified_order(paths, labels, seed)
    return _Files(folder, tuple(paths[i] for i in order), labels[order])


@lru_cache(maxsize=1)
def _imagenet_position() -> dict[str, int]:
    return {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _imagenet_indices(classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Where the classes lie among ImageNet-1k's 1,000; None unless all of them do."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return None
    position = _imagenet_position()
    if not all(name in position for name in classes):
        return None
    return tuple(position[name] for name in classes)


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
