"""Names to models: the embedded one, timm's, weights from a file; and how a worker maps one."""

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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpareto.methods import ModelShape, Recipe, check_supported, model_shape
from vitpareto.methods.engine.errors import nearest
from vitpareto.search.data import embedded_images
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import replacing
from vitpareto.search.models import embedded_model
from vitpareto.search.models.checkpoint_layouts import read_checkpoint
from vitpareto.search.models.weight_files import first_line

REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
#: how `load_model` ends what it says where pretrained weights cannot be had
WAY_OUT = "; give them with --weights FILE"


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """The dense model in eval mode: `digits` (embedded), any timm name, `hf-hub:…`, `local-dir:…`.

    weights: a file for it, in any layout of `search.models.checkpoint_layouts`; its head may have
    other classes than timm's. Of a token method's checkpoint the model is loaded and the method's
    parts are left (`Checkpoint.weights_for` gives both); NViT's makes a sliced model. Without it
    timm's pretrained weights. Raises UserError: unknown name (nearest), weights missing,
    unreadable, of an unknown layout or a wrong shape, or a model that cannot be pruned.
    """
    if name != embedded_model.NAME:
        _check_buildable(name)
    given = read_checkpoint(weights) if weights is not None else None
    if name == embedded_model.NAME:
        model: nn.Module = embedded_model.build(pretrained=given is None)
        classes = None if given is None else _classes(given.model)
        if classes not in (None, len(embedded_images.CLASSES)):
            cast(VisionTransformer, model).reset_classifier(cast(int, classes))
    else:
        model = _create(name, None if given is None else given.model)
    if given is not None:
        model = given.fill(model)
    check_supported(model)
    return model.eval()


def fresh_model(name: str) -> nn.Module:
    """The dense model in eval mode with fresh weights, for what no weight decides; also under
    `torch.device("meta")`. Nothing is downloaded but the description of an `hf-hub:…`.

    Raises UserError for an unknown name (with the nearest), UnsupportedModel.
    """
    if name == embedded_model.NAME:
        model: nn.Module = embedded_model.build(pretrained=False)
    else:
        _check_name(name)
        try:
            model = timm.create_model(name, pretrained=False)
        except Exception as error:  # a tag that timm does not have, a hub that is not reached
            raise UserError(f"timm cannot build {name!r}: {first_line(error)}") from error
    check_supported(model)
    return model.eval()


def _check_name(name: str) -> None:
    """UserError unless timm, or a place that the name gives, has such a model."""
    if not name.startswith(REMOTE) and name.split(".")[0] not in timm.list_models():
        hint = nearest(name, [embedded_model.NAME, *timm.list_models()])
        if not hint.startswith(": did you mean"):  # rather than all thousand of timm's names
            hint = ": accepted is digits, a name of timm.list_models(), hf-hub:… or local-dir:…"
        raise UserError(f"unknown model {name!r}{hint}")


def _check_buildable(name: str) -> None:
    """UserError or UnsupportedModel, before weights are read or downloaded."""
    _check_name(name)
    if not name.startswith(REMOTE):
        with torch.device("meta"):
            check_supported(timm.create_model(name.split(".")[0]))


def _create(name: str, state: dict[str, Tensor] | None) -> nn.Module:
    options: dict[str, Any] = {}
    classes = None if state is None else _classes(state)
    if classes is not None:
        options["num_classes"] = classes
    try:
        return timm.create_model(name, pretrained=state is None, **options)
    except Exception as error:
        if state is None:
            raise UserError(
                f"the pretrained weights of {name!r} cannot be had ({first_line(error)}){WAY_OUT}"
            ) from error
        raise UserError(f"timm cannot build {name!r}: {first_line(error)}") from error


def _classes(state: dict[str, Tensor]) -> int | None:
    """Logits of the head in a state dict; None where it holds none."""
    head = state.get("head.weight")
    return head.shape[0] if head is not None and head.dim() == 2 else None


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


def check_trained(recipe: Recipe, shape: ModelShape) -> None:
    """UserError where the recipe, checked for a model of this shape, has parts that only training
    makes and names no weights for them: with fresh ones an accuracy says nothing.
    """
    if recipe.weights is not None:
        return
    for step in (recipe.structure, recipe.tokens):
        if step is None or step.declared.training != "required":
            continue
        if not step.declared.is_dense(step.params, shape):
            raise UserError(
                f"{step.method} needs training, and the recipe names no trained weights: accuracy "
                "with fresh ones would say nothing. vitpareto finetune --recipe trains it; in "
                f"Python trained weights go to methods.prune(model, {step.method!r}, weights=...); "
                f"what it costs is shown by vitpareto table --methods {step.method}"
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
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        with replacing(path) as partial:
            safetensors.torch.save_file(state, partial)
            partial.chmod(0o644)  # a study is read by others too
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
