"""The state of a training after every epoch, in one file, so that it can be interrupted.

The file is written under another name and renamed, so it is never incomplete. It is read with
torch's `weights_only=True`: tensors and plain values, no code. It names the training that it
belongs to, and no other training continues from it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto.methods import Code
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.write_through import refresh
from vitpareto.search.training.loop import Epoch, TrainingState

FORMAT, VERSION = "vitpareto training", 1


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Where a training's state is stored, and the settings it depends on (JSON values)."""

    path: Path
    settings: Mapping[str, Any]

    def save(self, state: TrainingState) -> None:
        """Replace the stored state. Raises OSError if it cannot be written."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": json.dumps(dict(self.settings), sort_keys=True),
            "model": state.model,
            "optimizer": state.optimizer,
            "average": state.average,
            "random": state.random,
            "history": [astuple(epoch) for epoch in state.history],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # through memory: on a full disk torch.save raises its own error instead of the system's
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomic(self.path, buffer.getvalue())

    def load(self, model: nn.Module) -> TrainingState | None:
        """The stored state, on the CPU; None if there is none.

        model: only compared with the state; nothing is loaded into it.

        Raises UserError if the file is incomplete or of another kind, or belongs to a training of
        another model or with other settings.
        """
        if not refresh(self.path):
            return None
        content = self._read()
        self._check_settings(json.loads(content["settings"]))
        self._check_model(content["model"], model)
        return TrainingState(
            content["model"],
            content["optimizer"],
            content["average"],
            content["random"],
            tuple(Epoch(int(i), float(loss), float(lr)) for i, loss, lr in content["history"]),
        )

    def _read(self) -> dict[str, Any]:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # of zipfile, pickle, torch and the system
            why = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
            raise self._refused(
                f"cannot be read, because it is incomplete or of another kind "
                f"({type(error).__name__}: {why})",
                Code.UNREADABLE,
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self._refused("is not a training checkpoint of this program", Code.WRONG_TYPE)
        if content.get("version") != VERSION:
            raise self._refused(
                f"must have version {VERSION} (got {content.get('version')})",
                Code.UNSUPPORTED,
                version=content.get("version"),
            )
        return content

    def _check_settings(self, stored: dict[str, Any]) -> None:
        # through JSON, because a tuple here is a list in the file
        given = json.loads(json.dumps(dict(self.settings)))
        if changed := differences(stored, given):
            raise self._refused(
                f"belongs to a training with other settings ({describe(changed)})",
                Code.MISMATCH,
                keys=sorted(changed),
            )

    def _check_model(self, stored: Mapping[str, Tensor], model: nn.Module) -> None:
        given = model.state_dict()
        wrong = sorted(set(stored) ^ set(given))
        wrong += [k for k in given if k in stored and stored[k].shape != given[k].shape]
        if wrong:
            shown = ", ".join(wrong[:3]) + (" …" if len(wrong) > 3 else "")
            raise self._refused(f"belongs to another model ({shown})", Code.MISMATCH, keys=wrong)

    def _refused(self, why: str, code: Code, **details: Any) -> UserError:
        return UserError(
            f"checkpoint {self.path} {why}: remove it to train from the start, or choose another "
            "folder",
            code,
            path=str(self.path),
            **details,
        )


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(stored, given) for every key that differs."""
    return {
        key: (stored.get(key), given.get(key))
        for key in {*stored, *given}
        if stored.get(key) != given.get(key)
    }


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`lr was 0.001, now 0.1; ...`, in JSON."""
    return "; ".join(
        f"{key} was {json.dumps(before)}, now {json.dumps(now)}"
        for key, (before, now) in sorted(changed.items())
    )
