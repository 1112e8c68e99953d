"""Names to models: the embedded one, timm's, weights from a file; and how a worker maps one.

Weights are safetensors, or .pth read with `weights_only=True`: no pickle from users.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from methods import ModelShape, Recipe, check_supported, model_shape
from methods.parameters import nearest
from search import embedded
from search.errors import UserError

REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
#: how `load_model` ends what it says where pretrained weights cannot be had
WAY_OUT = "; give them with --weights FILE"


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """The dense model in eval mode: `digits` (embedded), any timm name, `hf-hub:…`, `local-dir:…`.

    weights: a file for it; its head may have other classes than timm's. Without it timm's
    pretrained weights. Raises UserError: unknown name (nearest), weights missing, unreadable or of
    a wrong shape, or a model that cannot be pruned.
    """
    state = read_weights(weights) if weights is not None else None
    if name == embedded.NAME:
        model: nn.Module = embedded.build(pretrained=state is None)
    else:
        model = _create(name, state)
    if state is not None:
        _fit(model, state, weights)
    check_supported(model)
    return model.eval()


def fresh_model(name: str) -> nn.Module:
    """The dense model in eval mode with fresh weights, for what no weight decides; also under
    `torch.device("meta")`. Nothing is downloaded but the description of an `hf-hub:…`.

    Raises UserError for an unknown name (with the nearest), UnsupportedModel.
    """
    if name == embedded.NAME:
        model: nn.Module = embedded.build(pretrained=False)
    else:
        _check_name(name)
        try:
            model = timm.create_model(name, pretrained=False)
        except Exception as error:  # a tag that timm does not have, a hub that is not reached
            raise UserError(f"timm cannot build {name!r}: {_first_line(error)}") from error
    check_supported(model)
    return model.eval()


def _check_name(name: str) -> None:
    """UserError unless timm, or a place that the name gives, has such a model."""
    if not name.startswith(REMOTE) and name.split(".")[0] not in timm.list_models():
        hint = nearest(name, [embedded.NAME, *timm.list_models()])
        if not hint.startswith(": did you mean"):  # rather than all thousand of timm's names
            hint = ": accepted is digits, a name of timm.list_models(), hf-hub:… or local-dir:…"
        raise UserError(f"unknown model {name!r}{hint}")


def _create(name: str, state: dict[str, Tensor] | None) -> nn.Module:
    _check_name(name)
    if not name.startswith(REMOTE):
        # before its weights are downloaded
        with torch.device("meta"):
            check_supported(timm.create_model(name.split(".")[0]))
    options: dict[str, Any] = {}
    head = None if state is None else state.get("head.weight")
    if head is not None and head.dim() == 2:
        options["num_classes"] = head.shape[0]
    try:
        return timm.create_model(name, pretrained=state is None, **options)
    except Exception as error:
        if state is None:
            raise UserError(
                f"the pretrained weights of {name!r} cannot be had ({_first_line(error)}){WAY_OUT}"
            ) from error
        raise UserError(f"timm cannot build {name!r}: {_first_line(error)}") from error


def architecture(name: str) -> dict[str, Any]:
    """What builds a `local-dir:` model without its folder: timm's `architecture` and `model_args`;
    {} for any other, whose name says it.
    """
    if not name.startswith("local-dir:"):
        return {}
    text = (Path(name.removeprefix("local-dir:")) / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    arguments = config.get("model_args") or {}
    return {"architecture": config["architecture"], "model_args": arguments}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pth/.pt/.bin read with `weights_only=True`."""
    if not path.is_file():
        raise UserError(f"weights file {path} is not there")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights file {path} holds more than tensors (a pickle could run code): it is not "
            "read; save its state dict, best as safetensors"
        ) from error
    except Exception as error:
        raise UserError(
            f"weights file {path} cannot be read as "
            f"{'safetensors' if path.suffix == '.safetensors' else 'a weights-only checkpoint'} "
            f"({_first_line(error)})"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise UserError(f"weights file {path} holds no state dict")
    return {k.removeprefix("module."): v for k, v in loaded.items()}


def _fit(model: nn.Module, state: dict[str, Tensor], path: Path | None) -> None:
    own = model.state_dict()
    wrong = [
        f"{k} is {list(state[k].shape)}, the model's {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    said = [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (
            ("wrong shape:", wrong),
            ("missing:", sorted(set(own) - set(state))),
            ("unknown:", sorted(set(state) - set(own))),
        )
        if keys
    ]
    if said:
        raise UserError(f"weights file {path} does not fit the model; {'; '.join(said)}")
    model.load_state_dict(state)


def check_trained(recipe: Recipe, shape: ModelShape) -> None:
    """UserError where the recipe, checked for a model of this shape, has parts that only training
    makes: it holds no weights for them, and with fresh ones an accuracy says nothing.
    """
    step = recipe.tokens
    if step is None or step.declared.training != "required":
        return
    if not step.declared.is_dense(step.params, shape):
        raise UserError(
            f"{step.method} needs training, and a recipe holds no trained weights: accuracy with "
            "fresh ones would say nothing. With trained weights it runs through "
            f"methods.prune(model, {step.method!r}, weights=...); what it costs is shown by "
            f"vitpareto table --methods {step.method}"
        )


def num_classes(model: nn.Module) -> int:
    """Logits the model gives; UserError for a model without a head."""
    head = cast(Any, model).head
    if not isinstance(head, nn.Linear):
        raise UserError("the model has no classification head: give weights that have one")
    return head.out_features


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of architecture and weights: equal for equal models, whatever their name."""
    digest = hashlib.sha256(repr(model_shape(model)).encode())
    # what a forward does with equal weights: activations, epsilons, pooling
    parts = [(k, type(m).__name__, getattr(m, "eps", None)) for k, m in model.named_modules()]
    digest.update(repr((parts, getattr(model, "global_pool", None))).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class MappedModel:
    """A dense model as every worker of a node can map it: its skeleton, and weights in one file."""

    skeleton: bytes
    weights: Path

    @classmethod
    def save(cls, model: nn.Module, path: Path) -> MappedModel:
        """Write the weights to `path` (safetensors) and keep the skeleton without them."""
        partial = path.with_suffix(".partial")
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        safetensors.torch.save_file(state, partial)
        partial.chmod(0o644)  # a study is read by others too
        partial.replace(path)
        skeleton = copy.deepcopy(model)
        for module in skeleton.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                meta = torch.empty_like(parameter, device="meta")
                setattr(module, name, nn.Parameter(meta, requires_grad=parameter.requires_grad))
        return cls(pickle.dumps(skeleton), path)

    def load(self, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
        """The model in eval mode; on a CPU in float32 its weights are the mapped file's pages."""
        model = cast(nn.Module, pickle.loads(self.skeleton))  # made by `save` in the same study
        model.load_state_dict(safetensors.torch.load_file(self.weights), assign=True)
        return model.to(device=device, dtype=dtype).eval()
