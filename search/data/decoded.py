"""A decoded split on disk: one folder of the cache with pixels, labels and an index."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitpareto.search.errors import BadInput, Code


@dataclass(frozen=True)
class Split:
    """A decoded split, memory-mapped read-only. Pickles as its path: workers of a node map it too.

    Attributes:
        name: train, calibration, search or held-out.
        folder: where it is stored.
        fingerprint: identifies the decoded bytes.
        corrupt: names of the listed images that cannot be decoded; they are neither in `images`
            nor in `labels`.
    """

    name: str
    folder: Path
    fingerprint: str
    corrupt: tuple[str, ...]

    @cached_property
    def images(self) -> np.ndarray:
        """uint8 [M, H, W, 3], RGB."""
        return np.load(self.folder / "images.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [M]."""
        return np.load(self.folder / "labels.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of images start..stop-1 and their labels: uint8 [B, H, W, 3] and int64 [B].

        Raises BadInput for an empty range and for one beyond the split.
        """
        if not 0 <= start < stop <= len(self):
            raise BadInput(
                f"start and stop must satisfy 0 <= start < stop <= {len(self)}, the images of "
                f"{self.name!r} (got {start} and {stop})",
                Code.OUT_OF_RANGE,
                name=self.name,
                got=(start, stop),
                images=len(self),
            )
        images, labels = np.array(self.images[start:stop]), np.array(self.labels[start:stop])
        return torch.from_numpy(images), torch.from_numpy(labels)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def open_decoded(name: str, folder: Path) -> Split | None:
    """The split in `folder`; None if it does not exist, is unfinished, or has a truncated file."""
    try:
        index = json.loads((folder / "index.json").read_text())
        complete = all((folder / f).stat().st_size == size for f, size in index["bytes"].items())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not complete:
        return None
    corrupt = tuple(entry["path"] for entry in index["corrupt"])
    return Split(name, folder, index["fingerprint"], corrupt)


def is_complete(split: Split) -> bool:
    """Whether this node has the split's files, and they have the split's fingerprint."""
    found = open_decoded(split.name, split.folder)
    return found is not None and found.fingerprint == split.fingerprint
