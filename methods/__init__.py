"""What can be done to a Vision Transformer: published pruning methods, exactly, on timm models.

Needs torch and timm alone: no Ray, no Optuna, no MLflow, no files. The public face:

    pruned = methods.prune(model, "tome", r=13)
    logits, trace = pruned(images, trace=True)
    methods.names(); methods.get("tome").parameters
    methods.Recipe.from_yaml(text).build(model)

Every module of this folder is imported here, so registering a method in its one file is enough.
"""

import importlib
import pkgutil

from methods.base import Method, Paper, Preset, get, names, register
from methods.parameters import BadInput
from methods.recipe import Recipe, Step, Untrained, prune, weights_digest
from methods.shape import ModelShape, model_shape
from methods.vit import Trace, UnsupportedModel, check_supported

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BadInput",
    "Method",
    "ModelShape",
    "Paper",
    "Preset",
    "Recipe",
    "Step",
    "Trace",
    "UnsupportedModel",
    "Untrained",
    "check_supported",
    "get",
    "model_shape",
    "names",
    "prune",
    "register",
    "weights_digest",
]
