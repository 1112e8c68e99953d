"""Which images a study sees, in which order, and that they are decoded once and rightly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from vitpareto.search.data import datasets, embedded_images
from vitpareto.search.data import decoding as decode
from vitpareto.search.data.datasets import Data, Preprocess, check_head, open_data
from vitpareto.search.errors import UserError
from vitpareto.search.files.cache import default_cache

ROOT = Path(__file__).resolve().parents[3]
SMALL = Preprocess((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.9, "center")
EVALUATION = ("calibration", "search", "held-out")


def make_folder(root: Path, counts: dict[str, int], seed: int = 0, suffix: str = ".png") -> Path:
    """ROOT/CLASS/NNN.png: noise, no two images alike."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}{suffix}")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets", {"cat": 60, "ant": 40, "dog": 20})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def members(data: Data, name: str) -> list[str]:
    return list(data._listed[name].paths)  # type: ignore[attr-defined]


def decoded_folders(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "decoded").iterdir() if p.is_dir())


# --- order and splits


def test_stratified_order_keeps_every_prefix_balanced() -> None:
    labels = np.repeat(np.arange(4), [400, 200, 100, 50])
    order = datasets.stratified_order([f"{i}" for i in range(750)], labels, seed=3)
    assert sorted(order) == list(range(750))
    share = np.bincount(labels) / 750
    seen = np.cumsum(np.eye(4)[labels[order]], axis=0)
    # At place t every class has given t * n images to within one, and so have all four together
    # to within four: a class is within 1 + 4 * its share of what the prefix's length asks.
    excess = np.abs(seen - np.arange(1, 751)[:, None] * share)
    assert (excess <= 1 + 4 * share).all()
    assert (order != np.sort(order)).mean() > 0.9
    assert not np.array_equal(
        order, datasets.stratified_order(list(map(str, range(750))), labels, 4)
    )


def test_stratified_order_is_this_order_with_every_library_version() -> None:
    order = datasets.stratified_order(list("abcdefgh"), np.array([0, 0, 0, 0, 1, 1, 2, 2]), seed=0)
    assert order.tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [2, 4, 7, 3, 6, 0, 5, 1]  # by BLAKE2b; a change here reshuffles every study


@pytest.mark.parametrize(
    ("total", "sizes"),
    [(5, (1, 1, 3)), (4999, (999, 999, 3001)), (5000, (1024, 1000, 2976))],
)
def test_one_set_is_divided_as_designed(total: int, sizes: tuple[int, int, int]) -> None:
    labels = np.arange(total) % 5
    splits = datasets.divide([f"{i}" for i in range(total)], labels, seed=0)
    assert tuple(splits) == EVALUATION
    assert tuple(map(len, splits.values())) == sizes
    assert sorted(np.concatenate(list(splits.values()))) == list(range(total))


def test_splits_are_disjoint_complete_and_stratified(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    assert data.classes == ("ant", "cat", "dog")
    assert data.sizes == {"calibration": 24, "search": 24, "held-out": 72}
    listed = [path for name in EVALUATION for path in members(data, name)]
    assert len(set(listed)) == len(listed) == 120
    for name in EVALUATION:
        counts = np.bincount([data.classes.index(p.split("/")[0]) for p in members(data, name)])
        assert np.abs(counts - data.sizes[name] * np.array([40, 60, 20]) / 120).max() <= 2
    assert not cache.exists(), "nothing is decoded before it is asked for"


def test_the_seed_decides_the_splits_and_the_place_does_not(folder: Path, cache: Path) -> None:
    one = open_data(str(folder), SMALL, cache=cache)
    moved = folder.rename(folder.with_name("moved"))
    again = open_data(str(moved), SMALL, cache=cache)
    other = open_data(str(moved), SMALL, cache=cache, seed=1)
    assert again.fingerprint == one.fingerprint != other.fingerprint
    assert members(again, "search") == members(one, "search")
    assert set(members(other, "search")) != set(members(one, "search"))


def test_images_is_a_prefix_of_the_search_split_alone(folder: Path, cache: Path) -> None:
    whole = open_data(str(folder), SMALL, cache=cache)
    part = open_data(str(folder), SMALL, cache=cache, images=10)
    assert part.sizes == {**whole.sizes, "search": 10}
    assert members(part, "search") == members(whole, "search")[:10]
    assert part.fingerprint != whole.fingerprint
    np.testing.assert_array_equal(part.split("search").images, whole.split("search").images[:10])


# --- layouts


def test_val_is_found_and_train_beside_it_is_listed(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "set/val", {"a": 6, "b": 6})
    make_folder(tmp_path / "set/train", {"a": 3, "b": 4, "c": 1})
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.sizes == {"train": 8, "calibration": 2, "search": 2, "held-out": 8}
    assert data.classes == ("a", "b", "c"), "a head trained on train/ has a logit for c"
    assert open_data(str(tmp_path / "set/val"), SMALL, cache=cache) == replace(
        data, spec=str(tmp_path / "set/val")
    )
    data.split("calibration")
    assert len(decoded_folders(cache)) == 1, "train is not decoded unless asked for"
    assert sorted(data.split("train").labels) == [0, 0, 0, 1, 1, 1, 1, 2]


def test_val_is_preferred_to_test_and_test_is_used_without_it(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "set/test", {"a": 5, "b": 5})
    make_folder(tmp_path / "set/train", {"a": 1, "b": 1})
    assert sum(open_data(str(tmp_path / "set"), SMALL, cache=cache).sizes.values()) == 12
    make_folder(tmp_path / "set/validation", {"a": 15, "b": 15})
    assert sum(open_data(str(tmp_path / "set"), SMALL, cache=cache).sizes.values()) == 32
    make_folder(tmp_path / "set/val", {"a": 25, "b": 25})
    assert sum(open_data(str(tmp_path / "set"), SMALL, cache=cache).sizes.values()) == 52


def test_named_split_folders_are_used_as_they_are(tmp_path: Path, cache: Path) -> None:
    for i, name in enumerate(("calibration", "search", "held-out", "train")):
        make_folder(tmp_path / "set" / name, {"a": 2 + i, "b": 3}, seed=i)
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.sizes == {"train": 8, "calibration": 5, "search": 6, "held-out": 7}
    split = data.split("search")
    for pixels, label, path in zip(
        split.images, split.labels, members(data, "search"), strict=True
    ):
        with Image.open(tmp_path / "set/search" / path) as image:
            expected = SMALL.transform()(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, expected)
        assert data.classes[label] == path.split("/")[0]


def test_extensions_nesting_and_hidden_files(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "a" / "x", {"deep": 4}, suffix=".JPEG")
    make_folder(tmp_path / "a", {"y": 4}, suffix=".Webp")
    (tmp_path / "a/x/._000.jpg").write_bytes(b"resource fork")
    (tmp_path / "a/x/notes.txt").write_text("not an image")
    (tmp_path / "a/.cache").mkdir()
    data = open_data(str(tmp_path / "a"), SMALL, cache=cache)
    assert data.classes == ("x", "y")
    assert sum(data.sizes.values()) == 8
    assert {p for s in EVALUATION for p in members(data, s)} >= {"x/deep/000.JPEG", "y/000.Webp"}


def test_wordnet_folders_restrict_the_labels(tmp_path: Path, cache: Path) -> None:
    known = timm.data.ImageNetInfo("imagenet-1k").label_names()
    wanted = [known[i] for i in (980, 3, 217)]
    make_folder(tmp_path / "val", dict.fromkeys(wanted, 4))
    make_folder(tmp_path / "train", dict.fromkeys([*wanted, known[5]], 2))
    data = open_data(str(tmp_path), SMALL, cache=cache)
    assert data.head_indices == (3, 217, 980)
    assert data.classes == tuple(sorted(wanted))
    assert data.sizes["train"] == 6, "train images of other classes have no label here"
    assert check_head(1000, data) == (3, 217, 980)
    assert check_head(3, data) is None, "a head fine-tuned on just these classes"
    with pytest.raises(UserError, match=r"has 21843 classes and .* has 3: .* \(or an ImageNet"):
        check_head(21843, data)


def test_a_stranger_among_wordnet_folders_lifts_the_restriction(
    tmp_path: Path, cache: Path
) -> None:
    make_folder(tmp_path / "set", {"n01440764": 4, "n99999999": 4})
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.head_indices is None
    with pytest.raises(UserError, match="the model has 1000 classes and .* has 2: they must be"):
        check_head(1000, data)


def test_numbered_classes_warn_that_timm_orders_them_otherwise(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path / "set", {"1": 3, "2": 3, "10": 3})
    with caplog.at_level(logging.WARNING):
        data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.classes == ("1", "10", "2")
    assert "timm's reader has them in the order 1, 2, 10" in caplog.text


# --- decoding


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [((32, 32), 0.875, "bicubic"), ((24, 40), 1.0, "bilinear")],
)
def test_decoded_and_normalised_is_timms_own_evaluation_input(
    tmp_path: Path, cache: Path, crop_mode: str, size: tuple[int, int], crop_pct: float,
    interpolation: str,
) -> None:  # fmt: skip
    make_folder(tmp_path / "set", {"a": 5, "b": 5}, suffix=".jpg")
    Image.new("L", (50, 30), 77).save(tmp_path / "set/a/grey.png")
    Image.new("RGBA", (17, 90), (200, 10, 30, 128)).save(tmp_path / "set/b/alpha.png")
    Image.effect_noise((40, 40), 90).convert("P").save(
        tmp_path / "set/b/palette.png", transparency=b"\x00\x80\xff"
    )
    preprocess = Preprocess(
        (3, *size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, crop_pct, crop_mode
    )
    data = open_data(str(tmp_path / "set"), preprocess, cache=cache)
    usual = timm.data.create_transform(**{**preprocess.describe(), "is_training": False})
    for name in EVALUATION:
        images, _ = data.split(name).batch(0, data.sizes[name])
        assert images.dtype == torch.uint8
        for ours, path in zip(preprocess.normalise(images), members(data, name), strict=True):
            with Image.open(tmp_path / "set" / path) as image:
                # For a palette with transparency PIL asks for RGBA first; the RGB is the same.
                rgb = image.convert("RGBA").convert("RGB") if "palette" in path else None
                expected = usual(rgb or image.convert("RGB"))
            # One operation, a division, is done in another order: an ulp or two near |x| = 2.6.
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_normalise_casts_only_at_the_end_and_checks_its_input() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    exact = SMALL.normalise(images)
    torch.testing.assert_close(
        exact, ((images / 255 - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)).movedim(3, 1)
    )
    assert torch.equal(SMALL.normalise(images, torch.bfloat16), exact.bfloat16())
    assert exact.is_contiguous()
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\], got torch.uint8 \[1, 3, 16, 16\]"):
        SMALL.normalise(images.movedim(3, 1))


def test_preprocess_of_a_model_is_at_the_size_it_was_built_for() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=4, depth=1)
    preprocess = Preprocess.of(model)
    assert preprocess.input_size == (3, 32, 48)
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert preprocess.interpolation == "bicubic"
    assert Preprocess(**_tuples(json.loads(json.dumps(preprocess.describe())))) == preprocess
    with pytest.raises(UserError, match="takes 1 channels"):
        Preprocess.of(timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_r_s16_p8_224", 224), ("vit_small_resnet26d_224", 64), ("vitamin_small_224", 224)],
)
def test_a_convolutional_stem_is_asked_what_it_is_shown(name: str, size: int) -> None:
    """Its last layer takes the features of the stem (64, 2048), or is none."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
        grey = timm.create_model(name, img_size=size, in_chans=1)
    preprocess = Preprocess.of(model)
    assert preprocess.input_size == (3, size, size)
    assert model.patch_embed(torch.empty(1, *preprocess.input_size, device="meta")).ndim >= 3
    with pytest.raises(UserError, match="takes 1 channels: only RGB models are measured"):
        Preprocess.of(grey)


def _tuples(described: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}


def test_a_second_open_decodes_nothing(folder: Path, cache: Path) -> None:
    heard: list[tuple[int, int]] = []
    data = open_data(
        str(folder), SMALL, cache=cache, progress=lambda done, total: heard.append((done, total))
    )
    first = data.split("held-out")
    assert heard == [(64, 72), (72, 72)]
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
    with pytest.raises(ValueError, match="read-only"):
        split.images[0] = 0
    sent = pickle.dumps(split)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    np.testing.assert_array_equal(received.images, split.images)
    images, labels = received.batch(70, 72)
    assert (images.shape, labels.shape) == ((2, 16, 16, 3), (2,))
    images.zero_()  # a copy: the map is untouched
    assert received.images[70].any()
    with pytest.raises(ValueError, match="no images 70..73 in the 72 of 'held-out'"):
        received.batch(70, 73)


def test_data_pickles_without_its_callback(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache, progress=lambda *_: None)
    received = pickle.loads(pickle.dumps(data))
    assert received == data
    assert received.split("search").fingerprint == data.split("search").fingerprint


def test_relative_paths_hold_where_a_worker_runs_elsewhere(
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


def test_the_fill_of_a_border_is_part_of_the_pixels() -> None:
    border = replace(SMALL, crop_mode="border")
    assert border.pixels() != replace(border, mean=(0.0, 0.0, 0.0)).pixels()


def test_other_images_under_the_same_names_and_sizes_are_decoded_anew(
    tmp_path: Path, cache: Path
) -> None:
    old = make_folder(tmp_path / "old", {"a": 5, "b": 5}, seed=0, suffix=".bmp")
    new = make_folder(tmp_path / "new", {"a": 5, "b": 5}, seed=1, suffix=".bmp")
    first, second = (open_data(str(f), SMALL, cache=cache).split("search") for f in (old, new))
    assert not np.array_equal(first.images, second.images)


def test_a_file_cut_short_is_decoded_again(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    whole = np.array(data.split("search").images)
    file = data.split("search").folder / "images.npy"
    os.truncate(file, 500)
    (file.parent.parent / f"{file.parent.name}.tmp-1").mkdir()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(data.split("search").images, whole)
    assert caplog.text.count("removing an unfinished decode") == 2
    assert decoded_folders(cache) == [file.parent.name]


def test_worker_processes_decode_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    here = open_data(str(folder), SMALL, cache=tmp_path / "here", workers=0).split("held-out")
    heard: list[tuple[int, int]] = []
    there = open_data(
        str(folder), SMALL, cache=tmp_path / "there", workers=2,
        progress=lambda done, total: heard.append((done, total)),
    ).split("held-out")  # fmt: skip
    assert (here.folder / "images.npy").read_bytes() == (there.folder / "images.npy").read_bytes()
    assert (here.folder / "labels.npy").read_bytes() == (there.folder / "labels.npy").read_bytes()
    assert heard == [(64, 72), (72, 72)]
    assert there.fingerprint == here.fingerprint


LATECOMER = """
import hashlib, json, sys
from pathlib import Path
from vitpareto.search.data.datasets import Preprocess, open_data

folder, cache, fields = sys.argv[1:]
heard = []
data = open_data(folder, Preprocess(**json.loads(fields)), cache=Path(cache),
                 progress=lambda *done: heard.append(done))
print("ready", flush=True)
sys.stdin.readline()
split = data.split("held-out")
print(json.dumps([data.fingerprint, split.fingerprint, split.labels.tolist(),
                  hashlib.sha256(split.images.tobytes()).hexdigest(), heard]))
"""


def test_a_second_process_waits_for_the_first_and_agrees(folder: Path, cache: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LATECOMER, folder, cache, json.dumps(SMALL.describe())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as latecomer:  # fmt: skip
        assert latecomer.stdout is not None and latecomer.stdin is not None
        assert latecomer.stdout.readline() == "ready\n"
        heard: list[int] = []

        def half_way(done: int, total: int) -> None:
            assert latecomer.stdin is not None
            heard.append(done)
            if done < total:
                latecomer.stdin.write("\n")
                latecomer.stdin.flush()
                time.sleep(0.5)  # long enough to decode 72 images, were they not locked

        ours = open_data(str(folder), SMALL, cache=cache, progress=half_way)
        split = ours.split("held-out")
        theirs = json.loads(latecomer.communicate(timeout=60)[0])
    digest = hashlib.sha256(split.images.tobytes()).hexdigest()
    assert heard == [64, 72]
    assert theirs == [ours.fingerprint, split.fingerprint, split.labels.tolist(), digest, []]
    assert len(decoded_folders(cache)) == 1


def test_a_corrupt_image_is_counted_named_and_left_out(
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
    assert "2 of the 200 images of 'search' cannot be decoded" in caplog.text
    assert len(split) == len(split.images) == 198
    np.testing.assert_array_equal(split.images, expected[0])
    np.testing.assert_array_equal(split.labels, expected[1])
    index = json.loads((split.folder / "index.json").read_text())
    assert index["images"] == 198
    assert "UnidentifiedImageError" in index["corrupt"][0]["reason"]


def test_a_file_that_was_away_is_not_left_out_for_ever(
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
    monkeypatch.setattr(decode, "_decode_into", lambda *_: pytest.fail("decoded again"))
    assert data.split("search") == whole


def test_more_than_one_percent_corrupt_stops(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    broken = folder / members(data, "search")[5]
    broken.write_bytes(b"")
    with pytest.raises(UserError, match="more than 1% of the 24 images of 'search'") as caught:
        data.split("search")
    assert str(broken) in str(caught.value)
    assert decoded_folders(cache) == [], "nothing half done stays"


# --- CIFAR-10: the archive's format, 60 images of it


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "archive"
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> tuple[str, str]:
        (base / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    def images(count: int) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % 10 for i in range(count)]}

    names = [f"class {i}" for i in range(10)]
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", images(20))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", images(40))])
    name, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


def test_cifar10_divides_the_test_images_and_trains_on_the_others(
    cifar10: Path, cache: Path
) -> None:
    preprocess = replace(SMALL, input_size=(3, 32, 32), crop_pct=1.0)
    data = open_data(f"cifar10:{cifar10}", preprocess, cache=cache)
    assert data.sizes == {"train": 20, "calibration": 8, "search": 8, "held-out": 24}
    assert data.classes[3] == "class 3"
    assert data.head_indices is None
    assert check_head(10, data) is None
    test = CIFAR10(str(cifar10), train=False)
    known = {image.tobytes(): label for image, label in zip(test.data, test.targets, strict=True)}
    seen = [
        (bytes(image.tobytes()), int(label))
        for name in EVALUATION
        for image, label in zip(data.split(name).images, data.split(name).labels, strict=True)
    ]
    assert dict(seen) == known, "at 32 px and no crop the pixels are the archive's"
    assert len(seen) == 40
    train = {image.tobytes() for image in CIFAR10(str(cifar10), train=True).data}
    assert {image.tobytes() for image in data.split("train").images} == train
    inside = open_data(f"cifar10:{cifar10 / CIFAR10.base_folder}", preprocess, cache=cache)
    assert inside.fingerprint == data.fingerprint


def test_cifar10_that_cannot_be_downloaded_says_how_to_give_it(
    cifar10: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(UserError, match=r"no route to host.*give cifar10:ROOT") as caught:
        open_data("cifar10", SMALL, cache=cache)
    assert str(cache / "datasets") in str(caught.value)


# --- the embedded digits


def test_digits_bring_their_own_splits(cache: Path) -> None:
    preprocess = replace(
        SMALL, input_size=(3, embedded_images.SIZE, embedded_images.SIZE), crop_pct=1.0
    )
    data = open_data("digits", preprocess, cache=cache, images=30)
    assert data.sizes == {**embedded_images.SPLITS, "search": 30}
    assert data.classes == tuple(map(str, embedded_images.CLASSES))
    for name in ("search", "calibration"):
        images, labels = embedded_images.draw(name)
        split = data.split(name)
        assert len(split) == data.sizes[name]
        np.testing.assert_array_equal(split.images, np.asarray(images)[: len(split)])
        np.testing.assert_array_equal(split.labels, np.asarray(labels)[: len(split)])
    assert open_data("digits", preprocess, cache=cache).fingerprint != data.fingerprint


# --- bad input


def test_bad_folders_are_told_apart(tmp_path: Path, cache: Path) -> None:
    def message(path: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            open_data(str(path), SMALL, cache=cache)
        return str(caught.value)

    assert message(tmp_path / "nowhere") == f"no such folder: {tmp_path / 'nowhere'}"
    assert "did you mean 'cifar10'?" in message("cifra10")
    assert "did you mean 'digits'?" in message("digit")
    assert "unknown data 'flowers': accepted are" in message("flowers")
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty").endswith("is empty")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/1.png")
    assert "has no class folders" in message(tmp_path / "flat")
    assert "is a file" in message(tmp_path / "flat/1.png")
    (tmp_path / "hollow/a").mkdir(parents=True)
    assert "no images in" in message(tmp_path / "hollow")
    make_folder(tmp_path / "hollow", {"b": 5})
    assert "the class folder 'a'" in message(tmp_path / "hollow")
    make_folder(tmp_path / "single", {"only": 9})
    assert "has one class only, 'only'" in message(tmp_path / "single")
    make_folder(tmp_path / "tiny", {"a": 2, "b": 2})
    assert "at least 5 images, got 4" in message(tmp_path / "tiny")
    make_folder(tmp_path / "half/search", {"a": 2, "b": 2})
    assert "has no calibration/, held-out/" in message(tmp_path / "half")
    make_folder(tmp_path / "learn/train", {"a": 5, "b": 5})
    assert "holds only train/" in message(tmp_path / "learn")


def test_one_folder_under_two_split_names_is_refused(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "set/search", {"a": 5, "b": 5})
    make_folder(tmp_path / "set/calibration", {"a": 5, "b": 5})
    (tmp_path / "set/held-out").symlink_to(tmp_path / "set/search")
    with pytest.raises(UserError, match="one and the same"):
        open_data(str(tmp_path / "set"), SMALL, cache=cache)


def test_an_unreadable_folder(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def denied(path: Any) -> Any:  # chmod does not stop root, who runs the tests in containers
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"cannot read the folder .*cat: Permission denied"):
        open_data(str(folder), SMALL, cache=cache)


@pytest.mark.parametrize("images", [0, -3, 25])
def test_images_out_of_range(folder: Path, cache: Path, images: int) -> None:
    with pytest.raises(UserError, match=f"must be 1 to 24, the size of the search split: {images}"):
        open_data(str(folder), SMALL, cache=cache, images=images)


def test_an_unknown_split(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    with pytest.raises(UserError, match=r"no split 'held_out' \(did you mean 'held-out'\?\)"):
        data.split("held_out")
    with pytest.raises(UserError, match="put a train/ folder beside val/"):
        data.split("train")
    with pytest.raises(UserError, match="workers cannot be negative but got -1"):
        open_data(str(folder), SMALL, cache=cache, workers=-1)


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data = open_data(str(folder), SMALL, cache=tmp_path / "file")
    with pytest.raises(UserError, match="cannot write decoded images to the cache"):
        data.split("search")


def test_a_full_disk_is_noticed_before_decoding(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(decode.shutil.disk_usage("/"))(10**9, 10**9, 100)
    monkeypatch.setattr(decode.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB free: name a cache on a larger disk"):
        open_data(str(folder), SMALL, cache=cache).split("search")
    assert decoded_folders(cache) == []


def test_default_cache_respects_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "vitpareto"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().name == "vitpareto"
    assert default_cache().is_relative_to(Path.home())
