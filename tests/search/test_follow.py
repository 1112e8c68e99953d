"""What is followed is what the models did: the same pixels, groups, counts, figures, guesses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import methods
from methods import BadInput, Recipe
from search import embedded
from search.datasets import Preprocess
from search.evaluate import NonFiniteLogits
from search.follow import denormalised, follow, together
from tests.search import small

STAGED = {"keep_rate": 0.6, "prune_layers": [3, 6, 9]}


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, torch.Tensor]:
    pixels = embedded.draw("search")[0][:3]
    return pixels, embedded.normalise(pixels)


def test_pixels_groups_counts_and_guesses_are_the_models(drawn) -> None:
    pixels, images = drawn
    dense = embedded.build()
    pruned = methods.prune(dense, "topk", **STAGED)
    followed = follow(dense, pruned, images, names=["a", "b"], classes=embedded.CLASSES)
    with torch.inference_mode():
        logits, trace = pruned(images, trace=True)
        plain = dense(images)
    assert [image.name for image in followed.images] == ["a", "b", "image 2"]
    assert followed.grid == (8, 8) and followed.patch == (8, 8) and followed.stages() == [3, 6, 9]
    for i, image in enumerate(followed.images):
        assert np.array_equal(image.pixels, pixels[i])
        assert image.patches == (64,) * 3 + (38,) * 3 + (22,) * 3 + (13,) * 3
        assert np.array_equal(image.group, torch.stack([g[i] for g in trace.group]).numpy())
        assert (image.group[-1] >= 0).sum() == 13
        for guess, row in ((image.dense, plain[i]), (image.pruned, logits[i])):
            best = int(row.argmax())
            assert (guess.label, guess.name) == (best, embedded.CLASSES[best])
            assert guess.probability == pytest.approx(float(row.softmax(0)[best]), abs=1e-6)


def test_a_resized_model_is_followed_on_the_smaller_image(drawn) -> None:
    dense = embedded.build()
    recipe = Recipe.from_yaml(
        "{structure: {method: resize, size: 48}, tokens: {method: tome, r: 2}}"
    )
    followed = follow(dense, recipe.build(dense), drawn[1])
    assert followed.grid == (6, 6) and followed.patch == (8, 8)
    for image in followed.images:
        assert image.pixels.shape == (48, 48, 3) and image.group.shape == (12, 36)
        assert image.patches == tuple(range(34, 11, -2))
        # every patch is in one of the 12 groups that are left
        assert set(image.group[-1]) == set(range(12))
    # the same scene: the mean colour of the image as it was
    means = [image.pixels.mean(axis=(0, 1)) for image in followed.images]
    assert np.abs(means - drawn[0].mean(axis=(1, 2))).max() < 1


def test_images_decide_for_themselves_and_tell_their_figures(drawn) -> None:
    dense = embedded.build()
    pruned = methods.prune(dense, "rajni", gamma=0.1, min_tokens=8, budget="image")
    followed = follow(dense, pruned, drawn[1])
    assert len({image.patches for image in followed.images}) == 3
    for image in followed.images:
        for block, figures in enumerate(image.figures):
            assert set(figures) == {"rho", "eta", "keep_ratio"}
            before = image.patches[block - 1] if block else 64
            assert image.patches[block] == int(before * figures["keep_ratio"])


def test_what_changes_no_patch_has_no_stage(drawn) -> None:
    dense = embedded.build()
    followed = follow(dense, Recipe().build(dense), drawn[1])
    assert followed.stages() == [] and followed.images[0].patches == (64,) * 12
    assert all(image.dense == image.pruned for image in followed.images)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, "merged"),
        ({"tokens": {"method": "tome", "r": 2}}, "merged"),
        ({"tokens": {"method": "evit", **STAGED}}, "fused"),
        ({"tokens": {"method": "evit", **STAGED, "fuse": False}}, "merged"),
        ({"tokens": {"method": "patchmerger", "prune_layers": [2], "num_tokens": 9}}, "mixed"),
    ],
)
def test_what_a_token_of_several_patches_is(recipe, expected) -> None:
    assert together(Recipe.from_dict(recipe)) == expected


@pytest.mark.parametrize("mean_std", [((0.5,) * 3, (0.5,) * 3), ((0.48, 0.46, 0.41), (0.27,) * 3)])
def test_every_pixel_value_survives_normalisation_and_back(mean_std) -> None:
    preprocess = Preprocess((3, 16, 16), *mean_std, "bicubic", 1.0, "center")
    pixels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).repeat(1, 1, 3)
    image = preprocess.normalise(pixels[None])[0]
    assert np.array_equal(denormalised(image, preprocess), pixels.numpy())


def test_logits_that_are_no_numbers_are_named() -> None:
    dense = small.vit()
    images = small.images(2)
    images[1] = float("nan")
    with pytest.raises(NonFiniteLogits, match="non-finite logits for second"):
        follow(dense, Recipe().build(dense), images, names=["first", "second"])
    with pytest.raises(BadInput, match="no image"):
        follow(dense, Recipe().build(dense), images[:0])


def test_the_models_are_left_as_they_were(drawn) -> None:
    dense = embedded.build()
    pruned = methods.prune(dense, "topk", **STAGED)
    follow(dense, pruned, drawn[1])
    assert not pruned.patch_embed._forward_pre_hooks and not dense.patch_embed._forward_pre_hooks
