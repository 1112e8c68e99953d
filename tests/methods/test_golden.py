"""Agreement with the methods' published implementations (tests/golden), in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.methods.method_settings import recorded
from vitpareto import methods
from vitpareto.methods.token.patchmerger import Merger

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
    kind = VisionTransformerDistilled if "dist_token" in arrays else VisionTransformer
    vit = kind(
        img_size=images.shape[-1], patch_size=8, embed_dim=48, depth=12, num_heads=4,
        num_classes=10, qkv_bias="blocks.0.attn.qkv.bias" in arrays,
    )  # fmt: skip
    vit.load_state_dict(arrays)
    return vit.eval().double(), images.double()


def compare(said: Tensor, golden: np.ndarray, record_property, limit: float = OFF) -> None:
    off = float((said - torch.from_numpy(golden)).abs().max())
    record_property("largest_difference", off)
    print(f"largest difference {off:.2e}")
    assert off < limit


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


@pytest.mark.parametrize("case", ["none", "a", "b"])
def test_ats(case, record_property):
    """The golden images were run alone; here they share a padded batch."""
    vit, images = model("vit_cls")
    golden = load("ats")
    params = json.loads(str(golden[f"{case}_config"]))
    said, trace = recorded(methods.prune(vit, "ats", **params), images)
    # its softmax is float32 with an epsilon: "none", without ATS, is off by 9e-5 too
    compare(said, golden[f"{case}_logits"], record_property, limit=1e-4)
    for block, tokens in enumerate(golden[f"{case}_tokens"].tolist()):
        if block in params["prune_layers"]:
            assert trace.tokens[block].tolist() == tokens
        else:
            assert tokens == [-1] * len(images)


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_ppt(case, record_property):
    vit, images = model("vit_cls")
    golden = load("ppt")
    params = json.loads(str(golden[f"cls_{case}_config"]))
    said, trace = recorded(methods.prune(vit, "ppt", **params), images)
    compare(said, golden[f"cls_{case}_logits"], record_property)
    assert [t.tolist() for t in trace.tokens] == [
        [n] * len(images) for n in golden[f"cls_{case}_tokens"].tolist()
    ]
    pooled = [trace.figures[block]["pooled"] for block in params["prune_layers"]]
    assert torch.stack(pooled, dim=1).bool().tolist() == golden[f"cls_{case}_pooled"].tolist()


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_tram(case, record_property):
    vit, images = model("vit_cls_nobias")
    golden = load("tram")
    counts = json.loads(str(golden["cases"]))[case]
    said, trace = recorded(methods.prune(vit, "tram", counts=counts), images)
    compare(said, golden[f"tram_{case}_logits"], record_property)
    for block, group in enumerate(trace.group):
        kept = [[patch for patch, place in enumerate(row) if place >= 0] for row in group.tolist()]
        assert kept == golden[f"tram_{case}_kept_{block}"].tolist()


@pytest.mark.parametrize("case", ["drop", "fuse", "fuse5"])
def test_evit(case, record_property):
    vit, images = model("vit_cls")
    golden = load("evit")
    params = json.loads(str(golden[f"{case}_config"]))
    said, trace = recorded(methods.prune(vit, "evit", **params), images)
    compare(said, golden[f"{case}_logits"], record_property)
    assert [t.tolist() for t in trace.tokens] == [
        [n] * len(images) for n in golden[f"{case}_tokens"].tolist()
    ]


def test_patchmerger(record_property):
    golden = {k: v for k, v in load("tram").items() if k.startswith("pm_")}
    merger = Merger(*golden["pm_queries"].T.shape).double()
    names = {"queries": "queries", "norm.weight": "norm_weight", "norm.bias": "norm_bias"}
    merger.load_state_dict({k: torch.from_numpy(golden[f"pm_{v}"]) for k, v in names.items()})
    with torch.no_grad():
        merged, weight = merger(torch.from_numpy(golden["pm_in"]))
    compare(merged, golden["pm_out"], record_property)
    assert weight.shape == (4, 16, 64)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(4, 16, dtype=weight.dtype))


def trained(vit: nn.Module, method: str, params: dict, parts: dict[str, Tensor]) -> nn.Module:
    """`vit` pruned by a method with trained parts: `parts` by their names below `reduction.`"""
    own = {f"reduction.{name}": part.double() for name, part in parts.items()}
    return methods.prune(vit, method, weights={**vit.state_dict(), **own}, **params)


def entering(trace: methods.Trace, dense: int) -> list[list[int]]:
    """Tokens entering each block, an image a row: all `dense` in block 0."""
    before = [torch.full_like(trace.tokens[0], dense), *trace.tokens[:-1]]
    return torch.stack(before, dim=1).tolist()


@pytest.mark.parametrize("case", ["single", "single_sim", "multi"])
@pytest.mark.parametrize("kind", ["cls", "dist"])
def test_tnt(kind, case, record_property):
    vit, images = model(f"vit_{kind}")
    golden = load("tnt")
    params = json.loads(str(golden[f"{kind}_{case}_config"]))
    parts = {}
    for block, weight in enumerate(torch.from_numpy(golden[f"{kind}_alpha_weight"])):
        parts |= {f"heads.{block}.weight": weight[None], f"heads.{block}.bias": torch.zeros(1)}
    said, trace = recorded(trained(vit, "tnt", params, parts), images)
    compare(said, golden[f"{kind}_{case}_logits"], record_property)
    tokens = golden[f"{kind}_{case}_tokens_in"].tolist()
    assert entering(trace, tokens[0]) == [tokens] * len(images)


def test_dynamicvit(record_property):
    vit, images = model("vit_196patches")
    golden = load("dynamicvit")
    parts = {
        f"predictors.{name.removeprefix('predictor:')}": torch.from_numpy(value)
        for name, value in golden.items()
        if name.startswith("predictor:")
    }
    params = json.loads(str(golden["config"]))
    said, trace = recorded(trained(vit, "dynamicvit", params, parts), images)
    compare(said, golden["logits"], record_property)
    assert entering(trace, 197) == [golden["tokens"].tolist()] * len(images)


@pytest.mark.parametrize(
    "name, file, key",
    [("vit_cls", "tnt", "cls_dense"), ("vit_dist", "tnt", "dist_dense"),
     ("vit_196patches", "dynamicvit", "dense")],
)  # fmt: skip
def test_the_golden_models_are_the_published_ones(name, file, key, record_property):
    vit, images = model(name)
    said, _ = recorded(methods.prune(vit, "dense"), images)
    compare(said, load(file)[key], record_property)
