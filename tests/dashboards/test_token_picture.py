"""The token picture: pixels, outlines, texts and legend, without clipped or overlapping text."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from tests.refusals import refused
from vitpareto.dashboards.token_picture import COLUMNS, draw_patches, patches_figure
from vitpareto.dashboards.token_pixels import FUSED, OUTLINES, group_colours, outlines, pixels_after
from vitpareto.dashboards.token_rows import patch_rows, summary
from vitpareto.methods import Recipe, Untrained
from vitpareto.search.compare.token_trace import ImageTrace, Prediction, TokenTrace, trace_tokens
from vitpareto.search.data import embedded_images
from vitpareto.search.errors import Code, UserError
from vitpareto.search.models import embedded_model

pytestmark = pytest.mark.filterwarnings("error")

STAGED = {"keep_rate": 0.6, "prune_layers": [3, 6, 9]}
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"tokens": {"method": "topk", **STAGED}},
    "tome": {"tokens": {"method": "tome", "r": 4}},
    "rajni": {"tokens": {"method": "rajni", "gamma": 0.1, "min_tokens": 8, "budget": "image"}},
    "ppt": {"tokens": {"method": "ppt", "r": 14}},
    "ats": {"tokens": {"method": "ats"}},
    "evit": {"tokens": {"method": "evit", **STAGED}},
    "patchmerger": {"tokens": {"method": "patchmerger", "prune_layers": [2, 5], "num_tokens": 9}},
    "resize": {
        "structure": {"method": "resize", "size": 48},
        "tokens": {"method": "tome", "r": 2},
    },
}


@cache
def followed(name: str, images: int = 3) -> TokenTrace:
    """The trace of a recipe on the embedded model and its first images. Shared by tests."""
    dense = embedded_model.build()
    batch = embedded_images.normalise(embedded_images.draw("search")[0][:images])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)  # PatchMerger's
        pruned = Recipe.from_dict(RECIPES[name]).build(dense)
    return trace_tokens(dense, pruned, batch, model="digits", classes=embedded_images.CLASSES)


def by_hand(
    group: list[list[int]], together: str = "merged", fused: tuple[int, ...] = (), **more: Any
) -> TokenTrace:
    """An image of 2 x 3 patches of 4 x 2 pixels, one grey a patch, and what became of them in as
    many blocks as `group` has rows; fused: how many went into the fused token in each.
    """
    grey = np.arange(6).reshape(2, 3) * 40
    pixels = np.repeat(np.repeat(grey, 4, axis=0), 2, axis=1)[..., None].repeat(3, axis=2)
    image = ImageTrace(
        "cat.png",
        pixels.astype(np.uint8),
        tuple(len(set(row) - {-1}) for row in group),
        np.array(group),
        tuple({"fused": n} for n in fused) or tuple({} for _ in group),
        Prediction(3, "cat", 0.981),
        Prediction(5, "dog", 0.4),
        **more,
    )
    return TokenTrace("vit", Recipe(), (2, 3), (4, 2), together, (image,))  # type: ignore[arg-type]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def keys(figure: Figure) -> list[str]:
    return [" ".join(text.get_text().split()) for legend in figure.legends for text in legend.texts]


# ----------------------------------------------------------------------------------- the pixels


def test_pixels_of_kept_dropped_and_merged_patches() -> None:
    it = by_hand([[0, 1, 1, -1, 2, -1]])
    image = it.images[0]
    out = pixels_after(image, 0, it).reshape(2, 4, 3, 2, 3)
    plain = (image.pixels / 255).reshape(2, 4, 3, 2, 3)
    for row, column in ((0, 0), (1, 1)):
        assert np.array_equal(out[row, :, column], plain[row, :, column])
    for row, column in ((1, 0), (1, 2)):
        assert (out[row, :, column] > 0.85).all() and (out[row, :, column] < 1).all()
    assert out[0, :, 1:] == pytest.approx(60 / 255)  # of 40 and 80
    # what was there can still be made out
    assert out[1, :, 2].mean() > out[1, :, 0].mean()


def test_fused_patches_are_tinted_in_one_colour() -> None:
    it = by_hand([[0, 1, 2, 3, 3, 3]], "fused", (3,))
    out = pixels_after(it.images[0], 0, it)
    plain = it.images[0].pixels / 255
    assert np.array_equal(out[:4], plain[:4])
    assert (np.abs(out[4:] - FUSED) < 0.35 * np.abs(plain[4:] - FUSED) + 1e-9).all()


def test_a_single_fused_patch_stays_tinted_and_counted() -> None:
    """The last patch, whose group does not tell; then another, and the first stays in its token."""
    it = by_hand([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 5, 2, 3, 4]], "fused", (1, 0, 1))
    (image,) = it.images
    assert image.patches == (6, 6, 6) and image.stages() == [0, 2]
    plain = image.pixels / 255
    for block, patches in ((0, {5}), (1, {5}), (2, {2, 5})):
        out = pixels_after(image, block, it).reshape(2, 4, 3, 2, 3)
        changed = (out != plain.reshape(2, 4, 3, 2, 3)).any(axis=(1, 3, 4)).ravel()
        assert set(np.flatnonzero(changed)) == patches
        colours = group_colours(image, "fused")[block]
        assert set(np.flatnonzero(colours.any(axis=1))) == patches
        assert len(outlines(image, block, colours, it, 0.5)[0]) == 4 * len(patches)
    (row,) = patch_rows(it)
    blocks = row.to_json()["blocks"]
    assert [(b["patches"], b["dropped"], b["fused"]) for b in blocks] == [
        (6, 0, 1), (6, 0, 1), (6, 0, 2),
    ]  # fmt: skip
    assert [b.figures["fused"] for b in row.blocks] == [1, 0, 1]
    (key,) = keys(patches_figure(it))
    assert key.startswith("fused: dropped patches that are summed")


def test_mixed_patches_are_all_in_groups() -> None:
    image = by_hand([[0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 3, 3], [-1] * 6]).images[0]
    assert image.joined("mixed").tolist() == [[False] * 6, [True] * 6, [False] * 6]
    assert image.joined("merged").tolist() == [
        [False] * 6, [False, True, True, False, True, True], [False] * 6,
    ]  # fmt: skip


def test_pixels_beyond_the_last_whole_patch_are_left_out() -> None:
    it = by_hand([[0, 1, 2, 3, 4, 5]])
    wider = np.pad(it.images[0].pixels, ((0, 1), (0, 1), (0, 0)))
    image = replace(it.images[0], pixels=wider)
    assert np.array_equal(pixels_after(image, 0, it), it.images[0].pixels / 255)


# --------------------------------------------------------------------------------- the outlines


def outlined(it: TokenTrace) -> tuple[np.ndarray, np.ndarray]:
    """The first image's outlines after its first block, half a pixel inside."""
    image = it.images[0]
    return outlines(image, 0, group_colours(image, it.together)[0], it, inset=0.5)


def test_outlines_surround_a_group_inside_its_patches() -> None:
    # an L of three patches; the others are alone
    segments, colours = outlined(by_hand([[0, 1, 1, 2, 3, 1]]))
    assert len(np.unique(colours, axis=0)) == 1
    lengths = np.abs(segments[:, 1] - segments[:, 0]).sum(axis=1)
    assert sorted(lengths) == [2, 2, 2, 2, 4, 4, 4, 4]
    assert segments[..., 0].min() == 2 and segments[..., 0].max() == 6
    across = segments[segments[:, 0, 1] == segments[:, 1, 1]][:, 0, 1]
    assert sorted(across) == [0.5, 0.5, 3.5, 7.5]
    down = segments[segments[:, 0, 0] == segments[:, 1, 0]][:, 0, 0]
    assert sorted(down) == [2.5, 4.5, 5.5, 5.5]


def test_groups_of_separated_patches_have_one_colour() -> None:
    segments, colours = outlined(by_hand([[0, 1, 0, 1, 2, 2]]))
    assert len(np.unique(colours, axis=0)) == 3
    upper = segments[:, :, 1].max(axis=1) <= 4
    left, right = (segments[:, :, 0].max(axis=1) <= 2), (segments[:, :, 0].min(axis=1) >= 4)
    assert np.array_equal(
        np.unique(colours[upper & left], axis=0), np.unique(colours[upper & right], axis=0)
    )


def test_a_group_keeps_its_colour_until_it_is_dropped() -> None:
    rows = [[0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0],
            [-1, -1, 0, 0, -1, -1]]  # fmt: skip
    first, second, third, fourth, last = group_colours(by_hand(rows).images[0], "merged")
    assert not first[4:].any() and not second[5].any()  # alone
    assert np.array_equal(second[4], first[2]) and not np.array_equal(first[0], first[2])
    assert np.array_equal(third[:5], np.tile(first[0], (5, 1)))
    assert np.array_equal(fourth, np.tile(first[0], (6, 1)))
    assert np.array_equal(last[2], first[0]), "free again: the one who had it is dropped"
    fused = group_colours(by_hand(rows, fused=(1, 1, 1, 1, 0)).images[0], "fused")
    assert np.array_equal(fused[3], np.tile(FUSED, (6, 1)))


def test_colours_differ_and_are_shared_evenly() -> None:
    n = len(OUTLINES)
    apart = np.abs(OUTLINES[:, None] - OUTLINES[None, :]).sum(axis=2) + 9 * np.eye(n)
    assert apart.min() > 0.25
    # 2 n + 3 groups of two patches each
    group = np.tile(np.arange(2 * n + 3), 2)
    image = replace(by_hand([[0] * 6]).images[0], group=group[None])
    (colours,) = group_colours(image, "merged")
    _, counts = np.unique(colours[: 2 * n + 3], axis=0, return_counts=True)
    assert sorted(counts) == [2] * (n - 3) + [3] * 3
    assert np.array_equal(colours[: 2 * n + 3], colours[2 * n + 3 :])


# ---------------------------------------------------------------------------------- the figure


def test_there_is_a_column_for_the_input_and_each_stage() -> None:
    figure = patches_figure(followed("topk"))
    assert len(figure.axes) == 3 * 4
    titles = ["input", *(f"block {b}: {n} of 64 ({p} %)"
                         for b, n, p in ((3, 38, 59), (6, 22, 34), (9, 13, 20)))]  # fmt: skip
    assert [t for t in texts(figure) if t in titles] == titles  # once: it holds for all rows
    assert texts(figure)[0] == "topk keep_rate=0.6 prune_layers=[3,6,9] on digits"
    assert keys(figure) == ["dropped"]
    # each row is its own image
    shown = [axes.get_images()[0].get_array() for axes in figure.axes[::4]]
    for array, pixels in zip(shown, embedded_images.draw("search")[0], strict=False):
        assert np.array_equal(array, pixels / 255)


def test_of_many_stages_evenly_spaced_ones_are_drawn() -> None:
    figure = patches_figure(followed("tome"))
    assert len(figure.axes) == 3 * (COLUMNS + 1)
    titles = [t for t in texts(figure) if t.startswith("block ")]
    blocks = [int(t.split()[1].rstrip(":")) for t in titles]
    assert len(blocks) == COLUMNS and blocks[0] == 0
    assert titles[-1] == "block 11: 16 of 64 (25 %)"
    assert set(np.diff(blocks)) == {1, 2}
    assert "8 of the 12 blocks" in texts(figure)[-1]
    assert keys(figure) == ["merged: each group is filled with its mean and outlined in one colour"]


def test_adaptive_recipes_have_titles_and_figures_per_image() -> None:
    it = followed("rajni")
    figure = patches_figure(it)
    block = it.stages()[-1]
    for image in it.images:
        n, said = image.patches[block], image.figures[block]
        assert f"block {block}: {n} of 64 ({100 * n / 64:.0f} %)" in texts(figure)
        line = f"ρ {said['rho']:.3g}  η {said['eta']:.3g}  keep_ratio {said['keep_ratio']:.3g}"
        assert line in [" ".join(t.split("\n")) for t in texts(figure)]
    assert texts(figure).count("input") == 3


def test_figures_that_are_not_finite_are_left_out() -> None:
    it = by_hand([[0, 1, 1, -1, 2, 3]])
    figures = ({"rho": float("nan"), "eta": 0.25, "keep_ratio": float("nan")},)
    figure = patches_figure(replace(it, images=(replace(it.images[0], figures=figures),)))
    assert "η 0.25" in texts(figure) and not [t for t in texts(figure) if "nan" in t]


def test_a_resized_image_is_drawn_resized() -> None:
    figure = patches_figure(followed("resize"))
    assert figure.axes[0].get_images()[0].get_array().shape == (48, 48, 3)
    assert "block 11: 12 of 36 (33 %)" in texts(figure)


def test_the_legend_explains_what_is_drawn() -> None:
    assert keys(patches_figure(followed("ppt")))[1] == "dropped"
    (fused,) = keys(patches_figure(followed("evit")))
    assert fused.startswith("fused: dropped patches that are summed")
    (mixed,) = keys(patches_figure(followed("patchmerger")))
    assert mixed.startswith("mixed: each token is a mixture of all patches")
    figure = patches_figure(followed("dense"))
    assert keys(figure) == [] and "All patches are kept in all blocks." in texts(figure)
    assert "block 11: 64 of 64 (100 %)" in texts(figure)


def test_outlines_are_drawn_where_patches_merged() -> None:
    figure = patches_figure(followed("tome"))
    lines = [
        sum(isinstance(c, LineCollection) and len(c.get_paths()) > 0 for c in axes.collections)
        for axes in figure.axes
    ]
    assert lines == ([0] + [1] * COLUMNS) * 3


@pytest.mark.parametrize("name", RECIPES)
def test_no_text_is_clipped_or_lies_on_another(name: str) -> None:
    assert_tidy(patches_figure(followed(name)))


def test_long_texts_and_odd_shapes_fit() -> None:
    it = by_hand([[0, 0, 0, 0, 0, -1]], truth="cat" * 20)
    wordy = replace(
        it,
        recipe=Recipe.from_dict({"tokens": {"method": "tome", "r": list(range(60))}}),
        notes=("a note that is as long as notes are, and then some: " * 6,),
        images=(replace(it.images[0], figures=({"$a_b$": 1.0, "significance": 2.5, "c" * 30: 1},)),)
        * 2,
    )
    figure = patches_figure(wordy)
    assert_tidy(figure)
    tall = replace(it.images[0], pixels=np.zeros((80, 6, 3), dtype=np.uint8))
    assert_tidy(patches_figure(replace(it, patch=(40, 2), images=(tall,))))


def assert_tidy(figure: Figure) -> None:
    """Everything lies in the figure, and no text on another text or on an image."""
    figure.canvas.draw()
    outer = figure.bbox.padded(1)
    boxes: list[tuple[str, Bbox]] = [
        (text.get_text(), text.get_window_extent())
        for text in [*figure.texts, *(t for legend in figure.legends for t in legend.texts)]
        if text.get_text()
    ]
    images = [(axes.get_label(), axes.get_window_extent()) for axes in figure.axes]
    for name, box in boxes + images:
        assert outer.x0 <= box.x0 and box.x1 <= outer.x1, f"{name} is clipped: {box}, {outer}"
        assert outer.y0 <= box.y0 and box.y1 <= outer.y1, f"{name} is clipped: {box}, {outer}"
    for (a, one), (b, other) in itertools.combinations(boxes + images, 2):
        assert not one.padded(-0.5).overlaps(other.padded(-0.5)), f"{a!r} lies on {b!r}"


# --------------------------------------------------------------------------- rows and the file


def test_rows_count_dropped_and_merged_patches() -> None:
    it = by_hand([[0, 1, 1, -1, 2, 3], [0, 0, 0, -1, -1, 1]], truth="cat")
    nan = replace(it.images[0], figures=({"variance": float("nan")}, {"pooled": 1.0}))
    row = patch_rows(replace(it, images=(nan,)))[0].to_json()
    assert row["blocks"] == [
        {"block": 0, "patches": 4, "dropped": 1, "merged": 2, "figures": {"variance": None}},
        {"block": 1, "patches": 2, "dropped": 2, "merged": 3, "figures": {"pooled": 1.0}},
    ]
    assert row["dense"] == {"label": 3, "name": "cat", "probability": 0.981}
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert summary(it.images[0]) == "cat.png (truth: cat)   dense: cat (98 %) → pruned: dog (40 %)"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (draw_patches(followed("tome"), tmp_path / f"{i}.PNG") for i in range(2))
    assert one.read_bytes() == two.read_bytes()
    pixels = matplotlib.image.imread(one, format="png")
    assert pixels.shape[1] > 2000 and pixels[..., :3].std() > 0.1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("show.svg", Code.OUT_OF_RANGE),
        ("show", Code.OUT_OF_RANGE),
        ("nowhere/show.png", Code.NOT_FOUND),
    ],
)
def test_other_files_are_refused(name: str, code: Code, tmp_path: Path) -> None:
    with refused(code, UserError):
        draw_patches(followed("topk"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_global_matplotlib_state() -> None:
    module = "vitpareto.dashboards.token_picture"
    code = f"import sys, {module}; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
