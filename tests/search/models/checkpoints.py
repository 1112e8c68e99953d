"""Synthetic checkpoints in the published layouts: models of this project, renamed."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Recipe

TNT = Recipe.of("tnt", prune_layers=[2, 4], keep_rates=[0.7, 0.7], similarity_prune=6)
DYNAMICVIT = Recipe.of("dynamicvit", prune_layers=[3, 6, 9], keep_rates=[0.7, 0.49, 0.343])
EVIT = Recipe.of("evit", keep_rate=0.7, prune_layers=[3, 6, 9])


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
