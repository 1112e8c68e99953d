"""Decoded and normalised pixels equal timm's own evaluation input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from PIL import Image

from tests.refusals import refused
from tests.search.data.image_folders import (
    EVALUATION,
    SMALL,
    make_folder,
    members,
)
from vitpareto.methods import Code
from vitpareto.search.data.datasets import open_data
from vitpareto.search.data.preprocess import Preprocess


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [((32, 32), 0.875, "bicubic"), ((24, 40), 1.0, "bilinear")],
)
def test_decoded_and_normalised_images_equal_timms_evaluation_input(
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
    with refused("wrong-type", name="images", dtype="torch.uint8", shape=(1, 3, 16, 16)):
        SMALL.normalise(images.movedim(3, 1))


def test_preprocess_has_the_size_that_the_model_was_built_for() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=4, depth=1)
    preprocess = Preprocess.of(model)
    assert preprocess.input_size == (3, 32, 48)
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert preprocess.interpolation == "bicubic"
    assert Preprocess(**_tuples(json.loads(json.dumps(preprocess.describe())))) == preprocess
    with refused(Code.UNSUPPORTED, got=1):
        Preprocess.of(timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_r_s16_p8_224", 224), ("vit_small_resnet26d_224", 64), ("vitamin_small_224", 224)],
)
def test_channels_are_those_of_a_convolutional_stem(name: str, size: int) -> None:
    """Its last layer takes the features of the stem (64, 2048), or is none."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
        grey = timm.create_model(name, img_size=size, in_chans=1)
    preprocess = Preprocess.of(model)
    assert preprocess.input_size == (3, size, size)
    assert model.patch_embed(torch.empty(1, *preprocess.input_size, device="meta")).ndim >= 3
    with refused(Code.UNSUPPORTED, got=1):
        Preprocess.of(grey)


def _tuples(described: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}


def test_the_fill_of_a_border_is_part_of_the_pixels() -> None:
    border = replace(SMALL, crop_mode="border")
    assert border.pixels() != replace(border, mean=(0.0, 0.0, 0.0)).pixels()
