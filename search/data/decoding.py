"""Decode a split once per node: timm's evaluation transform, stored as uint8 in the cache.

Which images are decoded, and in which order, is decided by `search.data.datasets`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitpareto.search.data.decode_chunks import (
    CHUNK,
    ChunkDecoder,
    DecodeFailure,
    decode_chunks,
    keep_rows,
    reserve,
)
from vitpareto.search.data.decoded import Split, open_decoded
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.data.splits import Source
from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.locks import locked
from vitpareto.search.versions import package_versions

#: called with (images decoded, images in all)
Progress = Callable[[int, int], None]

SCHEMA = 1
#: fraction of a split's images that may be corrupt
CORRUPT_LIMIT = 0.01

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeRequest:
    """A split to decode.

    Attributes:
        name: the split's name.
        source: its images.
        stamp: identifies the images, their labels and their order.
        preprocess: how they are resized and cropped.
        workers: number of decoding processes (`decode_chunks`).
        progress: called after each chunk.
    """

    name: str
    source: Source
    stamp: str
    preprocess: Preprocess
    workers: int | None = None
    progress: Progress | None = None

    @property
    def fingerprint(self) -> str:
        """Identifies the decoded bytes."""
        # PIL resamples, called by torchvision, in timm's order: each version may change pixels
        versions = list(package_versions("timm", "torchvision", "pillow").values())
        key = {
            "schema": SCHEMA,
            "pixels": self.preprocess.pixels(),
            "stamp": self.stamp,
            "versions": versions,
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def decode_split(request: DecodeRequest, cache: Path) -> Split:
    """The split from the cache. It is decoded first if no process on this node has done so.

    Raises UserError if the cache cannot be written or has too little space, or if more than 1 % of
    the images cannot be decoded.
    """
    folder = cache / "decoded" / request.fingerprint[:32]
    try:
        found = open_decoded(request.name, folder)
        if found is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that decodes {request.name!r}"
        with locked(folder.with_suffix(".lock"), waiting=waiting):
            # another process may have decoded it meanwhile
            return open_decoded(request.name, folder) or _decode_to_cache(request, folder)
    except OSError as error:
        raise UserError(
            f"decoded images cannot be written to the cache {cache}: {error}",
            Code.UNWRITABLE,
            path=str(cache),
        ) from error


def _decode_to_cache(request: DecodeRequest, folder: Path) -> Split:
    """Decode beside `folder` and rename. The caller holds the folder's lock."""
    for stale in folder.parent.glob(f"{folder.name}*"):  # left by a killed process
        if stale.is_dir():
            logger.warning("removing an unfinished decode: %s", stale)
            shutil.rmtree(stale)
    temporary = folder.with_suffix(f".tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        fingerprint = _decode_into(temporary, request)
        target = folder.with_name(fingerprint[:32])
        if open_decoded(request.name, target) is None:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    split = open_decoded(request.name, target)
    assert split is not None, target
    return split


def _decode_into(folder: Path, request: DecodeRequest) -> str:
    """Fill `folder`; returns the fingerprint of its content.

    That is the request's, unless a file could not be read. Such a file may be readable the next
    time: the split without it has another fingerprint, and is not used in place of the complete
    one.
    """
    labels = request.source.labels
    _, height, width = request.preprocess.input_size
    shape = (len(labels), height, width, 3)
    _check_disk_space(folder, request.name, math.prod(shape))
    images = folder / "images.npy"
    offset = reserve(images, shape)
    decoder = ChunkDecoder(request.source, request.preprocess, images, offset, len(labels))
    failures = _decode_all(decoder, request)
    if failures:
        logger.warning(
            "%d of the %d images of '%s' cannot be decoded and are left out: %s",
            len(failures), len(labels), request.name, _some(failures),
        )  # fmt: skip
        kept = np.delete(np.arange(len(labels)), [f.index for f in failures])
        labels = labels[kept]
        keep_rows(images, kept)
    fingerprint = request.fingerprint
    unread = [f.index for f in failures if f.transient]
    if unread:
        fingerprint = hashlib.sha256(f"{fingerprint} without {unread}".encode()).hexdigest()
    np.save(folder / "labels.npy", labels.astype(np.int64))
    _write_index(folder, request, fingerprint, len(labels), failures)
    return fingerprint


def _decode_all(decoder: ChunkDecoder, request: DecodeRequest) -> list[DecodeFailure]:
    """Decode all chunks and report progress; the images that failed."""
    total, failures = decoder.images, []
    for chunk, failed in enumerate(decode_chunks(decoder, request.workers)):
        failures += failed
        if len(failures) > CORRUPT_LIMIT * total:
            raise UserError(
                f"more than {CORRUPT_LIMIT:.0%} of the {total} images of '{request.name}' cannot "
                f"be decoded; the first are {_some(failures)}",
                Code.UNREADABLE,
                split=request.name,
                paths=tuple(f.path for f in failures),
            )
        if request.progress is not None:
            request.progress(min((chunk + 1) * CHUNK, total), total)
    return failures


def _write_index(
    folder: Path,
    request: DecodeRequest,
    fingerprint: str,
    images: int,
    failures: list[DecodeFailure],
) -> None:
    """Write index.json and flush all files: the rename must not be on the disk before them."""
    sizes = {file: (folder / file).stat().st_size for file in ("images.npy", "labels.npy")}
    index = {
        "schema": SCHEMA,
        "split": request.name,
        "fingerprint": fingerprint,
        "images": images,
        "corrupt": [{"path": f.path, "reason": f.reason} for f in failures],
        "preprocess": request.preprocess.describe(),
        "bytes": sizes,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1))
    for file in (*sizes, "index.json"):
        with open(folder / file, "r+b") as opened:
            os.fsync(opened.fileno())


def _check_disk_space(folder: Path, name: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"decoding '{name}' needs {needed / 1e9:.1f} GB and {folder.parent} has "
            f"{free / 1e9:.1f} GB free: choose a cache on a larger disk, or fewer images",
            Code.UNWRITABLE,
            path=str(folder.parent),
            needed_bytes=needed,
            free_bytes=free,
        )


def _some(failures: list[DecodeFailure], most: int = 3) -> str:
    return "; ".join(f"{f.path} ({f.reason})" for f in failures[:most])
