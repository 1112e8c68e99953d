"""Trained weights on disk, one safetensors file per state dict, named by its digest.

A file is a complete state dict of a built candidate; its name is
`methods.engine.weights.weights_digest` of it. Files are written atomically, and writing the same
weights again changes nothing. When a file may be deleted is not decided here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from vitpareto.methods.engine.weights import weights_digest
from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.atomic import replacing, retry_while_disk_full, write_atomic
from vitpareto.search.files.write_through import fetch_if_missing

SUFFIX = ".safetensors"


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors: on the CPU, contiguous, sharing no memory with each other."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # safetensors refuses tied tensors
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


@dataclass(frozen=True)
class WeightStore:
    """The weights in one folder. Pickles small: it is sent to workers."""

    folder: Path

    def path(self, digest: str) -> Path:
        """The file of these weights, which may not exist."""
        return self.folder / f"{digest}{SUFFIX}"

    def has(self, digest: str) -> bool:
        """Whether the weights exist; the file is fetched from object storage if it is not local."""
        return fetch_if_missing(self.path(digest))

    def save(self, state: Mapping[str, Tensor]) -> str:
        """Write a state dict unless it is stored already; returns its digest."""
        plain = plain_state(state)
        digest = weights_digest(plain)
        if not self.has(digest):
            self.folder.mkdir(parents=True, exist_ok=True)
            # not save_file, which creates files with mode 0600: other users read a study
            write_atomic(self.path(digest), safetensors.torch.save(plain))
        return digest

    def adopt(self, digest: str, other: WeightStore) -> None:
        """Store the weights of another store too, as a hard link where that is possible.

        Raises UserError if `other` does not have them.
        """
        if self.has(digest):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        fetch_if_missing(other.path(digest))

        def link() -> None:
            with replacing(self.path(digest)) as partial:
                try:
                    os.link(other.path(digest), partial)
                except FileNotFoundError:
                    raise other._missing(digest) from None
                except OSError:  # another disk, or a file system without hard links
                    shutil.copyfile(other.path(digest), partial)

        retry_while_disk_full(self.path(digest), link)

    def load(self, digest: str) -> dict[str, Tensor]:
        """The weights with this digest, memory-mapped (`Recipe.build` verifies the digest).

        Raises UserError if they do not exist or cannot be read.
        """
        path = self.path(digest)
        if not fetch_if_missing(path):
            raise self._missing(digest)
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # safetensors raises its own types, and the system's
            raise UserError(
                f"weights file {path} cannot be read: {error}", Code.UNREADABLE, path=str(path)
            ) from error

    def _missing(self, digest: str) -> UserError:
        return UserError(
            f"weights {digest} do not exist in {self.folder}: the recipe that names them cannot be "
            "built without that file",
            Code.NOT_FOUND,
            digest=digest,
            path=str(self.path(digest)),
        )
