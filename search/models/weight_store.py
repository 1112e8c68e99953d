"""Trained weights on disk, named by what they are: one safetensors file a digest.

A file is a complete state dict of a built candidate, under `methods.engine.recipe.weights_digest`
of it. It is written beside its place and renamed, so that it is whole or not there; writing the
same weights again changes nothing. What may be deleted, and when, is not decided here.
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
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import replacing, retry_while_disk_full, write_atomic
from vitpareto.search.files.write_through import fetch_if_missing

SUFFIX = ".safetensors"


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by themselves: on the CPU, contiguous, sharing no memory with each other."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # safetensors refuses tied tensors
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


@dataclass(frozen=True)
class Artifacts:
    """The weights in one folder. Frozen and small: workers carry it."""

    folder: Path

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest}{SUFFIX}"

    def has(self, digest: str) -> bool:
        return fetch_if_missing(self.path(digest))

    def save(self, state: Mapping[str, Tensor]) -> str:
        """Make a state dict durable; its digest. One that is there already is left as it is."""
        whole = plain_state(state)
        digest = weights_digest(whole)
        if not self.has(digest):
            self.folder.mkdir(parents=True, exist_ok=True)
            # not save_file: its files are for their owner alone, and a study is read by others
            write_atomic(self.path(digest), safetensors.torch.save(whole))
        return digest

    def adopt(self, digest: str, other: Artifacts) -> None:
        """The same weights as in another folder: one file of two names where that is possible."""
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
        """The weights of this digest, mapped (`Recipe.build` compares them with it).

        UserError where they are not there or cannot be read, naming the file.
        """
        path = self.path(digest)
        if not fetch_if_missing(path):
            raise self._missing(digest)
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # safetensors raises its own, and the system's
            raise UserError(f"weights file {path} cannot be read: {error}") from error

    def _missing(self, digest: str) -> UserError:
        there = sum(1 for p in self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else 0
        return UserError(
            f"weights {digest} are not in {self.folder} (it holds {there}): the recipe that names "
            "them cannot be built without that file"
        )
