"""vitpareto: which pruning method, at which setting, gives a Vision Transformer the best accuracy
at every compute budget.

    import timm, vitpareto
    model = timm.create_model("deit_small_patch16_224").eval()
    pruned = vitpareto.prune(model, "tome", r=13)

`__all__` is the public face; everything else may change. Names are imported on first use, so that
`vitpareto --help` does not import torch. This package may import every room; no room may import its
modules.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitpareto import clusters, dashboards, methods, search
    from vitpareto.methods import Recipe, Trace, prune

# in a checkout the sub-packages lie beside this folder: they belong together, whatever else is
# installed
if (Path(__file__).parent.parent / "setup.py").is_file():
    __path__.append(str(Path(__file__).parent.parent))

#: public names and the module that defines each; a package stands for itself
_PUBLIC = {
    "Recipe": "vitpareto.methods",
    "Trace": "vitpareto.methods",
    "prune": "vitpareto.methods",
    "methods": "vitpareto.methods",
    "search": "vitpareto.search",
    "clusters": "vitpareto.clusters",
    "dashboards": "vitpareto.dashboards",
}

__all__ = ["Recipe", "Trace", "__version__", "clusters", "dashboards", "methods", "prune", "search"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("vitpareto")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitpareto' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if _PUBLIC[name] == f"vitpareto.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
