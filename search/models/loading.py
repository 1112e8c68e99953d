"""Models by name: the embedded one, timm's, and weights from a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpareto.methods import ModelShape, Recipe, check_supported, model_shape
from vitpareto.search.data.embedded_images import CLASSES
from vitpareto.search.errors import Code, UserError, closest, suggestion
from vitpareto.search.models import embedded_model
from vitpareto.search.models.pretrained import read_pretrained
from vitpareto.search.models.weight_files import first_line

#: names that timm resolves itself: a model on the Hugging Face hub or in a folder
RESOLVED_BY_TIMM = ("hf-hub:", "hf_hub:", "local-dir:")


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """The dense model in eval mode.

    Args:
        name: `digits` (embedded), a timm name, `hf-hub:…` or `local-dir:…`.
        weights: a file in any layout of `search.models.checkpoint_layouts`; timm's pretrained
            weights if None. The file's head may have another number of classes than timm's. Of a
            token method's checkpoint only the model is loaded; `PretrainedWeights.weights_for`
            returns the method's parts too. A checkpoint of NViT gives a sliced model.

    Raises:
        UserError: the name is unknown, the model cannot be pruned, or the weights are missing,
            unreadable, of an unknown layout or of another shape.
    """
    if name != embedded_model.NAME:
        _check_buildable(name)
    pretrained = read_pretrained(weights) if weights is not None else None
    classes = None if pretrained is None else _classes(pretrained.model)
    if name == embedded_model.NAME:
        model: nn.Module = embedded_model.build(pretrained=pretrained is None)
        if classes not in (None, len(CLASSES)):
            cast(VisionTransformer, model).reset_classifier(cast(int, classes))
    else:
        model = _create(name, pretrained is None, classes)
    if pretrained is not None:
        model = pretrained.fill(model)
    check_supported(model)
    return model.eval()


def fresh_model(name: str) -> nn.Module:
    """The dense model in eval mode with fresh weights, for results that do not depend on weights.

    Works under `torch.device("meta")` too. Downloads nothing but the description of an `hf-hub:…`.
    Raises UserError for an unknown name, UnsupportedModel for a model that cannot be pruned.
    """
    if name == embedded_model.NAME:
        model: nn.Module = embedded_model.build(pretrained=False)
    else:
        _check_name(name)
        try:
            model = timm.create_model(name, pretrained=False)
        except Exception as error:  # an unknown tag, or a hub that is not reached
            raise _cannot_build(name, error) from error
    check_supported(model)
    return model.eval()


def _check_name(name: str) -> None:
    """Raise UserError unless timm has such a model, or resolves the name itself."""
    if not name.startswith(RESOLVED_BY_TIMM) and name.split(".")[0] not in timm.list_models():
        known = [embedded_model.NAME, *timm.list_models()]
        # not all of timm's thousand names
        accepted = ": must be digits, a name in timm.list_models(), hf-hub:… or local-dir:…"
        raise UserError(
            f"unknown model {name!r}{suggestion(name, known, accepted)}",
            Code.UNKNOWN_NAME,
            name=name,
            closest=closest(name, known),
        )


def _check_buildable(name: str) -> None:
    """Raise UserError or UnsupportedModel before weights are read or downloaded."""
    _check_name(name)
    if not name.startswith(RESOLVED_BY_TIMM):
        with torch.device("meta"):
            check_supported(timm.create_model(name.split(".")[0]))


def _create(name: str, pretrained: bool, classes: int | None) -> nn.Module:
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if pretrained:
            cause = first_line(error)
            reason = f"the pretrained weights of {name!r} are not available ({cause})"
            raise UserError(
                f"{reason}; give them with --weights FILE",
                Code.UNAVAILABLE,
                name=name,
                reason=reason,
                cause=cause,
            ) from error
        raise _cannot_build(name, error) from error


def _cannot_build(name: str, error: Exception) -> UserError:
    return UserError(
        f"timm cannot build {name!r}: {first_line(error)}", Code.UNSUPPORTED, name=name
    )


def _classes(state: dict[str, Tensor]) -> int | None:
    """Number of classes of the head in a state dict; None if it has no head."""
    head = state.get("head.weight")
    return head.shape[0] if head is not None and head.dim() == 2 else None


def architecture(name: str) -> dict[str, Any]:
    """timm's `architecture` and `model_args` of a `local-dir:` model, to build it without its
    folder; {} for any other model, whose name is enough.
    """
    if not name.startswith("local-dir:"):
        return {}
    text = (Path(name.removeprefix("local-dir:")) / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    arguments = config.get("model_args") or {}
    return {"architecture": config["architecture"], "model_args": arguments}


def check_trained(recipe: Recipe, shape: ModelShape) -> None:
    """Raise UserError if the recipe has parts that must be trained and names no weights for them.

    With fresh weights, accuracy would not mean anything. shape: of the model that the recipe was
    checked for.
    """
    if recipe.weights is not None:
        return
    for step in (recipe.structure, recipe.tokens):
        if step is None or step.declared.training != "required":
            continue
        if not step.declared.is_dense(step.params, shape):
            raise UserError(
                f"{step.method} needs trained weights, and the recipe names none: with fresh ones "
                "its accuracy has no meaning. Train it with vitpareto finetune --recipe, or in "
                f"Python pass methods.prune(model, {step.method!r}, weights=...); its cost is "
                f"shown by vitpareto table --methods {step.method}",
                Code.MISSING,
                method=step.method,
            )


def num_classes(model: nn.Module) -> int:
    """Number of logits of the model. Raises UserError for a model without a head."""
    head = cast(Any, model).head
    if not isinstance(head, nn.Linear):
        raise UserError(
            "the model has no classification head: give weights that have one",
            Code.MISSING,
            name="head",
            got=type(head).__name__,
        )
    return head.out_features


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of architecture and weights: equal for equal models, whatever their names."""
    digest = hashlib.sha256(repr(model_shape(model)).encode())
    # what a forward pass does with equal weights: activations, epsilons, pooling
    parts = [(k, type(m).__name__, getattr(m, "eps", None)) for k, m in model.named_modules()]
    digest.update(repr((parts, getattr(model, "global_pool", None))).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
