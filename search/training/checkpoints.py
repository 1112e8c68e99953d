"""Training that can be interrupted: its state after every epoch, in one file.

The file is written beside its place and renamed, so that it is whole or not there, and read with
torch's `weights_only=True`: tensors and plain values, no code. It says which training it belongs
to, and no other goes on from it.
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

from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.write_through import refresh
from vitpareto.search.training.loop import Epoch, State

FORMAT, VERSION = "vitpareto training", 1


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and what it depends on: `settings`, in JSON's types."""

    path: Path
    settings: Mapping[str, Any]

    def save(self, state: State) -> None:
        """Make a state durable, over the one before. Raises OSError where it cannot be written."""
        held = {
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
        # by way of memory: a full disk is then the system's error, and not one of torch's own
        whole = io.BytesIO()
        torch.save(held, whole)
        write_atomic(self.path, whole.getvalue())

    def load(self, model: nn.Module) -> State | None:
        """The state to go on from, on the CPU; None where nothing is kept yet. `model` is only
        compared with it: nothing is loaded here.

        Raises UserError, naming the file and what is wrong: cut short, another kind of file, a
        training with other settings (which), or of another model.
        """
        if not refresh(self.path):
            return None
        held = self._read()
        self._check_settings(json.loads(held["settings"]))
        self._check_model(held["model"], model)
        history = tuple(Epoch(int(i), float(loss), float(lr)) for i, loss, lr in held["history"])
        return State(held["model"], held["optimizer"], held["average"], held["random"], history)

    def _read(self) -> dict[str, Any]:
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile's, pickle's, torch's and the system's
            why = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
            raise self._refused(
                f"cannot be read ({type(error).__name__}: {why}): it was cut short, or is another "
                "kind of file"
            ) from error
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise self._refused("is no state of a training of this program")
        if held.get("version") != VERSION:
            raise self._refused(
                f"is of version {held.get('version')}, and this program reads {VERSION}"
            )
        return held

    def _check_settings(self, there: dict[str, Any]) -> None:
        # through JSON, so that a tuple here is the list there
        ours = json.loads(json.dumps(dict(self.settings)))
        if said := changes(there, ours):
            raise self._refused(f"is of another training: {said}")

    def _check_model(self, there: Mapping[str, Tensor], model: nn.Module) -> None:
        ours = model.state_dict()
        wrong = sorted(set(there) ^ set(ours))
        wrong += [k for k in ours if k in there and there[k].shape != ours[k].shape]
        if wrong:
            shown = ", ".join(wrong[:3]) + (" …" if len(wrong) > 3 else "")
            raise self._refused(f"is of another model: {shown}")

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"the checkpoint {self.path} {why}; remove it to train from the start, or write "
            "elsewhere"
        )


def changes(there: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """`key was … and is …` for every key that differs, in JSON; "" for none."""
    return "; ".join(
        f"{key} was {json.dumps(there.get(key))} and is {json.dumps(ours.get(key))}"
        for key in sorted({*there, *ours})
        if there.get(key) != ours.get(key)
    )
