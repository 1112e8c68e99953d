"""Weights as a file stores them: safetensors, or .pth read with `weights_only=True`.

No pickle of a user's runs. What the names mean is `search.models.checkpoint_layouts`' business.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vitpareto.search.errors import UserError

#: Where a training script keeps the weights. timm's scripts are measured by their average, DeiT's
#: (and EViT's, DynamicViT's, TNT's and NViT's after them) by `model`, though `model_ema` is there.
WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema")
#: What parallel, compiled and distilling modules put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "student.", "backbone.")
TEACHERS = ("teacher.", "teacher_model.", "module.teacher.", "module.teacher_model.")


@dataclass(frozen=True)
class WeightsFile:
    """state: the weights by their names, without prefixes and without a teacher; beside: what
    else the training script kept, {} for a bare state dict.
    """

    path: Path
    state: dict[str, Tensor]
    beside: Mapping[str, Any]

    def numbers(self, pattern: str) -> list[int]:
        """The distinct numbers that the group of `pattern` takes in the names, ascending."""
        found = (re.match(pattern, name) for name in self.state)
        return sorted({int(match[1]) for match in found if match})

    def require(self, layout: str, names: Iterable[str]) -> None:
        """UserError naming the first of `names` that are not there."""
        lacking = [name for name in names if name not in self.state]
        if lacking:
            raise UserError(
                f"weights file {self.path} has {layout} layout and lacks {some(lacking)}"
            )


def read_weights_file(path: Path) -> WeightsFile:
    """Raises UserError: a file that is missing, unreadable, or holds more than tensors and
    settings, or no state dict.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} is not there")
    beside: dict[str, Any] = {}
    loaded: Any = _stored(path)
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            beside = {k: v for k, v in loaded.items() if k not in WRAPPERS}
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise UserError(f"weights file {path} holds no state dict")
    state = {k: v for k, v in loaded.items() if not k.startswith(TEACHERS)}
    while state:
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return WeightsFile(path, state, beside)


def _stored(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # the settings that DeiT's script and its heirs keep beside the weights: data, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"weights file {path} holds more than tensors{f' ({asked[1]})' if asked else ''}, and "
            "a pickle could run code: it is not read; save its state dict, best as safetensors"
        ) from error
    except Exception as error:
        kind = "safetensors" if path.suffix == ".safetensors" else "a weights-only checkpoint"
        raise UserError(
            f"weights file {path} cannot be read as {kind} ({first_line(error)})"
        ) from error


def some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says, cut."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
