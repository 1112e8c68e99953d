"""Datasets that are known by name, as NAME or NAME:DIR."""

from __future__ import annotations

from pathlib import Path

from vitpareto.search.data.cifar10 import list_cifar10
from vitpareto.search.data.digits import list_digits
from vitpareto.search.data.fashionmnist import list_fashionmnist
from vitpareto.search.data.imagenette import list_imagenette
from vitpareto.search.data.splits import ListedSplit

_WITH_FOLDER = {
    "cifar10": list_cifar10,
    "fashionmnist": list_fashionmnist,
    "imagenette": list_imagenette,
}
NAMES = ("digits", *_WITH_FOLDER)


def list_named(
    spec: str, cache: Path, seed: int
) -> tuple[tuple[str, ...], dict[str, ListedSplit]] | None:
    """Classes and splits of a named dataset; None if `spec` names none.

    CIFAR-10 is downloaded to the cache if it is missing; Fashion-MNIST and Imagenette are looked
    for in the cache. `digits` has splits of its own: `seed` does not change them.
    """
    if spec == "digits":
        return list_digits()
    name, _, folder = spec.partition(":")
    lister = _WITH_FOLDER.get(name)
    if lister is None:
        return None
    return lister(Path(folder).expanduser().absolute() if folder else None, cache, seed)
