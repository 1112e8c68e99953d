"""Image folders DIR/CLASS/*.jpg: classes, splits and files. No image is read."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from vitpareto.search.data.imagenet import imagenet_indices
from vitpareto.search.data.splits import EVALUATION, ListedSplit, divide, stratified_order
from vitpareto.search.errors import Code, UserError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"))
VALIDATION_FOLDERS = ("val", "validation")
SPLIT_FOLDERS = frozenset((*EVALUATION, *VALIDATION_FOLDERS, "test", "train"))
#: files whose content is part of a split's stamp
SAMPLED_FILES = 32

logger = logging.getLogger(__name__)

#: class -> paths of its images relative to the folder, sorted
ClassTree = dict[str, list[str]]


@dataclass(frozen=True)
class ImageFiles:
    """A split of image files (`splits.ListedSplit`): paths relative to `root`, int64 labels."""

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

    def first(self, images: int) -> ImageFiles:
        return ImageFiles(self.root, self.paths[:images], self.labels[:images])

    def stamp(self) -> str:
        return self._stamp

    def __getstate__(self) -> dict[str, Any]:
        # without the stamp: another node computes its own files'
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _stamp(self) -> str:
        """Hash of paths, sizes and labels in order, and of the content of a few files.

        The content tells apart files of formats in which all images have one size: other images
        under the same names would otherwise have the same stamp.
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


def list_folder(root: Path, seed: int) -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
    """Classes and splits of an image folder, or of a folder that holds split folders.

    Raises UserError if the folder has no images, a class without images, or a single class.
    """
    folders, train = _split_folders(root)
    trees = {name: _class_tree(folder) for name, folder in folders.items()}
    names = set().union(*trees.values())
    train_tree = _class_tree(train) if train is not None else {}
    if imagenet_indices(tuple(names)) is None:
        names |= set(train_tree)  # a head that was trained on train/ has a logit for each of them
    classes = tuple(sorted(names))
    trees["train"] = {name: paths for name, paths in train_tree.items() if name in names}
    _check_classes(root, classes, trees)
    listed: dict[str, ListedSplit] = {}
    if trees["train"]:
        assert train is not None
        listed["train"] = _ordered(train, trees["train"], classes, seed)
    if "" in folders:
        paths, labels = _flatten(trees[""], classes)
        for name, members in divide(paths, labels, seed).items():
            chosen = tuple(paths[i] for i in members)
            listed[name] = ImageFiles(folders[""], chosen, labels[members])
    for name in EVALUATION:
        if name in folders:
            listed[name] = _ordered(folders[name], trees[name], classes, seed)
            if not len(listed[name]):
                raise _no_images(folders[name])
    return classes, listed


def _check_classes(root: Path, classes: tuple[str, ...], trees: dict[str, ClassTree]) -> None:
    empty = [c for c in classes if not any(tree.get(c) for tree in trees.values())]
    if len(empty) == len(classes):
        raise _no_images(root)
    if empty:
        raise UserError(
            f"the class folder '{empty[0]}' in {root} has no image: remove it",
            Code.EMPTY,
            path=str(root),
            name=empty[0],
        )
    if len(classes) == 1:
        raise UserError(
            f"{root} must have at least two classes (got one, '{classes[0]}')",
            Code.OUT_OF_RANGE,
            name="classes",
            path=str(root),
            got=1,
        )
    natural = sorted(classes, key=natural_key)
    if natural != list(classes):
        logger.warning(
            "the class folders of %s are labelled in the order of their names (%s, ...), as in "
            "torchvision; a model trained with timm's reader has the order %s, ...",
            root, ", ".join(classes[:3]), ", ".join(natural[:3]),
        )  # fmt: skip


def _no_images(folder: Path) -> UserError:
    return UserError(
        f"no images in {folder}: files must end in {', '.join(sorted(EXTENSIONS))}",
        Code.EMPTY,
        path=str(folder),
        accepted=tuple(sorted(EXTENSIONS)),
    )


def _split_folders(root: Path) -> tuple[dict[str, Path], Path | None]:
    """The split folders that a user named, or {"": the one to divide}; and the train folder."""
    names = _subfolders(root)
    named = {name: root / name for name in EVALUATION if name in names}
    train = root / "train" if "train" in names else None
    only_splits = bool(names) and set(names) <= SPLIT_FOLDERS
    if len(named) == len(EVALUATION):
        _check_distinct(root, [*named.values(), *([train] if train else [])])
        return named, train
    if named and only_splits:
        missing = tuple(f"{name}/" for name in EVALUATION if name not in named)
        raise UserError(
            f"{root} has split folders and lacks {', '.join(missing)}",
            Code.MISSING,
            path=str(root),
            missing=missing,
        )
    for name in VALIDATION_FOLDERS:
        if name in names and _subfolders(root / name):
            return {"": root / name}, train
    if "test" in names and only_splits:
        return {"": root / "test"}, train
    if names == ["train"]:
        raise UserError(
            f"{root} has train/ only: add val/, or give {root / 'train'} to split it",
            Code.MISSING,
            path=str(root),
            missing=("val/",),
        )
    beside = root.parent / "train"
    if root.name in (*VALIDATION_FOLDERS, "test") and beside.is_dir():
        return {"": root}, beside
    return {"": root}, None


def _check_distinct(root: Path, folders: list[Path]) -> None:
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UserError(
            f"the split folders of {root} must be different folders (two are {resolved[0]})",
            Code.DUPLICATE,
            path=str(root),
        )


def _subfolders(folder: Path) -> list[str]:
    """Names, sorted. Hidden folders, `__MACOSX` and the like are not classes."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__"))]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(names)


def _unreadable(folder: str | Path, error: OSError) -> UserError:
    return UserError(
        f"folder {folder} cannot be read: {error.strerror}", Code.UNREADABLE, path=str(folder)
    )


def _class_tree(folder: Path) -> ClassTree:
    classes = _subfolders(folder)
    if not classes:
        if any(folder.iterdir()):
            raise UserError(
                f"{folder} has no class folders: images must be in {folder}/CLASS/",
                Code.WRONG_TYPE,
                path=str(folder),
            )
        raise UserError(f"folder {folder} is empty", Code.EMPTY, path=str(folder))
    return {name: _images_below(folder, name) for name in classes}


def _images_below(folder: Path, name: str) -> list[str]:
    """Paths relative to `folder` of the images of a class, at any depth, sorted."""

    def stop(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    found = []
    for parent, _, files in os.walk(folder / name, onerror=stop, followlinks=True):
        below = Path(parent).relative_to(folder).as_posix()
        found += [
            f"{below}/{file}"
            for file in files
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")
        ]
    return sorted(found)


def _flatten(tree: ClassTree, classes: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    paths = [path for name in classes for path in tree.get(name, [])]
    counts = [len(tree.get(name, [])) for name in classes]
    return paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts)


def _ordered(folder: Path, tree: ClassTree, classes: tuple[str, ...], seed: int) -> ImageFiles:
    paths, labels = _flatten(tree, classes)
    order = stratified_order(paths, labels, seed)
    return ImageFiles(folder, tuple(paths[i] for i in order), labels[order])
