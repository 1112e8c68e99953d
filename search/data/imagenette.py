"""Imagenette: ten of ImageNet-1k's classes, as image folders.

An ImageNet-1k head is evaluated at logits 0, 217, 482, 491, 497, 566, 569, 571, 574 and 701. Both
train/ and val/ have images of ImageNet-1k's training set: a model that was trained on it has seen
some of them.
"""

from __future__ import annotations

from pathlib import Path

from vitpareto.search.data.folders import list_folder
from vitpareto.search.data.splits import ListedSplit
from vitpareto.search.errors import Code, UserError

CLASSES = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042",
    "n03425413", "n03445777", "n03888257",
)  # fmt: skip
#: as its archives unpack: full size, and 320 px and 160 px on the shorter side
FOLDERS = ("imagenette2", "imagenette2-320", "imagenette2-160")
URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"


def list_imagenette(
    root: Path | None, cache: Path, seed: int
) -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
    """Classes and splits of `root`, or of the largest of its archives' folders in it. Without
    `root` they are looked for in the cache.

    Raises UserError if they are not found, or if the class folders are not Imagenette's.
    """
    folder = _find(root, cache)
    classes, listed = list_folder(folder, seed)
    missing, unknown = sorted(set(CLASSES) - set(classes)), sorted(set(classes) - set(CLASSES))
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"has {', '.join(unknown[:3])}"] if unknown else []
        raise UserError(
            f"{folder} is not Imagenette: it {' and '.join(faults)}; its class folders must be "
            f"{', '.join(CLASSES)}",
            Code.MISMATCH,
            path=str(folder),
            missing=tuple(missing),
            unknown=tuple(unknown),
        )
    return classes, listed


def _find(root: Path | None, cache: Path) -> Path:
    """The folder that has Imagenette's val/."""
    given = cache / "datasets" if root is None else root
    for folder in (given, *(given / name for name in FOLDERS)):
        if (folder / "val").is_dir():
            return folder
    raise UserError(
        f"Imagenette is not in {given}: it must have val/, or one of {', '.join(FOLDERS)} with "
        f"val/ in it. Download {URL} and unpack it in {given}, or give imagenette:DIR, the folder "
        "with its train/ and val/",
        Code.NOT_FOUND,
        path=str(given),
        url=URL,
    )
