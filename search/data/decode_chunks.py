"""Decode the images of a split into one npy file, chunk by chunk, in one process or several.

Reads images and writes pixels; which images, and where the file is, is decided by
`search.data.decoding`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.data.splits import Source
from vitpareto.search.errors import Code, UserError

#: images per chunk, and between two reports; 10 MB at 224 px
CHUNK = 64
#: seconds of remaining work that justify starting processes: each imports torch for 5 to 10 s
POOL_PAYS_AFTER_S = 30.0
MOST_WORKERS = 16

#: what PIL's plugins raise on files that are corrupt, truncated, much too large or not images
IMAGE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError),
    *(AttributeError, NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class DecodeFailure:
    """An image that cannot be decoded.

    Attributes:
        index: its position in the split.
        path: its name.
        reason: the error's type and message.
        transient: the system did not return the file; its content may be intact.
    """

    index: int
    path: str
    reason: str
    transient: bool


@dataclass(frozen=True)
class ChunkDecoder:
    """What a process needs to decode chunks into the file.

    Attributes:
        source: the images.
        preprocess: size and transform.
        file: the npy file (`reserve`).
        offset: where its data begins, in bytes.
        images: number of images.
    """

    source: Source
    preprocess: Preprocess
    file: Path
    offset: int
    images: int

    def decode(self, start: int) -> list[DecodeFailure]:
        """Decode the chunk that begins at `start` into its place; failed images stay zero."""
        stop = min(start + CHUNK, self.images)
        transform = self.preprocess.transform()
        _, height, width = self.preprocess.input_size
        pixels = np.zeros((stop - start, height, width, 3), dtype=np.uint8)
        failures = []
        for index in range(start, stop):
            try:
                with warnings.catch_warnings():
                    # PIL warns about palettes and large images; timm's readers ignore that too
                    warnings.simplefilter("ignore")
                    image = self.source.load(index)
            except IMAGE_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                transient = isinstance(error, OSError) and error.errno is not None
                failures.append(DecodeFailure(index, self.source.name(index), reason, transient))
                continue
            pixels[index - start] = transform(image).permute(1, 2, 0).numpy()
        # not through a map: on a full disk a write raises, a store through a map kills the process
        with open(self.file, "r+b") as file:
            file.seek(self.offset + start * height * width * 3)
            file.write(pixels.data)
        return failures


_decoder: ChunkDecoder | None = None


def _start_process(decoder: ChunkDecoder) -> None:
    global _decoder
    torch.set_num_threads(1)
    _decoder = decoder


def _decode_in_process(start: int) -> list[DecodeFailure]:
    assert _decoder is not None
    return _decoder.decode(start)


def decode_chunks(decoder: ChunkDecoder, workers: int | None) -> Iterator[list[DecodeFailure]]:
    """Each chunk's failures, in order, as the chunks are decoded.

    workers: 0 or 1 decodes in this process; None starts one process per core (at most 16) if the
    remaining work justifies it.
    """
    starts = list(range(0, decoder.images, CHUNK))
    if workers is None:
        begin = time.monotonic()
        yield decoder.decode(starts.pop(0))
        pays = (time.monotonic() - begin) * len(starts) > POOL_PAYS_AFTER_S
        workers = min(_cores(), MOST_WORKERS) if pays else 0
    if workers < 2:
        yield from map(decoder.decode, starts)
        return
    # not fork: the caller has torch's threads, and maybe Ray's
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_process, (decoder,))
    try:
        yield from pool.map(_decode_in_process, starts)
    except BrokenProcessPool as error:
        raise UserError(
            "a decoding process died: the machine ran out of memory, or the calling script has no "
            "`if __name__ == '__main__':`; workers=0 decodes in the calling process",
            Code.UNAVAILABLE,
            workers=workers,
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reserve(path: Path, shape: tuple[int, ...]) -> int:
    """Create a sparse uint8 npy file of zeros; returns where its data begins, in bytes."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + math.prod(shape))
    return offset


def keep_rows(path: Path, rows: np.ndarray) -> None:
    """Rewrite an npy file with these rows only, a chunk at a time."""
    everything = np.load(path, mmap_mode="r", allow_pickle=False)
    shorter = path.with_name("kept.npy")
    offset = reserve(shorter, (len(rows), *everything.shape[1:]))
    with open(shorter, "r+b") as file:
        file.seek(offset)
        chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        file.writelines(everything[chunk].tobytes() for chunk in chunks)
    shorter.replace(path)
