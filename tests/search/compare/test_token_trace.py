"""What is followed is what the models did: the same pixels, groups, counts, figures, guesses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.refusals import refused
from tests.search import small
from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.search.compare.token_trace import denormalised, merge_kind, trace_tokens
from vitpareto.search.data import embedded_images
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.measure.accuracy import NonFiniteLogits
from vitpareto.search.models import embedded_model

STAGED = {"keep_rate": 0.6, "prune_layers": [3, 6, 9]}


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, torch.Tensor]:
    pixels = embedded_images.draw("search")[0][:3]
    return pixels, embedded_images.normalise(pixels)


def test_pixels_groups_counts_and_guesses_are_the_models(drawn) -> None:
    pixels, images = drawn
    dense = embedded_model.build()
    pruned = methods.prune(dense, "topk", **STAGED)
    followed = trace_tokens(
        dense, pruned, images, names=["a", "b"], classes=embedded_images.CLASSES
    )
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
            assert (guess.label, guess.name) == (best, embedded_images.CLASSES[best])
            assert guess.probability == pytest.approx(float(row.softmax(0)[best]), abs=1e-6)


def test_a_resized_model_is_followed_on_the_smaller_image(drawn) -> None:
    dense = embedded_model.build()
    recipe = Recipe.from_yaml(
        "{structure: {method: resize, size: 48}, tokens: {method: tome, r: 2}}"
    )
    followed = trace_tokens(dense, recipe.build(dense), drawn[1])
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
    dense = embedded_model.build()
    pruned = methods.prune(dense, "rajni", gamma=0.1, min_tokens=8, budget="image")
    followed = trace_tokens(dense, pruned, drawn[1])
    assert len({image.patches for image in followed.images}) == 3
    for image in followed.images:
        for block, figures in enumerate(image.figures):
            assert set(figures) == {"rho", "eta", "keep_ratio"}
            before = image.patches[block - 1] if block else 64
            assert image.patches[block] == int(before * figures["keep_ratio"])


def direct_readings(model, image, group, score: str) -> list[tuple[float, float]]:
    """RAJNI's (rho, eta) at every block by METHODS.md's formulas, on timm's own blocks; group
    [depth, n0]: which patches are left after each block.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    left, out = torch.arange(x.shape[1] - 1), []
    for block, after in zip(model.blocks, group, strict=True):
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv[0].permute(1, 2, 0, 3)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        mean_attention, mean_value = attention.mean(dim=0), v.mean(dim=0)
        rho = 1 + mean_attention[0, 0] * mean_value[0].norm()
        if score == "jacobian":
            eta = sum(a[0, 1:] @ each[1:].norm(dim=1) for a, each in zip(attention, v, strict=True))
        else:
            length = (mean_value[1:] - mean_value[1:].mean(dim=0)).norm(dim=1)
            z = (length - length.mean()) / (length.std() + 1e-6)
            eta = (mean_attention[0, 1:] * z.clamp(min=0)).sum()
        out.append((float(rho), float(eta)))
        x = block(x)
        stays = after[left] >= 0
        x, left = torch.cat([x[:, :1], x[:, 1:][:, stays]], dim=1), left[stays]
    return out


@pytest.mark.parametrize("score", ["standardized", "jacobian"])
@torch.no_grad()
def test_rajnis_figures_are_its_formulas_calibrated_and_frozen(score: str) -> None:
    """And calibration's counts are those that their means over the images ask for."""
    model = copy.deepcopy(small.vit()).double()
    images = small.images(6).double()
    asked = {"gamma": 0.3, "min_tokens": 8, "score": score}
    calibrated = methods.prune(model, "rajni", calibration=images, **asked)
    counts = calibrated.recipe.tokens.params["counts"]
    frozen = methods.prune(model, "rajni", counts=counts, score=score)
    _, trace = calibrated(images, trace=True)
    direct = torch.tensor(
        [direct_readings(model, images[i], [g[i] for g in trace.group], score) for i in range(6)],
        dtype=torch.float64,
    )
    n, asked_for, before = 64, [], None
    for rho, eta in direct.mean(dim=0).tolist():
        if n > 8:
            if before is not None:
                ratio = min(max(rho * eta / (before + 1e-6), 0.25), 4.0) ** -0.3
                n = min(n, max(8, int(n * min(1.0, ratio))))
            before = eta
        asked_for.append(n)
    assert counts == tuple(asked_for) and len(set(counts)) > 4

    followed = trace_tokens(model, calibrated, images)
    dropping = [b for b, (a, n) in enumerate(zip((64, *counts), counts, strict=False)) if n < a]
    for made in (trace, frozen(images, trace=True)[1]):
        for block in range(12):
            if block not in dropping:
                assert made.figures[block] == {}
                continue
            found = made.figures[block]
            assert set(found) == {"rho", "eta", "keep_ratio"}
            torch.testing.assert_close(found["rho"], direct[:, block, 0], rtol=1e-9, atol=0)
            torch.testing.assert_close(found["eta"], direct[:, block, 1], rtol=1e-9, atol=0)
            ratio = counts[block] / counts[block - 1]
            assert found["keep_ratio"].tolist() == pytest.approx([ratio] * 6, rel=1e-12)
            for image, rho in zip(followed.images, found["rho"].tolist(), strict=True):
                assert image.figures[block]["rho"] == pytest.approx(rho, rel=1e-9)


@torch.no_grad()
def test_an_images_own_figures_are_the_same_in_every_batch() -> None:
    """Also of an image that is at its fewest patches while others of the batch are not."""
    model = copy.deepcopy(small.vit()).double()
    images = small.images(8).double()
    pruned = methods.prune(model, "rajni", gamma=0.5, min_tokens=24, budget="image")
    _, together_ = pruned(images, trace=True)
    alone = [pruned(image, trace=True)[1] for image in images.split(1)]
    mixed = 0
    for block, figures in enumerate(together_.figures):
        assert set(figures) == {"rho", "eta", "keep_ratio"}
        for name, values in figures.items():
            own = torch.cat([trace.figures[block][name] for trace in alone])
            torch.testing.assert_close(values, own, rtol=1e-9, atol=0, equal_nan=True)
        unread = figures["rho"].isnan()
        mixed += bool(unread.any()) and not bool(unread.all())
        before = together_.tokens[block - 1] - 1 if block else torch.full((8,), 64)
        assert torch.equal(unread, before <= 24)
    assert mixed > 0


def test_a_patch_fused_alone_is_followed(drawn) -> None:
    """Three times one patch of 64: the tokens stay 64, and its token is no patch any more."""
    layers = [2, 5, 8]
    dense = embedded_model.build()
    pruned = methods.prune(dense, "evit", keep_rate=63 / 64, prune_layers=layers)
    followed = trace_tokens(dense, pruned, drawn[1])
    assert followed.together == "fused"
    for image in followed.images:
        assert image.patches == (64,) * 12 and image.stages() == layers
        assert [f.get("fused", 0.0) for f in image.figures] == [
            float(block in layers) for block in range(12)
        ]
        fused = image.fused()
        assert np.array_equal(fused, image.joined("fused"))
        for block in range(12):
            done = sum(block >= layer for layer in layers)
            # a token that is fused once more brings no patch with it that was not in it
            assert min(done, 1) <= fused[block].sum() <= done
            assert block == 0 or (fused[block] >= fused[block - 1]).all()
            if done:
                assert fused[block, np.flatnonzero(image.group[block] == 63)].all()


def test_every_patch_that_left_its_place_for_the_fused_token_is_in_it(drawn) -> None:
    """Many at a time: what a slow walk through the groups says."""
    dense = embedded_model.build()
    pruned = methods.prune(dense, "evit", **STAGED)
    for image in trace_tokens(dense, pruned, drawn[1]).images:
        weighted: set[int] = set()
        for block in range(12):
            if block in STAGED["prune_layers"]:
                last = image.patches[block] - 1
                weighted |= {j for j in range(64) if image.group[block, j] == last}
            assert set(np.flatnonzero(image.fused()[block])) == weighted
        before = (64, *image.patches[:-1])
        for block in STAGED["prune_layers"]:
            kept = image.patches[block] - 1
            assert image.figures[block] == {"fused": before[block] - kept}
        assert len(weighted) > 20


def test_what_changes_no_patch_has_no_stage(drawn) -> None:
    dense = embedded_model.build()
    followed = trace_tokens(dense, Recipe().build(dense), drawn[1])
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
    assert merge_kind(Recipe.from_dict(recipe)) == expected


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
    with pytest.raises(NonFiniteLogits) as caught:
        trace_tokens(dense, Recipe().build(dense), images, names=["first", "second"])
    assert caught.value.image == "second"
    with refused("empty", name="images"):
        trace_tokens(dense, Recipe().build(dense), images[:0])


def test_the_models_are_left_as_they_were(drawn) -> None:
    dense = embedded_model.build()
    pruned = methods.prune(dense, "topk", **STAGED)
    trace_tokens(dense, pruned, drawn[1])
    assert not pruned.patch_embed._forward_pre_hooks and not dense.patch_embed._forward_pre_hooks
