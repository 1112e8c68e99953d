"""Published pruning methods for timm's Vision Transformers.

May import torch and timm only, and reads and writes no files. PyYAML, which
installing timm installs too, is imported when a recipe is read from YAML or written as YAML. The
public names are those of `__all__`:

    pruned = methods.prune(model, "tome", r=13)
    logits, trace = pruned(images, trace=True)
    methods.names(); methods.get("tome").parameters
    methods.Recipe.from_yaml(text).build(model)

The modules of all methods are imported here, so that they register themselves.
"""

import importlib
import pkgutil

from vitpareto.methods import controls, structure, token
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.build import Untrained
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import Paper, Preset
from vitpareto.methods.engine.method_registry import get, names, register
from vitpareto.methods.engine.recipe import Recipe, prune, recipe_of
from vitpareto.methods.engine.reduced_model import UnsupportedModel, check_supported
from vitpareto.methods.engine.reduction import Trace
from vitpareto.methods.engine.shape import ModelShape, model_shape
from vitpareto.methods.engine.step import Step
from vitpareto.methods.engine.weights import weights_digest

for _room in (controls, token, structure):
    for _module in pkgutil.walk_packages(_room.__path__, f"{_room.__name__}."):
        importlib.import_module(_module.name)

__all__ = [
    "BadInput",
    "Code",
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
    "recipe_of",
    "register",
    "weights_digest",
]
