"""Decode a split once per node: timm's evaluation transform, kept as uint8 in a mapped file.

What is decoded, and in which order, is decided in `search.data.datasets`; nothing here chooses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import timm
import timm.data
import torch
import torchvision
from PIL import Image

from vitpareto.search.errors import UserError
from vitpareto.search.files.locks import locked

Progress = Callable[[int, int], None]

SCHEMA = 1
CHUNK = 64  # images between two reports; at 224 px a buffer of 10 MB
CORRUPT_LIMIT = 0.01
POOL_PAYS_AFTER_S = 30.0  # a process takes 5 to 10 s to import torch and timm

#: What PIL's plugins raise on files that are broken, cut short, absurdly large or not images.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError),
    *(AttributeError, NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocess:
    """What a model wants to be shown.

    `input_size` is (3, H, W) in pixels; `mean` and `std` are per channel on the 0-1 scale;
    `crop_pct` is the share of the resized image that the crop keeps.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, model: torch.nn.Module) -> Preprocess:
        """The model's own data configuration, at the size the model was built for.

        timm reads the size from the pretrained configuration, which `create_model(img_size=...)`
        leaves as it was; `patch_embed.img_size` is what the forward pass checks.
        """
        config = timm.data.resolve_model_data_config(model)
        patch_embed = getattr(model, "patch_embed", None)
        # the first convolution sees the images; a hybrid's `proj` sees its stem's features
        parts = () if patch_embed is None else patch_embed.modules()
        convolutions = (part for part in parts if isinstance(part, torch.nn.Conv2d))
        first = next(convolutions, None)
        channels = config["input_size"][0] if first is None else first.in_channels
        if channels != 3:
            raise UserError(f"the model takes {channels} channels: only RGB models are measured")
        height, width = getattr(patch_embed, "img_size", None) or config["input_size"][1:]
        return cls(
            input_size=(3, int(height), int(width)),
            mean=tuple(float(v) for v in config["mean"]),
            std=tuple(float(v) for v in config["std"]),
            interpolation=str(config["interpolation"]),
            crop_pct=float(config["crop_pct"]),
            crop_mode=str(config["crop_mode"]),
        )

    def describe(self) -> dict[str, Any]:
        """Every field, in JSON's types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def pixels(self) -> dict[str, Any]:
        """The fields that decide the decoded pixels: the mean only where it fills a border."""
        decided = self.describe()
        del decided["std"]
        if self.crop_mode != "border":
            del decided["mean"]
        return decided

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """timm's evaluation transform up to its normalisation: RGB image -> uint8 [3, H, W]."""
        return timm.data.create_transform(
            input_size=self.input_size,
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )

    def normalise(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(images / 255 - mean) / std: uint8 [B, H, W, 3] -> `dtype` [B, 3, H, W], same device.

        Computed in float32 in timm's order of operations, and only then cast to `dtype`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}"
            )
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        scaled = images.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
        return scaled.sub_(mean).div_(std).to(dtype)


class Source(Protocol):
    """A split's images in their final order. Pickles small: workers load for themselves."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [M]."""

    def name(self, index: int) -> str:
        """What an unreadable image is reported by."""

    def load(self, index: int) -> Image.Image:
        """RGB; raises what the image library raises on a bad image."""


@dataclass(frozen=True)
class Split:
    """A decoded split, mapped read-only. Pickles as its path: a worker on this node maps it too.

    `fingerprint` identifies the decoded bytes; `corrupt` names the listed images that could not
    be decoded and are therefore in neither `images` nor `labels`.
    """

    name: str
    folder: Path
    fingerprint: str
    corrupt: tuple[str, ...]

    @cached_property
    def images(self) -> np.ndarray:
        """uint8 [M, H, W, 3], RGB, a read-only memory map."""
        return np.load(self.folder / "images.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [M], a read-only memory map."""
        return np.load(self.folder / "labels.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images start..stop-1, copied out of the map: uint8 [B, H, W, 3] and int64 [B]."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"no images {start}..{stop} in the {len(self)} of '{self.name}'")
        images, labels = np.array(self.images[start:stop]), np.array(self.labels[start:stop])
        return torch.from_numpy(images), torch.from_numpy(labels)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def decode_split(
    name: str,
    source: Source,
    preprocess: Preprocess,
    cache: Path,
    *,
    stamp: str,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Split:
    """The split from the cache, decoded into it first where no process on this node has done so.

    `workers` is the number of decoding processes: 0 or 1 decode in this process, None starts as
    many as there are cores (16 at most) where what is left is worth their start. `progress` hears
    (images done, images in all), and nothing where the split was there already. `stamp` stands
    for the source: another content, label or order has another stamp.

    Raises `UserError` where the cache cannot be written or has too little room, and where more
    than 1 % of the images cannot be decoded.
    """
    fingerprint = _fingerprint(preprocess, stamp)
    folder = cache / "decoded" / fingerprint[:32]
    try:
        found = _open(name, folder)
        if found is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = "another process decodes these images: waiting for it"
        with locked(folder.with_suffix(".lock"), waiting=waiting):
            found = _open(name, folder)
            if found is not None:
                return found
            # Whoever left these behind was killed: the lock is ours.
            for stale in folder.parent.glob(f"{folder.name}*"):
                if stale.is_dir():
                    logger.warning("removing an unfinished decode: %s", stale)
                    shutil.rmtree(stale)
            temporary = folder.with_suffix(f".tmp-{os.getpid()}")
            temporary.mkdir()
            try:
                made = _decode_into(
                    temporary, name, source, preprocess, fingerprint, workers, progress
                )
                folder = folder.with_name(made[:32])
                if _open(name, folder) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            found = _open(name, folder)
            assert found is not None, folder
            return found
    except OSError as error:
        raise UserError(f"cannot write decoded images to the cache {cache}: {error}") from error


def _fingerprint(preprocess: Preprocess, stamp: str) -> str:
    # Resampling is PIL's, called by torchvision, in the order timm composes: each may change it.
    versions = [timm.__version__, torchvision.__version__, PIL.__version__]
    key = {"schema": SCHEMA, "pixels": preprocess.pixels(), "stamp": stamp, "versions": versions}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _open(name: str, folder: Path) -> Split | None:
    """The finished split in `folder`; None where there is none or a file of it was cut short."""
    try:
        index = json.loads((folder / "index.json").read_text())
        whole = all((folder / f).stat().st_size == size for f, size in index["bytes"].items())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not whole:
        return None
    corrupt = tuple(entry["path"] for entry in index["corrupt"])
    return Split(name, folder, index["fingerprint"], corrupt)


def is_whole(split: Split) -> bool:
    """Whether this node has the split's images where it says, and they are those."""
    found = _open(split.name, split.folder)
    return found is not None and found.fingerprint == split.fingerprint


@dataclass(frozen=True)
class _Failure:
    index: int
    path: str
    reason: str
    transient: bool  # the system did not hand the file over, whatever is in it


@dataclass(frozen=True)
class _Job:
    """What a decoding process needs to fill its part of the file."""

    source: Source
    preprocess: Preprocess
    file: Path
    offset: int
    images: int

    def write(self, start: int) -> list[_Failure]:
        """Decode the chunk that begins at `start` into its place; what failed stays zero."""
        stop = min(start + CHUNK, self.images)
        transform = self.preprocess.transform()
        _, height, width = self.preprocess.input_size
        pixels = np.zeros((stop - start, height, width, 3), dtype=np.uint8)
        failures = []
        for index in range(start, stop):
            try:
                with warnings.catch_warnings():
                    # PIL's advice on palettes and big images: nothing a user of timm is told.
                    warnings.simplefilter("ignore")
                    image = self.source.load(index)
            except UNREADABLE as error:
                reason = f"{type(error).__name__}: {error}"
                transient = isinstance(error, OSError) and error.errno is not None
                failures.append(_Failure(index, self.source.name(index), reason, transient))
                continue
            pixels[index - start] = transform(image).permute(1, 2, 0).numpy()
        # Plain writes: on a full disk they raise, where a store through a map kills the process.
        with open(self.file, "r+b") as file:
            file.seek(self.offset + start * height * width * 3)
            file.write(pixels.data)
        return failures


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _worker_job
    torch.set_num_threads(1)
    _worker_job = job


def _write_in_worker(start: int) -> list[_Failure]:
    assert _worker_job is not None
    return _worker_job.write(start)


def _run(job: _Job, workers: int | None) -> Iterator[list[_Failure]]:
    """Each chunk's failures, in order, as the chunks are done."""
    starts = list(range(0, job.images, CHUNK))
    if workers is None:
        began = time.monotonic()
        yield job.write(starts.pop(0))
        pays = (time.monotonic() - began) * len(starts) > POOL_PAYS_AFTER_S
        workers = min(_cores(), 16) if pays else 0
    if workers < 2:
        yield from map(job.write, starts)
        return
    # Not fork: the caller has torch's threads, and maybe Ray's.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (job,))
    try:
        yield from pool.map(_write_in_worker, starts)
    except BrokenProcessPool as error:
        raise UserError(
            "a decoding process died: out of memory, or started from a script without "
            "`if __name__ == '__main__':` (workers=0 decodes in this process)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _decode_into(
    folder: Path,
    name: str,
    source: Source,
    preprocess: Preprocess,
    fingerprint: str,
    workers: int | None,
    progress: Progress | None,
) -> str:
    """Fill `folder`; returns the fingerprint of what it holds.

    That is `fingerprint`, unless a file could not be read. Such a file may be back the next time:
    the map without it has a fingerprint of its own, and is not found in the whole one's place.
    """
    labels = source.labels
    total = len(labels)
    _, height, width = preprocess.input_size
    shape = (total, height, width, 3)
    _check_room(folder, name, math.prod(shape))
    offset = _reserve(folder / "images.npy", shape)
    job = _Job(source, preprocess, folder / "images.npy", offset, total)
    failures: list[_Failure] = []
    for chunk, failed in enumerate(_run(job, workers)):
        failures += failed
        if len(failures) > CORRUPT_LIMIT * total:
            raise UserError(
                f"more than {CORRUPT_LIMIT:.0%} of the {total} images of '{name}' cannot be "
                f"decoded, first of all {_some(failures)}"
            )
        if progress is not None:
            progress(min((chunk + 1) * CHUNK, total), total)
    if failures:
        logger.warning(
            "%d of the %d images of '%s' cannot be decoded and are left out: %s",
            len(failures), total, name, _some(failures),
        )  # fmt: skip
        kept = np.delete(np.arange(total), [f.index for f in failures])
        labels = labels[kept]
        _keep_rows(folder / "images.npy", kept)
    unread = [f.index for f in failures if f.transient]
    if unread:
        fingerprint = hashlib.sha256(f"{fingerprint} without {unread}".encode()).hexdigest()
    np.save(folder / "labels.npy", labels.astype(np.int64))
    sizes = {file: (folder / file).stat().st_size for file in ("images.npy", "labels.npy")}
    index = {
        "schema": SCHEMA,
        "split": name,
        "fingerprint": fingerprint,
        "images": len(labels),
        "corrupt": [{"path": f.path, "reason": f.reason} for f in failures],
        "preprocess": preprocess.describe(),
        "bytes": sizes,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1))
    for file in (*sizes, "index.json"):  # the rename must not reach the disk before them
        with open(folder / file, "r+b") as opened:
            os.fsync(opened.fileno())
    return fingerprint


def _check_room(folder: Path, name: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"'{name}' decodes to {needed / 1e9:.1f} GB and {folder.parent} has "
            f"{free / 1e9:.1f} GB free: name a cache on a larger disk or fewer images"
        )


def _reserve(path: Path, shape: tuple[int, ...]) -> int:
    """An npy file of zeros, sparse; returns where its data begins, in bytes."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + math.prod(shape))
    return offset


def _keep_rows(path: Path, rows: np.ndarray) -> None:
    """Rewrite the file with these rows alone, a chunk at a time."""
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    shorter = path.with_name("kept.npy")
    offset = _reserve(shorter, (len(rows), *whole.shape[1:]))
    with open(shorter, "r+b") as file:
        file.seek(offset)
        chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        file.writelines(whole[chunk].tobytes() for chunk in chunks)
    shorter.replace(path)


def _some(failures: list[_Failure], most: int = 3) -> str:
    return "; ".join(f"{f.path} ({f.reason})" for f in failures[:most])
