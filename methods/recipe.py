"""Recipe: what is done to a model, as a few lines of YAML in and out, and built into a model.

At most one structural step and at most one token step:

    structure: {method: resize, size: 160}
    tokens: {method: tome, r: 13, inflection: 0}

An empty recipe is the dense model. A recipe is checked against a model's dimensions before anything
is built or any image is read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from methods.base import Method, get
from methods.parameters import BadInput, nearest
from methods.shape import ModelShape, model_shape
from methods.vit import check_supported, reduced


class Untrained(UserWarning):
    """A method with trained parts was built without weights: they are fresh ones."""


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 7e-5 as a number, as YAML 1.2 does (1.1 wants 7.0e-5)."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class Step:
    """A method and its parameters, as given (checked against a model only when one is there)."""

    method: str
    params: dict[str, Any]

    @property
    def declared(self) -> Method:
        return get(self.method)

    def plain(self) -> dict[str, Any]:
        """A dict for YAML and JSON: lists for tuples, what is None left out."""
        out: dict[str, Any] = {"method": self.method}
        for name, value in self.params.items():
            if value is not None:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


@dataclass(frozen=True)
class Recipe:
    """At most one structural and one token step; `Recipe()` is dense."""

    structure: Step | None = None
    tokens: Step | None = None

    @classmethod
    def of(cls, method: str, **params: Any) -> Recipe:
        """The one-step recipe of a method by name; "dense" gives the empty one."""
        declared = get(method)
        checked = declared.check(params)
        if method == "dense":
            return cls()
        step = Step(method, checked)
        return cls(structure=step) if declared.kind == "structure" else cls(tokens=step)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Recipe:
        """From what `to_dict` or a YAML file gave. BadInput names what is wrong."""
        if data is None:
            return cls()
        if not isinstance(data, Mapping):
            raise BadInput(f"a recipe is a mapping with structure and tokens, got {data!r}")
        steps: dict[str, Step | None] = {}
        for part, step in data.items():
            if part not in ("structure", "tokens"):
                known = nearest(part, ["structure", "tokens"])
                raise BadInput(f"a recipe has no part {part!r}{known}")
            if step is None:
                continue
            if not isinstance(step, Mapping) or "method" not in step:
                raise BadInput(f"recipe.{part} needs a method and its parameters, got {step!r}")
            declared = get(str(step["method"]))
            if declared.name == "dense":
                continue
            if declared.kind != part:
                raise BadInput(
                    f"{declared.name} is a {declared.kind} method: it cannot be the {part}"
                )
            params = {k: v for k, v in step.items() if k != "method"}
            steps[part] = Step(declared.name, declared.check(params))
        return cls(**steps)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """From YAML text; BadInput if it is not YAML or not a recipe."""
        try:
            data = yaml.load(text, YamlLoader)
        except yaml.YAMLError as error:
            raise BadInput(f"the recipe is not YAML: {error}") from None
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        parts = {"structure": self.structure, "tokens": self.tokens}
        return {part: step.plain() for part, step in parts.items() if step is not None}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)

    @property
    def method(self) -> str:
        """The token method's name, or the structural one's, or "dense"."""
        step = self.tokens or self.structure
        return step.method if step is not None else "dense"

    def __str__(self) -> str:
        """One line for tables: `tome r=13 inflection=0`."""
        steps = [s for s in (self.structure, self.tokens) if s is not None]
        words = []
        for step in steps:
            plain = step.plain()
            words.append(str(plain.pop("method")))
            words += [f"{name}={_short(value)}" for name, value in plain.items()]
        return " ".join(words) or "dense"

    # -- on a model ----------------------------------------------------------------------------

    def reshape(self, shape: ModelShape, model: nn.Module) -> tuple[ModelShape, nn.Module]:
        """The model after the structural step (a copy if there is one) and its shape."""
        if self.structure is None:
            return shape, model
        declared = self.structure.declared
        params = declared.check(self.structure.params, shape)
        changed = declared.restructure(copy.deepcopy(model), params)
        return model_shape(changed), changed

    def checked(self, shape: ModelShape) -> Recipe:
        """The same recipe with every parameter checked and completed for a model of this shape."""
        tokens = self.tokens
        if tokens is not None:
            tokens = Step(tokens.method, tokens.declared.check(tokens.params, shape))
        return Recipe(self.structure, tokens)

    def key(self, shape: ModelShape) -> str:
        """16 hex digits: equal for settings that make the same candidate of a model of this shape.

        `shape` is that after the structural step.
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
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def build(
        self,
        model: nn.Module,
        calibration: Tensor | Iterable[Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """A new model with this recipe applied; `model` is left as it was.

        calibration: normalised images [M, 3, H, W], or batches of them, for methods that ask for
        them and whose recipe does not hold the outcome yet. weights: a state dict for the built
        model. Raises UnsupportedModel, BadInput; warns (Untrained) where trained parts are fresh.
        """
        check_supported(model)
        done = getattr(model, "recipe", None)
        if done is not None and done != Recipe():
            raise BadInput(
                f"the model is already reduced ({done}): give the dense model, and both parts in "
                "one recipe"
            )
        shape, changed = self.reshape(model_shape(model), model)
        recipe = self.checked(shape)
        if recipe.tokens is None:
            built = reduced(changed, None, recipe)
        else:
            declared, params = recipe.tokens.declared, recipe.tokens.params
            if declared.needs_calibration(params):
                if calibration is None:
                    raise BadInput(
                        f"{declared.name} with {_short(params)} needs calibration images: give "
                        "calibration=, or the counts= that an earlier calibration found"
                    )
                with torch.no_grad():
                    images = [calibration] if isinstance(calibration, Tensor) else calibration
                    params = declared.calibrate(reduced(changed, None).eval(), params, images)
                recipe = Recipe(recipe.structure, Step(declared.name, params))
            reduction = declared.reduction(params, shape)
            reference = next(changed.parameters())
            built = reduced(changed, reduction.to(reference.device, reference.dtype), recipe)
            untrained = declared.training == "required" and weights is None
            if untrained and not declared.is_dense(params, shape):
                warnings.warn(
                    f"{declared.name} needs training: without weights= it starts from fresh parts; "
                    "costs and shapes are right, accuracy is not",
                    Untrained,
                    stacklevel=2,
                )
        if weights is not None:
            _load(built, weights)
        return cast(nn.Module, built)


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Strict loading with an error that names the first keys at fault."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [
        f"{k} is {tuple(weights[k].shape)}, the model's {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    said = [
        f"{what}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("wrong shape", shapes))
        if keys
    ]
    if said:
        raise BadInput(f"the weights do not fit the model; {'; '.join(said)}")
    model.load_state_dict(dict(weights))


def _short(value: Any) -> str:
    """A value for one line of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_short(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items() if v is not None)
    return str(value)


def prune(
    model: nn.Module,
    method: str,
    calibration: Tensor | Iterable[Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    **params: Any,
) -> nn.Module:
    """A new model pruned by one method: `prune(model, "tome", r=13)`. `model` is left as it was.

    The result takes images [B, 3, H, W] and gives logits [B, classes]; `trace=True` gives
    (logits, Trace) (`methods.vit.Trace`). See `Recipe.build` for `calibration` and `weights`.
    """
    return Recipe.of(method, **params).build(model, calibration, weights)
