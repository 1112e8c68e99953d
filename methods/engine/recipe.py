"""Recipes: what is done to a model, read from and written to YAML, and built into a model.

A recipe has at most one structural step and at most one token step:

    structure: {method: resize, size: 160}
    tokens: {method: tome, r: 13, inflection: 0}
    weights: 0123456789abcdef

`weights` is the digest of the trained state dict of the built model. The empty recipe is the dense
model. A recipe is checked against a model's dimensions before any image is read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.build import (
    calibrated,
    check_weights,
    missing_weights,
    warn_if_untrained,
)
from vitpareto.methods.engine.method_registry import get
from vitpareto.methods.engine.recipe_fields import parse_recipe
from vitpareto.methods.engine.reduced_model import check_supported, reduced
from vitpareto.methods.engine.shape import ModelShape, model_shape
from vitpareto.methods.engine.step import Step, short
from vitpareto.methods.engine.weights import load_strictly


@dataclass(frozen=True)
class Recipe:
    """At most one structural and one token step; `Recipe()` is the dense model.

    Attributes:
        structure: the structural step, or None.
        tokens: the token step, or None.
        weights: digest (`weights_digest`) of the trained state dict of the built model. None: the
            dense model's own weights, with fresh parts if a method has trained ones.
    """

    structure: Step | None = None
    tokens: Step | None = None
    weights: str | None = None

    @classmethod
    def of(cls, method: str, **params: Any) -> Recipe:
        """The recipe with one method as its only step; "dense" gives the empty recipe."""
        declared = get(method)
        checked = declared.check(params)
        if declared.is_reference:
            return cls()
        step = Step(method, checked)
        return cls(structure=step) if declared.kind == "structure" else cls(tokens=step)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Recipe:
        """The recipe from the output of `to_dict` or a parsed YAML file. Raises BadInput."""
        return cls(**parse_recipe(data))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The recipe from YAML text. Raises BadInput if it is not YAML or not a recipe, and
        ImportError without PyYAML.
        """
        from vitpareto.methods.engine.recipe_yaml import parse_yaml

        return cls.from_dict(parse_yaml(text))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML, which `from_dict` reads."""
        parts = {"structure": self.structure, "tokens": self.tokens}
        out: dict[str, Any] = {p: step.plain() for p, step in parts.items() if step is not None}
        if self.weights is not None:
            out["weights"] = self.weights
        return out

    def to_yaml(self) -> str:
        """YAML text, which `from_yaml` reads. Raises ImportError without PyYAML."""
        from vitpareto.methods.engine.recipe_yaml import format_yaml

        return format_yaml(self.to_dict())

    @property
    def method(self) -> str:
        """The token method's name, or the structural one's, or "dense"."""
        step = self.tokens or self.structure
        return step.method if step is not None else "dense"

    def __str__(self) -> str:
        """The recipe in one line: `tome r=13 inflection=0`, `tnt … weights=0123456789abcdef`."""
        steps = [s for s in (self.structure, self.tokens) if s is not None]
        words = []
        for step in steps:
            plain = step.plain()
            words.append(str(plain.pop("method")))
            words += [f"{name}={short(value)}" for name, value in plain.items()]
        words = words or ["dense"]
        if self.weights is not None:
            words.append(f"weights={self.weights}")
        return " ".join(words)

    # -- on a model ----------------------------------------------------------------------------

    def reshape(
        self,
        shape: ModelShape,
        model: nn.Module,
        weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[ModelShape, nn.Module]:
        """(shape, model) after the structural step; a copy if there is one.

        weights: the state dict that the recipe names, for steps that read their dimensions from
        it. Its values are not loaded here.
        """
        if self.structure is None:
            return shape, model
        declared = self.structure.declared
        params = declared.check(self.structure.params, shape)
        if self.weights is not None and weights is None and declared.shaped_by_weights(params):
            raise missing_weights(self.weights, "its dimensions")
        changed = declared.restructure(copy.deepcopy(model), params, weights)
        return model_shape(changed), changed

    def checked(self, shape: ModelShape) -> Recipe:
        """The recipe with its token parameters checked and completed for a model of this shape."""
        tokens = self.tokens
        if tokens is not None:
            tokens = Step(tokens.method, tokens.declared.check(tokens.params, shape))
        return replace(self, tokens=tokens)

    def key(self, shape: ModelShape) -> str:
        """16 hex digits, equal for settings that give the same candidate.

        shape: the model's dimensions after the structural step.
        """
        parts: dict[str, Any] = {}
        if self.structure is not None:
            declared = self.structure.declared
            parts["structure"] = [declared.name, declared.signature(self.structure.params, shape)]
        if self.tokens is not None:
            declared = self.tokens.declared
            params = declared.check(self.tokens.params, shape)
            if not declared.is_dense(params, shape):
                parts["tokens"] = [declared.name, declared.signature(params, shape)]
        if self.weights is not None:
            parts["weights"] = self.weights
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def build(
        self,
        model: nn.Module,
        calibration: Tensor | Iterable[Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """A new model with this recipe applied; `model` is not changed.

        Args:
            model: a dense timm model.
            calibration: normalised images [M, 3, H, W], or batches of them, for methods that need
                calibration and whose parameters do not contain its outcome yet.
            weights: a complete state dict of the built model. Required if the recipe names weights,
                and compared with their digest.

        Raises:
            UnsupportedModel: if the reduced forward is not exact for the model.
            BadInput: if the recipe cannot be applied.

        Warns:
            Untrained: if trained parts are fresh.
        """
        check_supported(model)
        done = recipe_of(model)
        if done != Recipe():
            raise BadInput(
                f"model must be dense (got one reduced by {done}); put both steps in one recipe",
                Code.CONFLICT,
                name="model",
                got=str(done),
            )
        check_weights(self.weights, weights)
        before = model_shape(model)
        shape, changed = self.reshape(before, model, weights)
        recipe = self.checked(shape)
        if recipe.structure is not None:
            warn_if_untrained(recipe.structure, before, weights)
        reduction = None
        if recipe.tokens is not None:
            step = calibrated(recipe.tokens, changed, calibration, weights)
            recipe = replace(recipe, tokens=step)
            reference = next(changed.parameters())
            reduction = step.declared.reduction(step.params, shape)
            reduction = reduction.to(reference.device, reference.dtype)
            warn_if_untrained(step, shape, weights)
        built = reduced(changed, reduction, recipe)
        if weights is not None:
            load_strictly(built, weights)
        return cast(nn.Module, built)


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe that a model was built from, with calibrated parameters filled in.

    The empty recipe for a model that was not built from a recipe, such as timm's.
    """
    recipe = getattr(model, "recipe", None)
    return recipe if recipe is not None else Recipe()


def prune(
    model: nn.Module,
    method: str,
    calibration: Tensor | Iterable[Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    **params: Any,
) -> nn.Module:
    """A new model pruned by one method: `prune(model, "tome", r=13)`. `model` is not changed.

    The result maps images [B, 3, H, W] to logits [B, classes], or with `trace=True` to
    (logits, `Trace`). See `Recipe.build` for `calibration` and `weights`.
    """
    return Recipe.of(method, **params).build(model, calibration, weights)
