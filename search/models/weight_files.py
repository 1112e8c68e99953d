"""Reading weights files: safetensors, or .pth with `weights_only=True`. No user's pickle runs.

What the names in a file mean is decided in `search.models.checkpoint_layouts`.
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

from vitpareto.search.errors import Code, UserError

#: Under which key a training script stores the weights, first match first. timm's scripts report
#: the accuracy of the averaged weights; DeiT's (and EViT's, DynamicViT's, TNT's and NViT's) that of
#: `model`, although they store `model_ema` too.
WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema")
#: what parallel, compiled and distilling modules put before every name
PREFIXES = ("module.", "_orig_mod.", "model.", "student.", "backbone.")
TEACHERS = ("teacher.", "teacher_model.", "module.teacher.", "module.teacher_model.")


@dataclass(frozen=True)
class WeightsFile:
    """The content of a weights file.

    Attributes:
        path: the file.
        state: the weights by name, without prefixes and without a teacher's.
        beside: what else the training script stored; {} for a bare state dict.
    """

    path: Path
    state: dict[str, Tensor]
    beside: Mapping[str, Any]

    def numbers(self, pattern: str) -> list[int]:
        """The distinct numbers that the group of `pattern` matches in the names, ascending."""
        found = (re.match(pattern, name) for name in self.state)
        return sorted({int(match[1]) for match in found if match})

    def require(self, layout: str, names: Iterable[str]) -> None:
        """Raise UserError if any of `names` is missing. layout: whose layout it is."""
        missing = [name for name in names if name not in self.state]
        if missing:
            raise UserError(
                f"weights file {self.path} has {layout} layout and lacks {some(missing)}",
                Code.MISSING,
                path=str(self.path),
                keys=tuple(missing),
            )


def read_weights_file(path: Path) -> WeightsFile:
    """The state dict in a file, without wrappers and prefixes.

    Raises UserError if the file does not exist, cannot be read, holds more than tensors and
    settings, or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist", Code.NOT_FOUND, path=str(path))
    beside: dict[str, Any] = {}
    loaded: Any = _load(path)
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            beside = {k: v for k, v in loaded.items() if k not in WRAPPERS}
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise UserError(f"weights file {path} has no state dict", Code.WRONG_TYPE, path=str(path))
    state = {k: v for k, v in loaded.items() if not k.startswith(TEACHERS)}
    while state:
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return WeightsFile(path, state, beside)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # DeiT's script and those based on it store their settings as a Namespace: data, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        found = f" (found {match[1]})" if match else ""
        raise UserError(
            f"weights file {path} must hold tensors only{found}: a pickle can run code, so it is "
            "not read; save the model's state dict, preferably as safetensors",
            Code.UNSUPPORTED,
            path=str(path),
            got=match[1] if match else None,
        ) from error
    except Exception as error:
        kind = "safetensors" if path.suffix == ".safetensors" else "a weights-only checkpoint"
        raise UserError(
            f"weights file {path} cannot be read as {kind} ({first_line(error)})",
            Code.UNREADABLE,
            path=str(path),
        ) from error


def some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message, at most 200 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
