"""Published checkpoints, as synthetic files in their layouts: logits before and after."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.refusals import refused
from tests.search.models.checkpoints import (
    DYNAMICVIT,
    EVIT,
    TNT,
    built,
    dynamicvit_state,
    logits,
    renamed,
    tnt_state,
    training_file,
)
from vitpareto import methods
from vitpareto.methods import Code, Recipe
from vitpareto.methods.engine.weights import weights_digest
from vitpareto.search.errors import UserError
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import load_model
from vitpareto.search.models.pretrained import read_pretrained
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.trials.single_measurement import measure_once

# --- token methods


@pytest.mark.parametrize(
    ("recipe", "layout", "rename", "mark"),
    [
        (TNT, "tnt", tnt_state, "alpha_heads.11.bias"),
        (DYNAMICVIT, "dynamicvit", dynamicvit_state, "score_predictor.2.out_conv.4.weight"),
    ],
    ids=["tnt", "dynamicvit"],
)
def test_a_trained_methods_checkpoint_has_the_model_and_its_parts(
    tmp_path: Path, digits: nn.Module, images: Tensor, recipe: Recipe, layout: str,
    rename: Callable[[nn.Module], dict[str, Tensor]], mark: str,
) -> None:  # fmt: skip
    torch.manual_seed(9)
    backbone = embedded_model.build(pretrained=False)
    model = built(backbone, recipe)
    state = rename(model)
    assert mark in state and not any(key.startswith("reduction.") for key in state)
    path = training_file(tmp_path / "published.pth", state)
    dense = load_model("digits", path)
    assert torch.equal(logits(dense, images), logits(backbone, images))
    found = read_pretrained(path)
    assert (found.layout, found.method, found.widths) == (layout, layout, None)
    weights = found.weights_for(recipe, dense)
    assert weights is not None and weights.keys() == model.state_dict().keys()
    again = recipe.build(dense, weights=weights)
    assert torch.equal(logits(again, images), logits(model, images))
    with pytest.warns(methods.Untrained):
        fresh = recipe.build(dense)
    assert not torch.equal(logits(fresh, images), logits(model, images)), "the parts decide"
    for other in (Recipe(), EVIT, Recipe.of("resize", size=48)):
        assert found.weights_for(other, dense) is None


def test_parts_load_with_another_setting_and_a_structural_step(
    tmp_path: Path, digits: nn.Module, images: Tensor
) -> None:
    """One training of TNT serves every setting, at every size."""
    path = training_file(tmp_path / "tnt.pth", tnt_state(built(digits, TNT)))
    found, dense = read_pretrained(path), load_model("digits", path)
    tokens = Recipe.of("tnt", prune_layers=[1], keep_rates=[0.5], similarity_prune=3).tokens
    both = Recipe(Recipe.of("resize", size=48).structure, tokens)
    weights = found.weights_for(both, dense)
    assert weights is not None
    model = both.build(dense, weights=weights)
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in found.parts.items())
    assert own["pos_embed"].shape[1] < dense.state_dict()["pos_embed"].shape[1]
    assert logits(model, images).isfinite().all()


def test_measuring_uses_model_and_parts_of_one_file(
    tmp_path: Path, digits: nn.Module, cache: Path
) -> None:
    """Fresh parts would warn, and a warning fails here."""
    model = built(digits, DYNAMICVIT)
    path = training_file(tmp_path / "d.pth", dynamicvit_state(model))
    config = SearchConfig.of({"weights": str(path), "images": 20, "cache": str(cache)})
    measured = measure_once(config, DYNAMICVIT)
    result, dense = measured.result, measured.dense
    assert result.resolved is not None
    assert result.resolved.weights == weights_digest(model.state_dict())
    assert (result.images, dense.recipe, dense.resolved) == (20, RecordedRecipe(), RecordedRecipe())
    topk = Recipe.of("topk", keep_rate=0.7, prune_layers=[3, 6, 9])
    result = measure_once(config, topk).result
    assert result.resolved == RecordedRecipe.of(topk), "the model alone"


def test_other_methods_parts_are_ignored_and_a_mismatch_is_refused(
    tmp_path: Path, digits: nn.Module
) -> None:
    path = training_file(tmp_path / "d.pth", dynamicvit_state(built(digits, DYNAMICVIT)))
    found = read_pretrained(path)
    assert found.weights_for(TNT, digits) is None
    two = Recipe.of("dynamicvit", prune_layers=[3, 6], keep_rates=[0.7, 0.49])
    with refused(Code.MISMATCH, UserError, path=str(path), recipe=str(two)) as caught:
        found.weights_for(two, digits)
    assert caught.value.details["unknown"][0] == "reduction.predictors.2.in_conv.0.bias"


def test_evits_checkpoint_has_timms_layout(tmp_path: Path, images: Tensor) -> None:
    """It trains no part of its own: model and method are two questions."""
    torch.manual_seed(4)
    model = embedded_model.build(pretrained=False).eval()
    path = training_file(tmp_path / "evit.pth", dict(model.state_dict()))
    found = read_pretrained(path)
    assert (found.layout, found.method, found.parts) == ("timm", None, {})
    dense = load_model("digits", path)
    assert torch.equal(logits(EVIT.build(dense), images), logits(EVIT.build(model), images))
    assert found.weights_for(EVIT, dense) is None


def test_a_trained_recipes_state_dict_is_read_back(
    tmp_path: Path, digits: nn.Module, images: Tensor
) -> None:
    """A trained recipe's complete state dict: the keys do not name the method, and need not."""
    merger = Recipe.of("patchmerger", prune_layers=[5], num_tokens=9)
    model = built(digits, merger)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "own.safetensors")
    found = read_pretrained(tmp_path / "own.safetensors")
    assert found.layout == "timm" and found.method is None
    dense = load_model("digits", tmp_path / "own.safetensors")
    weights = found.weights_for(merger, dense)
    assert weights is not None
    digest = weights_digest(weights)
    assert digest == weights_digest(model.state_dict())
    named = Recipe(tokens=merger.tokens, weights=digest)
    assert torch.equal(logits(named.build(dense, weights=weights), images), logits(model, images))
    assert found.weights_for(named, dense) is None, "it names what it takes"
    assert found.weights_for(TNT, dense) is None


def test_all_of_timms_parts_are_recognised(tmp_path: Path) -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, init_values=1e-5,
        reg_tokens=2, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True,
        final_norm=True, fc_norm=True, global_pool="map", mlp_layer=SwiGLU, num_classes=3,
    )  # fmt: skip
    model.get_submodule("blocks.0.attn").gate = nn.Linear(16, 16)
    own = model.state_dict()
    parts = {".".join(key.split(".")[:4]) for key in own}
    for part in ("ls1", "q_norm", "norm", "mlp.norm", "reg_token", "norm_pre", "attn_pool", "gate"):
        assert any(part in name for name in parts), part
    torch.save(own, tmp_path / "w.pth")
    assert read_pretrained(tmp_path / "w.pth").model.keys() == own.keys()


# --- wrapped, prefixed, and what is none of them


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "model_ema": {k: 0 * v for k, v in s.items()}},
        lambda s: {"model_ema": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: (
            {f"module.student.{k}": v for k, v in s.items()}
            | {f"module.teacher.{k}": v + 1 for k, v in s.items()}
        ),
        lambda s: s | {"teacher_model.fc.weight": torch.ones(3, 3)},
    ],
    ids=["bare", "state_dict", "model", "ema", "module", "compiled", "student", "teacher"],
)
def test_wrappers_prefixes_and_teachers_are_removed(
    tmp_path: Path, digits: nn.Module, images: Tensor, wrap: Callable[[Any], Any]
) -> None:
    model = built(digits, DYNAMICVIT)
    torch.save(wrap(dynamicvit_state(model)), tmp_path / "w.pth")
    found, dense = read_pretrained(tmp_path / "w.pth"), load_model("digits", tmp_path / "w.pth")
    assert found.layout == "dynamicvit"
    weights = found.weights_for(DYNAMICVIT, dense)
    again = DYNAMICVIT.build(dense, weights=weights)
    assert torch.equal(logits(again, images), logits(model, images))


def refused_keys(tmp_path: Path, state: dict[str, Tensor], code: Code) -> tuple[str, ...]:
    """The keys at fault."""
    torch.save({"model": state}, tmp_path / "w.pth")
    with refused(code, UserError, path=str(tmp_path / "w.pth")) as caught:
        read_pretrained(tmp_path / "w.pth")
    keys: tuple[str, ...] = caught.value.details["keys"]
    assert len(str(caught.value)) < 500, "not all of the keys"
    return keys


def test_an_unknown_layout_is_refused_with_its_first_keys(
    tmp_path: Path, digits: nn.Module
) -> None:
    names = {"blocks.": "encoder.layer.", "pos_embed": "embeddings.position_embeddings"}
    keys = refused_keys(tmp_path, renamed(digits, names), Code.UNSUPPORTED)
    assert keys[0] == "embeddings.position_embeddings" and keys[1].startswith("encoder.layer.0")
    with refused(Code.UNSUPPORTED, accepted=("tnt", "dynamicvit", "nvit", "timm")):
        read_pretrained(tmp_path / "w.pth")
    heads = renamed(built(digits, TNT), {"reduction.heads.": "alpha_head."})
    assert len(refused_keys(tmp_path, heads, Code.UNSUPPORTED)) == 24
    one = {**digits.state_dict(), "mask_token": torch.ones(1)}
    assert refused_keys(tmp_path, one, Code.UNSUPPORTED) == ("mask_token",)
    two = {**tnt_state(built(digits, TNT)), **dynamicvit_state(built(digits, DYNAMICVIT))}
    keys = refused_keys(tmp_path, two, Code.UNSUPPORTED)
    assert keys[0] == "score_predictor.0.in_conv.0.weight"


def test_missing_keys_of_a_known_layout_are_listed(tmp_path: Path, digits: nn.Module) -> None:
    state = tnt_state(built(digits, TNT))
    del state["alpha_heads.7.bias"], state["alpha_heads.9.weight"]
    keys = refused_keys(tmp_path, state, Code.MISSING)
    assert keys == ("alpha_heads.7.bias", "alpha_heads.9.weight")
    state = dynamicvit_state(built(digits, DYNAMICVIT))
    state = {k: v for k, v in state.items() if not k.startswith("score_predictor.1.out_conv")}
    keys = refused_keys(tmp_path, state, Code.MISSING)
    assert len(keys) == 6 and keys[0] == "score_predictor.1.out_conv.0.weight"


def test_settings_are_read_and_other_objects_are_refused(tmp_path: Path, digits: nn.Module) -> None:
    """Every script that came from DeiT's keeps its argparse.Namespace in the file."""
    path = training_file(tmp_path / "w.pth", dict(digits.state_dict()))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert read_pretrained(path).model.keys() == digits.state_dict().keys()
    training_file(path, dict(digits.state_dict()), loss=nn.CrossEntropyLoss())
    loss = "torch.nn.modules.loss.CrossEntropyLoss"
    with refused(Code.UNSUPPORTED, UserError, path=str(path), got=loss):
        read_pretrained(path)
