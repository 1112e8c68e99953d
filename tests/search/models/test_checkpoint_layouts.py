"""Published checkpoints, as synthetic files in their key layouts: our own models renamed, and the
logits before and after. What NViT's names mean is computed here a second time.
"""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code, Recipe
from vitpareto.methods.engine.weights import weights_digest
from vitpareto.methods.slicing.sliced_model import (
    BlockWidths,
    Widths,
    model_widths,
    sliced_model,
    widths_of,
)
from vitpareto.search.errors import UserError
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import load_model
from vitpareto.search.models.pretrained import read_pretrained
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.single_measurement import measure_once

TNT = Recipe.of("tnt", prune_layers=[2, 4], keep_rates=[0.7, 0.7], similarity_prune=6)
DYNAMICVIT = Recipe.of("dynamicvit", prune_layers=[3, 6, 9], keep_rates=[0.7, 0.49, 0.343])
EVIT = Recipe.of("evit", keep_rate=0.7, prune_layers=[3, 6, 9])


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return embedded_model.build()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def wide_images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def built(dense: nn.Module, recipe: Recipe, seed: int = 3) -> nn.Module:
    """The recipe with parts that are noise, so that a part left fresh would be seen."""
    torch.manual_seed(seed)
    with pytest.warns(methods.Untrained):
        model = recipe.build(dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("reduction."):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def renamed(model: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """The state dict with the beginnings of its names exchanged."""
    state = {}
    for key, value in model.state_dict().items():
        start = next((old for old in names if key.startswith(old)), "")
        state[names.get(start, "") + key[len(start) :]] = value.clone()
    return state


def training_file(path: Path, state: dict[str, Tensor], **beside: Any) -> Path:
    """As DeiT's script and its heirs write one: everything that training goes on from."""
    arguments = argparse.Namespace(model="deit", lr=5e-4, output_dir="logs", dist_eval=True)
    scaled = {key: value * 0.5 for key, value in state.items()}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=1e-3)
    torch.save(
        {"model": OrderedDict(state), "optimizer": optimizer.state_dict(), "epoch": 29,
         "lr_scheduler": {"base_values": [1e-3], "noise_pct": 0.67}, "scaler": {"scale": 65536.0},
         "model_ema": OrderedDict(scaled), "args": arguments, **beside},
        path,
    )  # fmt: skip
    return path


def tnt_state(model: nn.Module) -> dict[str, Tensor]:
    dim = model.state_dict()["norm.weight"].shape[0]
    norm = {f"alpha_norm.{end}": torch.randn(dim) for end in ("weight", "bias")}
    return {**renamed(model, {"reduction.heads.": "alpha_heads."}), **norm}


def dynamicvit_state(model: nn.Module) -> dict[str, Tensor]:
    return renamed(model, {"reduction.predictors.": "score_predictor."})


# --- token methods


@pytest.mark.parametrize(
    ("recipe", "layout", "rename", "mark"),
    [
        (TNT, "tnt", tnt_state, "alpha_heads.11.bias"),
        (DYNAMICVIT, "dynamicvit", dynamicvit_state, "score_predictor.2.out_conv.4.weight"),
    ],
    ids=["tnt", "dynamicvit"],
)
def test_a_trained_methods_file_gives_the_model_and_with_the_recipe_its_parts(
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


def test_the_parts_go_with_another_setting_and_a_structural_step(
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


def test_measure_takes_model_and_parts_from_one_file(
    tmp_path: Path, digits: nn.Module, cache: Path
) -> None:
    """Fresh parts would warn, and a warning fails here."""
    model = built(digits, DYNAMICVIT)
    path = training_file(tmp_path / "d.pth", dynamicvit_state(model))
    config = SearchConfig.of({"weights": str(path), "images": 20, "cache": str(cache)})
    measured = measure_once(config, DYNAMICVIT)
    result, dense = measured.result, measured.dense
    assert result.resolved is not None
    assert result.resolved["weights"] == weights_digest(model.state_dict())
    assert (result.images, dense.recipe, dense.resolved) == (20, {}, {})
    topk = Recipe.of("topk", keep_rate=0.7, prune_layers=[3, 6, 9])
    result = measure_once(config, topk).result
    assert result.resolved == topk.to_dict(), "the model alone"


def test_another_methods_parts_are_not_taken_and_a_setting_that_does_not_fit_is_told(
    tmp_path: Path, digits: nn.Module
) -> None:
    path = training_file(tmp_path / "d.pth", dynamicvit_state(built(digits, DYNAMICVIT)))
    found = read_pretrained(path)
    assert found.weights_for(TNT, digits) is None
    two = Recipe.of("dynamicvit", prune_layers=[3, 6], keep_rates=[0.7, 0.49])
    with pytest.raises(UserError, match="reduction.predictors.2.in_conv.0.bias") as caught:
        found.weights_for(two, digits)
    assert caught.value.details["path"] == str(path)
    assert "dynamicvit prune_layers=[3,6]" in str(caught.value), "the recipe"


def test_evits_file_is_timms(tmp_path: Path, images: Tensor) -> None:
    """It trains no part of its own: model and method are two questions."""
    torch.manual_seed(4)
    model = embedded_model.build(pretrained=False).eval()
    path = training_file(tmp_path / "evit.pth", dict(model.state_dict()))
    found = read_pretrained(path)
    assert (found.layout, found.method, found.parts) == ("timm", None, {})
    dense = load_model("digits", path)
    assert torch.equal(logits(EVIT.build(dense), images), logits(EVIT.build(model), images))
    assert found.weights_for(EVIT, dense) is None


def test_what_this_project_wrote_is_read_back(
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


def test_every_part_that_timm_has_is_timms(tmp_path: Path) -> None:
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


# --- NViT

WIDTHS = Widths(
    96,
    tuple(
        BlockWidths(heads=1 + i % 3, qk=24 + 8 * (i % 2), v=40 - 8 * (i % 3), mlp=160 + 16 * i)
        for i in range(12)
    ),
)
NAME = "deit_tiny_distilled_patch16_224"


@pytest.fixture(scope="module")
def cut() -> nn.Module:
    """A distilled DeiT-T, sliced to `WIDTHS` and filled with noise."""
    draw = torch.Generator().manual_seed(8)
    model = sliced_model(timm.create_model(NAME, num_classes=7), WIDTHS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.copy_((1 if "norm" in name and name.endswith("weight") else 0) + 0.2 * noise)
            if p.dim() > 1 and "token" not in name and name != "pos_embed":
                p.copy_(noise / p[0].numel() ** 0.5)
    return model.eval()


def nvit_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, dim) in NViT's layout."""
    widths, state = model_widths(model), OrderedDict()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    for index, block in enumerate(widths.blocks):
        at = f"blocks.{index}.attn."
        rows = [block.heads * block.qk] * 2 + [block.heads * block.v]
        del own[f"{at}widths"]
        state[f"{at}qkv.token_mask"] = torch.ones(198, 1)
        for end in ("weight", "bias"):
            for x, part in zip("QKV", own.pop(f"{at}qkv.{end}").split(rows), strict=True):
                factor = 64**0.5 / block.qk**0.5 if x == "Q" else 1.0
                state[f"{at}qkv.{x}.{end}"] = part * factor
            state[f"{at}proj.proj.{end}"] = own.pop(f"{at}proj.{end}")
    stem = own.pop("patch_embed.proj.weight").permute(0, 2, 3, 1)
    state["patch_embed.proj.weight"] = stem.reshape(len(stem), -1, 1, 1)
    parts = {"head": "heads", "QK": "qk", "V": "v", "MLP": "mlp"}
    dim = {key: [getattr(b, part) for b in widths.blocks] for key, part in parts.items()}
    return {**own, **state}, {"EMB": widths.embedding, **dim}


def nvit_logits(state: dict[str, Tensor], dim: dict[str, Any], images: Tensor) -> Tensor:
    """What NViT's published evaluation computes from its weights, from their names alone."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps=1e-6)

    batch = len(images)
    # every patch as one vector: pixels row by row, the three channels of each side by side
    tiles = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1)
    stem = state["patch_embed.proj.weight"].flatten(1)
    x = F.linear(tiles.reshape(batch, 196, 768), stem, state["patch_embed.proj.bias"])
    tokens = [state[name].expand(batch, -1, -1) for name in ("cls_token", "dist_token")]
    x = torch.cat([*tokens, x], dim=1) + state["pos_embed"]
    for block, heads in enumerate(dim["head"]):
        at = f"blocks.{block}."
        y = norm(x, f"{at}norm1")
        q, k, v = (
            (linear(y, f"{at}attn.qkv.{name}") * state[f"{at}attn.qkv.token_mask"])
            .reshape(batch, 198, heads, -1)
            .transpose(1, 2)
            for name in "QKV"
        )
        mixed = (q @ k.transpose(-1, -2) * 64**-0.5).softmax(dim=-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{at}attn.proj.proj")
        hidden = F.gelu(linear(norm(x, f"{at}norm2"), f"{at}mlp.fc1"))
        x = x + linear(hidden, f"{at}mlp.fc2")
    x = norm(x, "norm")
    return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2


def test_nvits_file_makes_the_sliced_model(
    tmp_path: Path, cut: nn.Module, wide_images: Tensor
) -> None:
    state, dim = nvit_state(cut)
    path = training_file(tmp_path / "ft_checkpoint.pth", state, dim=dim)
    model = load_model(NAME, path)
    assert model_widths(model) == WIDTHS and isinstance(model, VisionTransformer)
    found, expected = logits(model, wide_images), logits(cut, wide_images)
    # folding the scale into q and out of it again rounds twice
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.std().item())
    double = {key: value.double() for key, value in state.items()}
    again = logits(copy.deepcopy(model).double(), wide_images.double())
    wanted = nvit_logits(double, dim, wide_images.double())
    # the model's own weights are float32's: the folded ones among them are rounded once
    torch.testing.assert_close(again, wanted, rtol=0, atol=2e-6 * wanted.std().item())
    assert wanted.std() > 0.3, "logits that differ, not all alike"


def test_nvits_model_is_pruned_further_and_kept_like_any(
    tmp_path: Path, cut: nn.Module, wide_images: Tensor
) -> None:
    state, dim = nvit_state(cut)
    model = load_model(NAME, training_file(tmp_path / "nvit.pth", state, dim=dim))
    pruned = methods.prune(model, "topk", keep_rate=0.7, prune_layers=[3, 6, 9])
    assert logits(pruned, wide_images).isfinite().all()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "kept.safetensors")
    kept = load_model(NAME, tmp_path / "kept.safetensors")
    assert torch.equal(logits(kept, wide_images), logits(model, wide_images))
    assert widths_of(kept.state_dict()) == WIDTHS
    with pytest.raises(UserError, match="12 blocks.* 14") as caught:
        load_model("vit_wee_patch16_reg1_gap_256", tmp_path / "nvit.pth")
    assert caught.value.details["path"] == str(tmp_path / "nvit.pth")


def drop(state: dict[str, Tensor], dim: dict[str, Any], key: str) -> None:
    del state[key]


def three_dimensional(state: dict[str, Tensor], dim: dict[str, Any], key: str) -> None:
    state[key] = state[key][:, :, None]


def weigh_a_token(state: dict[str, Tensor], dim: dict[str, Any], key: str) -> None:
    state[key][17] = 0.75


def drop_heads(state: dict[str, Tensor], dim: dict[str, Any], key: str) -> None:
    del dim["head"]


def more_heads(state: dict[str, Tensor], dim: dict[str, Any], key: str) -> None:
    dim["head"][4] = 5


def a_stem_of_timm(state: dict[str, Tensor], dim: dict[str, Any], key: str) -> None:
    state[key] = state[key].reshape(-1, 3, 16, 16)


@pytest.mark.parametrize(
    ("spoil", "key", "code", "details"),
    [
        (drop, "blocks.4.attn.qkv.K.bias", Code.MISSING, {"keys": ("blocks.4.attn.qkv.K.bias",)}),
        (drop, "blocks.4.attn.proj.proj.weight", Code.MISSING,
         {"keys": ("blocks.4.attn.proj.proj.weight",)}),
        (drop, "patch_embed.proj.weight", Code.MISSING, {"keys": ("patch_embed.proj.weight",)}),
        (drop, "blocks.4.mlp.fc1.bias", None, {}),
        (three_dimensional, "blocks.4.attn.qkv.Q.weight", Code.MISMATCH, {"unsliced": True}),
        (weigh_a_token, "blocks.4.attn.qkv.token_mask", Code.UNSUPPORTED,
         {"key": "blocks.4.attn.qkv.token_mask"}),
        (drop_heads, "", Code.WRONG_TYPE, {"key": "dim.head", "got": None}),
        (more_heads, "", Code.MISMATCH, {"rows": 120, "unsliced": False}),
        (a_stem_of_timm, "patch_embed.proj.weight", Code.MISMATCH,
         {"key": "patch_embed.proj.weight"}),
    ],
)  # fmt: skip
def test_a_file_of_nvits_that_is_not_whole(
    tmp_path: Path, cut: nn.Module, spoil: Callable[..., None], key: str, code: Code | None,
    details: dict[str, Any],
) -> None:  # fmt: skip
    state, dim = nvit_state(cut)
    spoil(state, dim, key)
    path = training_file(tmp_path / "nvit.pth", state, dim=dim)
    with pytest.raises(UserError) as caught:
        load_model(NAME, path)
    error = caught.value
    assert code is None or error.code == code, error
    assert details | {"path": str(path)} == {k: error.details.get(k) for k in (*details, "path")}
    assert key in str(error), "the message names the key"


def test_nvits_weights_alone_do_not_say_their_heads(tmp_path: Path, cut: nn.Module) -> None:
    state, _ = nvit_state(cut)
    safetensors.torch.save_file(state, tmp_path / "nvit.safetensors")
    with refused(Code.MISSING, UserError, key="dim.head"):
        load_model(NAME, tmp_path / "nvit.safetensors")


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
def test_wrapped_prefixed_and_with_a_teacher(
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
    assert all(key in str(caught.value) for key in keys[:3])
    assert len(str(caught.value)) < 500
    return keys


def test_an_unknown_layout_is_told_with_its_first_keys_and_those_known(
    tmp_path: Path, digits: nn.Module
) -> None:
    names = {"blocks.": "encoder.layer.", "pos_embed": "embeddings.position_embeddings"}
    keys = refused_keys(tmp_path, renamed(digits, names), Code.UNSUPPORTED)
    assert keys[0] == "embeddings.position_embeddings" and keys[1].startswith("encoder.layer.0")
    with refused(Code.UNSUPPORTED, accepted=("tnt", "dynamicvit", "nvit", "timm")) as caught:
        read_pretrained(tmp_path / "w.pth")
    for known in ("TNT's", "alpha_heads.0.weight", "DynamicViT's", "NViT's", "EViT's"):
        assert known in str(caught.value)
    heads = renamed(built(digits, TNT), {"reduction.heads.": "alpha_head."})
    assert len(refused_keys(tmp_path, heads, Code.UNSUPPORTED)) == 24
    one = {**digits.state_dict(), "mask_token": torch.ones(1)}
    assert refused_keys(tmp_path, one, Code.UNSUPPORTED) == ("mask_token",)
    two = {**tnt_state(built(digits, TNT)), **dynamicvit_state(built(digits, DYNAMICVIT))}
    keys = refused_keys(tmp_path, two, Code.UNSUPPORTED)
    assert keys[0] == "score_predictor.0.in_conv.0.weight"


def test_a_known_layout_that_lacks_keys_is_told_which(tmp_path: Path, digits: nn.Module) -> None:
    state = tnt_state(built(digits, TNT))
    del state["alpha_heads.7.bias"], state["alpha_heads.9.weight"]
    keys = refused_keys(tmp_path, state, Code.MISSING)
    assert keys == ("alpha_heads.7.bias", "alpha_heads.9.weight")
    state = dynamicvit_state(built(digits, DYNAMICVIT))
    state = {k: v for k, v in state.items() if not k.startswith("score_predictor.1.out_conv")}
    keys = refused_keys(tmp_path, state, Code.MISSING)
    assert len(keys) == 6 and keys[0] == "score_predictor.1.out_conv.0.weight"


def test_settings_beside_the_weights_are_read_and_other_objects_are_not(
    tmp_path: Path, digits: nn.Module
) -> None:
    """Every script that came from DeiT's keeps its argparse.Namespace in the file."""
    path = training_file(tmp_path / "w.pth", dict(digits.state_dict()))
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    assert read_pretrained(path).model.keys() == digits.state_dict().keys()
    training_file(path, dict(digits.state_dict()), loss=nn.CrossEntropyLoss())
    with refused(Code.UNSUPPORTED, UserError, path=str(path)) as caught:
        read_pretrained(path)
    assert "torch.nn.modules.loss.CrossEntropyLoss" in str(caught.value)
