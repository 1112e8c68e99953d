"""Agreement with the methods' published implementations (tests/golden), in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from method_settings import recorded
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import methods

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
#: what METHODS asks for: the same formulas in another order of operations
OFF = 1e-6


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@cache
def model(name: str) -> tuple[nn.Module, Tensor]:
    """The golden model in float64 and its images."""
    arrays = {k: torch.from_numpy(v) for k, v in load(name).items()}
    images = arrays.pop("images")
    vit = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=12, num_heads=4, num_classes=10,
        qkv_bias="blocks.0.attn.qkv.bias" in arrays,
    )  # fmt: skip
    vit.load_state_dict(arrays)
    return vit.eval().double(), images.double()


def compare(said: Tensor, golden: np.ndarray, record_property) -> None:
    off = float((said - torch.from_numpy(golden)).abs().max())
    record_property("largest_difference", off)
    print(f"largest difference {off:.2e}")
    assert off < OFF


def test_dense(record_property):
    vit, images = model("vit_cls_nobias")
    said, _ = recorded(methods.prune(vit, "dense"), images)
    compare(said, load("tram")["dense_logits"], record_property)


@pytest.mark.parametrize("case", ["r4", "dec", "list"])
def test_tome(case, record_property):
    vit, images = model("vit_cls")
    golden = load("tome")
    params = json.loads(str(golden[f"cls_{case}_config"]))
    said, trace = recorded(methods.prune(vit, "tome", **params), images)
    compare(said, golden[f"cls_{case}_logits"], record_property)
    assert [t.tolist() for t in trace.tokens] == [
        [n] * len(images) for n in golden[f"cls_{case}_tokens"].tolist()
    ]


@pytest.mark.parametrize("case", ["g01", "g05", "g10"])
def test_rajni_by_image(case, record_property):
    """The golden images were run alone; here they share a padded batch."""
    vit, images = model("vit_cls")
    golden = load("rajni")
    params = json.loads(str(golden[f"{case}_config"]))
    said, trace = recorded(methods.prune(vit, "rajni", budget="image", **params), images)
    compare(said, golden[f"{case}_logits"], record_property)
    entering = torch.stack([torch.full_like(trace.tokens[0], 65), *trace.tokens[:-1]], dim=1)
    assert entering.tolist() == golden[f"{case}_tokens_in"].tolist()


@pytest.mark.parametrize("case", ["g01", "g05", "g10"])
def test_rajni_calibrated_on_one_image_is_that_images_budget(case, record_property):
    vit, images = model("vit_cls")
    golden = load("rajni")
    params = json.loads(str(golden[f"{case}_config"]))
    for i in range(len(images)):
        image = images[i : i + 1]
        pruned = methods.prune(vit, "rajni", calibration=image, **params)
        said, trace = recorded(pruned, image)
        compare(said, golden[f"{case}_logits"][i : i + 1], record_property)
        counts = [int(t) - 1 for t in trace.tokens]
        assert tuple(counts) == pruned.recipe.tokens.params["counts"]


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_topk(case, record_property):
    vit, images = model("vit_cls_nobias")
    golden = load("tram")
    counts = json.loads(str(golden["cases"]))[case]
    said, trace = recorded(methods.prune(vit, "topk", counts=counts), images)
    compare(said, golden[f"topk_{case}_logits"], record_property)
    assert [t.tolist() for t in trace.tokens] == [[n + 1] * len(images) for n in counts]
