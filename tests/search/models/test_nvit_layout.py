"""NViT's layout. What its names mean is implemented here a second time, from the published code."""

from __future__ import annotations

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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.refusals import refused
from tests.search.models.checkpoints import (
    logits,
    training_file,
)
from vitpareto import methods
from vitpareto.methods import Code
from vitpareto.methods.slicing.sliced_model import (
    BlockWidths,
    Widths,
    model_widths,
    sliced_model,
    widths_of,
)
from vitpareto.search.errors import UserError
from vitpareto.search.models.loading import load_model

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


def test_nvits_checkpoint_makes_the_sliced_model(
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


def test_nvits_model_can_be_pruned_and_saved(
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
    path = str(tmp_path / "nvit.pth")
    with refused(Code.MISMATCH, UserError, path=path, got=12, expected=14):
        load_model("vit_wee_patch16_reg1_gap_256", tmp_path / "nvit.pth")


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
        (drop, "blocks.4.mlp.fc1.bias", Code.MISMATCH, {"missing": ["blocks.4.mlp.fc1.bias"]}),
        (three_dimensional, "blocks.4.attn.qkv.Q.weight", Code.MISMATCH, {"unsliced": True}),
        (weigh_a_token, "blocks.4.attn.qkv.token_mask", Code.UNSUPPORTED,
         {"key": "blocks.4.attn.qkv.token_mask"}),
        (drop_heads, "", Code.WRONG_TYPE, {"key": "dim.head", "got": None}),
        (more_heads, "", Code.MISMATCH, {"rows": 120, "unsliced": False}),
        (a_stem_of_timm, "patch_embed.proj.weight", Code.MISMATCH,
         {"key": "patch_embed.proj.weight"}),
    ],
)  # fmt: skip
def test_an_incomplete_nvit_checkpoint_is_refused(
    tmp_path: Path, cut: nn.Module, spoil: Callable[..., None], key: str, code: Code,
    details: dict[str, Any],
) -> None:  # fmt: skip
    state, dim = nvit_state(cut)
    spoil(state, dim, key)
    path = training_file(tmp_path / "nvit.pth", state, dim=dim)
    with refused(code, UserError, path=str(path), **details):
        load_model(NAME, path)


def test_nvit_weights_without_dimensions_are_refused(tmp_path: Path, cut: nn.Module) -> None:
    state, _ = nvit_state(cut)
    safetensors.torch.save_file(state, tmp_path / "nvit.safetensors")
    with refused(Code.MISSING, UserError, key="dim.head"):
        load_model(NAME, tmp_path / "nvit.safetensors")
