"""A split is decoded once, by one process or several, and corrupt files are reported."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.logs import logged
from tests.refusals import refused
from tests.search.data.image_folders import (
    EVALUATION,
    ROOT,
    SMALL,
    decoded_folders,
    make_folder,
    members,
)
from vitpareto.methods import Code
from vitpareto.search.data import decoding
from vitpareto.search.data.datasets import open_data


def test_a_second_open_decodes_nothing(folder: Path, cache: Path) -> None:
    reported: list[tuple[int, int]] = []
    data = open_data(
        str(folder), SMALL, cache=cache, progress=lambda done, total: reported.append((done, total))
    )
    first = data.split("held-out")
    assert reported == [(64, 72), (72, 72)]
    before = (first.folder / "images.npy").stat()
    second = open_data(
        str(folder), SMALL, cache=cache, progress=lambda *_: pytest.fail("decoded again")
    ).split("held-out")
    after = (second.folder / "images.npy").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert second == first


def test_the_map_is_read_only_and_pickles_as_its_path(folder: Path, cache: Path) -> None:
    split = open_data(str(folder), SMALL, cache=cache).split("held-out")
    assert isinstance(split.images, np.memmap)
    assert split.images.dtype == np.uint8
    assert split.images.shape == (72, 16, 16, 3)
    assert split.labels.dtype == np.int64
    assert not split.images.flags.writeable
    sent = pickle.dumps(split)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    np.testing.assert_array_equal(received.images, split.images)
    images, labels = received.batch(70, 72)
    assert (images.shape, labels.shape) == ((2, 16, 16, 3), (2,))
    images.zero_()  # a copy: the map is untouched
    assert received.images[70].any()
    with refused("out-of-range", name="held-out", got=(70, 73), images=72):
        received.batch(70, 73)


def test_data_pickles_without_its_callback(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache, progress=lambda *_: None)
    received = pickle.loads(pickle.dumps(data))
    assert received == data
    assert received.split("search").fingerprint == data.split("search").fingerprint


def test_relative_paths_work_from_another_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = open_data("pets", SMALL, cache=Path("cache"))
    calibration = data.split("calibration")
    monkeypatch.chdir("/")
    assert len(calibration.images) == 24
    assert len(data.split("search")) == 24
    assert folder == tmp_path / "pets"


@pytest.mark.parametrize(
    ("change", "decoded_anew"),
    [
        ({"crop_pct": 1.0}, True),
        ({"interpolation": "bilinear"}, True),
        ({"mean": (0.1, 0.1, 0.1)}, False),  # the pixels are the same before normalisation
        ({"crop_mode": "border"}, True),
    ],
)
def test_what_decides_the_pixels_decides_the_cache(
    folder: Path, cache: Path, change: dict[str, Any], decoded_anew: bool
) -> None:
    one = open_data(str(folder), SMALL, cache=cache)
    other = open_data(str(folder), replace(SMALL, **change), cache=cache)
    assert (one.split("search").folder != other.split("search").folder) is decoded_anew
    assert one.fingerprint != other.fingerprint


def test_other_images_with_the_same_names_and_sizes_are_decoded(
    tmp_path: Path, cache: Path
) -> None:
    old = make_folder(tmp_path / "old", {"a": 5, "b": 5}, seed=0, suffix=".bmp")
    new = make_folder(tmp_path / "new", {"a": 5, "b": 5}, seed=1, suffix=".bmp")
    first, second = (open_data(str(f), SMALL, cache=cache).split("search") for f in (old, new))
    assert not np.array_equal(first.images, second.images)


def test_a_truncated_file_is_decoded_again(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    whole = np.array(data.split("search").images)
    file = data.split("search").folder / "images.npy"
    os.truncate(file, 500)
    (file.parent.parent / f"{file.parent.name}.tmp-1").mkdir()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(data.split("search").images, whole)
    assert len(logged(caplog, "decoding")) == 2, "a warning for each unfinished decode"
    assert decoded_folders(cache) == [file.parent.name]


def test_worker_processes_decode_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    here = open_data(str(folder), SMALL, cache=tmp_path / "here", workers=0).split("held-out")
    reported: list[tuple[int, int]] = []
    there = open_data(
        str(folder), SMALL, cache=tmp_path / "there", workers=2,
        progress=lambda done, total: reported.append((done, total)),
    ).split("held-out")  # fmt: skip
    assert (here.folder / "images.npy").read_bytes() == (there.folder / "images.npy").read_bytes()
    assert (here.folder / "labels.npy").read_bytes() == (there.folder / "labels.npy").read_bytes()
    assert reported == [(64, 72), (72, 72)]
    assert there.fingerprint == here.fingerprint


SECOND_READER = """
import hashlib, json, logging, sys
from pathlib import Path
from vitpareto.search.data.datasets import open_data
from vitpareto.search.data.preprocess import Preprocess


class Waiting(logging.Handler):
    def emit(self, record):
        print("waiting", flush=True)


locks = logging.getLogger("vitpareto.search.files.locks")
locks.setLevel(logging.INFO)
locks.addHandler(Waiting())
folder, cache, fields = sys.argv[1:]
reported = []
data = open_data(folder, Preprocess(**json.loads(fields)), cache=Path(cache),
                 progress=lambda *done: reported.append(done))
print("ready", flush=True)
sys.stdin.readline()
split = data.split("held-out")
print(json.dumps([data.fingerprint, split.fingerprint, split.labels.tolist(),
                  hashlib.sha256(split.images.tobytes()).hexdigest(), reported]))
"""


def test_a_second_process_waits_for_the_first_and_agrees(folder: Path, cache: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SECOND_READER, folder, cache, json.dumps(SMALL.describe())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as second_reader:  # fmt: skip
        assert second_reader.stdout is not None and second_reader.stdin is not None
        assert second_reader.stdout.readline() == "ready\n"
        reported: list[int] = []

        def half_way(done: int, total: int) -> None:
            assert second_reader.stdin is not None
            reported.append(done)
            if done < total:
                second_reader.stdin.write("\n")
                second_reader.stdin.flush()
                assert second_reader.stdout is not None
                assert second_reader.stdout.readline() == "waiting\n", "for the lock"

        ours = open_data(str(folder), SMALL, cache=cache, progress=half_way)
        split = ours.split("held-out")
        theirs = json.loads(second_reader.communicate(timeout=240)[0])
    digest = hashlib.sha256(split.images.tobytes()).hexdigest()
    assert reported == [64, 72]
    assert theirs == [ours.fingerprint, split.fingerprint, split.labels.tolist(), digest, []]
    assert len(decoded_folders(cache)) == 1


def test_a_corrupt_image_is_reported_and_left_out(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in EVALUATION:
        make_folder(
            tmp_path / "set" / name, {"a": 100, "b": 100} if name == "search" else {"a": 2, "b": 2}
        )
    intact = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    broken = [members(intact, "search")[i] for i in (70, 199)]
    kept = np.delete(np.arange(200), (70, 199))
    expected = (
        np.array(intact.split("search").images)[kept],
        np.array(intact.split("search").labels)[kept],
    )
    (tmp_path / "set/search" / broken[0]).write_bytes(b"not an image")
    file = tmp_path / "set/search" / broken[1]
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        split = open_data(str(tmp_path / "set"), SMALL, cache=cache).split("search")
    assert split.corrupt == tuple(str(tmp_path / "set/search" / path) for path in broken)
    (warning,) = logged(caplog, "decoding")
    assert isinstance(warning.args, tuple) and warning.args[:3] == (2, 200, "search")
    assert len(split) == len(split.images) == 198
    np.testing.assert_array_equal(split.images, expected[0])
    np.testing.assert_array_equal(split.labels, expected[1])
    index = json.loads((split.folder / "index.json").read_text())
    assert index["images"] == 198
    assert "UnidentifiedImageError" in index["corrupt"][0]["reason"]


def test_an_unreadable_file_is_decoded_once_it_is_readable(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in EVALUATION:
        make_folder(tmp_path / "set" / name, {"a": 50, "b": 50})
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    away = tmp_path / "set/search" / members(data, "search")[7]
    away.rename(tmp_path / "away")  # after listing: what a restart of a file server looks like
    part, same = data.split("search"), data.split("search")
    assert part.corrupt == (str(away),)
    assert len(part) == 99
    assert same == part, "the same gap is the same map"
    (tmp_path / "away").rename(away)
    whole = data.split("search")
    assert (len(whole), whole.corrupt) == (100, ())
    assert whole.fingerprint != part.fingerprint
    np.testing.assert_array_equal(part.images, np.delete(whole.images, 7, axis=0))
    monkeypatch.setattr(decoding, "_decode_into", lambda *_: pytest.fail("decoded again"))
    assert data.split("search") == whole


def test_more_than_one_percent_corrupt_stops(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    broken = folder / members(data, "search")[5]
    broken.write_bytes(b"")
    with refused(Code.UNREADABLE, split="search", paths=(str(broken),)):
        data.split("search")
    assert decoded_folders(cache) == [], "nothing half done stays"


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data = open_data(str(folder), SMALL, cache=tmp_path / "file")
    with refused(Code.UNWRITABLE, path=str(tmp_path / "file")):
        data.split("search")


def test_too_little_disk_space_is_refused_before_decoding(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with refused(Code.UNWRITABLE, free_bytes=100, needed_bytes=24 * 16 * 16 * 3):
        open_data(str(folder), SMALL, cache=cache).split("search")
    assert decoded_folders(cache) == []
