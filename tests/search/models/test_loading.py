"""Models by name and from files: what is unavailable or cannot be pruned is refused, and no pickle
runs.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.refusals import refused
from tests.search.small import vit
from vitpareto.methods import Code, UnsupportedModel
from vitpareto.search.errors import UserError
from vitpareto.search.models import embedded_model
from vitpareto.search.models.loading import (
    architecture,
    load_model,
    num_classes,
)
from vitpareto.search.models.weight_files import read_weights_file

#: timm's smallest entry point of the supported family, 5.7 M parameters
NAME = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh weights for `NAME` with 7 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = timm.create_model(NAME, num_classes=7).state_dict()
    safetensors.torch.save_file(state, path)
    return path


@pytest.fixture
def digits_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(embedded_model.build(pretrained=False).state_dict())


# --- loading


def test_a_timm_name_and_a_file_with_other_classes(weights: Path) -> None:
    model = load_model(NAME, weights)
    assert type(model) is VisionTransformer and not model.training
    assert num_classes(model) == 7
    own, stored = model.state_dict(), safetensors.torch.load_file(weights)
    assert all(torch.equal(own[k], stored[k]) for k in own)


def test_the_embedded_model_with_a_weights_file(
    tmp_path: Path, digits_state: dict[str, torch.Tensor]
) -> None:
    safetensors.torch.save_file(digits_state, tmp_path / "w.safetensors")
    model = load_model("digits", tmp_path / "w.safetensors")
    assert torch.equal(model.state_dict()["head.bias"], digits_state["head.bias"])
    assert num_classes(model) == 10


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deit_smal_patch16_224", "deit_small_patch16_224"),
        ("digit", "digits"),
        ("zzzzzz", None),
    ],
)
def test_unknown_names(name: str, near: str | None) -> None:
    with refused(Code.UNKNOWN_NAME, UserError, name=name, closest=near) as caught:
        load_model(name)
    assert len(str(caught.value)) < 300, "not all of timm's names"


@pytest.mark.parametrize(
    "name", ["resnet50", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"]
)
def test_unsupported_models_are_refused_before_their_weights_are_downloaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = timm.create_model

    def without_weights(*args: Any, **kwargs: Any) -> nn.Module:
        assert not kwargs.get("pretrained"), "no weights were needed to refuse it"
        return real(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_weights)
    kind = {"resnet50": "ResNet", "swin_tiny_patch4_window7_224": "SwinTransformer"}.get(
        name, "Eva"
    )
    with refused(Code.UNSUPPORTED, UnsupportedModel, model=kind, part="class"):
        load_model(name)


def test_unavailable_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: what timm then raises is told in one line, and so is the way out."""
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no route\nto host")
        return real(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with refused(Code.UNAVAILABLE, UserError, name=NAME) as caught:
        load_model(NAME)
    assert caught.value.details["cause"] == "ConnectionError: no route", "the error's first line"
    assert "\n" not in str(caught.value)


# --- weight files


def test_a_missing_weights_file(tmp_path: Path) -> None:
    with refused(Code.NOT_FOUND, UserError, path=str(tmp_path / "none.pth")):
        load_model(NAME, tmp_path / "none.pth")
    with refused(Code.NOT_FOUND, UserError, path=str(tmp_path)):
        load_model(NAME, tmp_path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_an_unreadable_weights_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"these are no weights\n" * 20)
    with refused(Code.UNREADABLE, UserError, path=str(tmp_path / name)) as caught:
        load_model("digits", tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_weights_file(tmp_path: Path, weights: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-1000])
    with refused(Code.UNREADABLE, UserError, path=str(cut)):
        load_model(NAME, cut)


def test_weights_of_another_architecture(weights: Path, tmp_path: Path) -> None:
    with refused(Code.MISMATCH, UserError, path=str(weights), missing=[], unknown=[]) as caught:
        load_model("deit_small_patch16_224", weights)
    assert caught.value.details["shapes"]["cls_token"] == ((1, 1, 192), (1, 1, 384))
    assert len(str(caught.value)) < 400
    other = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"blocks.0.ls1.gamma": torch.ones(1)}, other)
    unknown = ["blocks.0.ls1.gamma"]
    with refused(Code.MISMATCH, UserError, path=str(other), unknown=unknown, shapes={}):
        load_model("digits", other)


def test_a_head_that_is_not_a_matrix(tmp_path: Path, weights: Path) -> None:
    state = safetensors.torch.load_file(weights) | {"head.weight": torch.tensor(1.0)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors"
    with refused(Code.MISMATCH, UserError, path=str(path), missing=[], unknown=[]) as caught:
        load_model(NAME, path)
    assert caught.value.details["shapes"]["head.weight"][0] == ()


@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_training_scripts(
    tmp_path: Path, digits_state: dict[str, torch.Tensor], key: str | None, prefix: str
) -> None:
    state: dict[str, Any] = {prefix + k: v for k, v in digits_state.items()}
    stored = state if key is None else {key: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(stored, tmp_path / "w.pth")
    read = read_weights_file(tmp_path / "w.pth").state
    assert read.keys() == digits_state.keys()
    assert all(torch.equal(read[k], v) for k, v in digits_state.items())
    assert num_classes(load_model("digits", tmp_path / "w.pth")) == 10


def test_averaged_weights_are_used_if_their_script_evaluates_them(tmp_path: Path) -> None:
    """timm's do, DeiT's and its heirs do not."""
    ema, raw = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    torch.save({"state_dict": raw, "state_dict_ema": ema}, tmp_path / "w.pth")
    assert read_weights_file(tmp_path / "w.pth").state["a"] == 1
    torch.save({"model": raw, "model_ema": ema}, tmp_path / "w.pth")
    assert read_weights_file(tmp_path / "w.pth").state["a"] == 0
    torch.save({"state_dict": raw, "state_dict_ema": None}, tmp_path / "w.pth")
    assert read_weights_file(tmp_path / "w.pth").state["a"] == 0


@pytest.mark.parametrize(
    "stored",
    [[torch.ones(1)], {"model": [1]}, {"a": 3}, {0: torch.ones(1)}, torch.ones(2)],
    ids=str,
)
def test_a_checkpoint_without_a_state_dict(tmp_path: Path, stored: Any) -> None:
    torch.save(stored, tmp_path / "w.pth")
    with refused(Code.WRONG_TYPE, UserError, path=str(tmp_path / "w.pth")):
        read_weights_file(tmp_path / "w.pth")


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_users_pickle_does_not_run(tmp_path: Path, how: str, suffix: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / f"w{suffix}"
    stored = {"state_dict": Malicious(trap)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(stored))
    else:
        torch.save(stored, path)
    with pytest.raises(UserError) as caught:
        load_model("digits", path)
    assert caught.value.code in (Code.UNREADABLE, Code.UNSUPPORTED)
    assert caught.value.details["path"] == str(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(stored))
    assert trap.exists(), "a plain unpickling would have run it"


def test_a_model_without_a_head_has_no_classes() -> None:
    headless = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=0
    )
    with refused(Code.MISSING, UserError):
        num_classes(headless)
    assert num_classes(vit(7)) == 7


def test_a_model_with_other_blocks_is_refused() -> None:
    with refused(Code.UNSUPPORTED, UnsupportedModel, part="block 0"):
        load_model("vit_small_patch16_18x2_224")


def test_architecture_of_a_local_dir(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2}, "num_classes": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = architecture(f"local-dir:{tmp_path}")
    assert found == {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2}}
    assert architecture("digits") == architecture("vit_tiny_patch16_224") == {}
