"""What a study's numbers depend on, and the check that a study is continued with the same.

Stored in study.json (and in recovered/recovery.json for a recovery).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.atomic import write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class StudyIdentity:
    """The settings, model and data that all results of a study share.

    Attributes:
        folder: the study's folder.
    """

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "study.json"

    @property
    def exists(self) -> bool:
        """Whether the study exists."""
        # not Path.is_file: that raises if a parent folder may not be entered
        return os.path.isfile(self.path)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured or proposed yet, so that the identity may still change."""
        proposed = any((self.folder / name).exists() for name in ("optuna.journal", "storage.json"))
        return not proposed and not any((self.folder / "trials").glob("[0-9]*"))

    def read(self) -> dict[str, Any]:
        """Return the identity, with its schema.

        Raises:
            UserError: the file cannot be read, is not an identity or has a newer schema.
        """
        study = self.folder.name
        try:
            identity = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} cannot be read: {error}", Code.UNREADABLE, study=study
            ) from error
        schema = identity.get("schema") if isinstance(identity, dict) else None
        if not isinstance(schema, int):
            raise UserError(
                f"{self.path} must have a schema number (got {schema!r}): this program did not "
                "write it",
                Code.UNREADABLE, study=study, schema=schema,
            )  # fmt: skip
        if schema > SCHEMA:
            raise UserError(
                f"the schema of study {study!r} must be at most {SCHEMA} for this version (got "
                f"{schema})",
                Code.UNSUPPORTED, study=study, schema=schema,
            )  # fmt: skip
        return identity

    def settle(self, identity: Mapping[str, Any]) -> None:
        """Write the identity of a new or empty study; check that of any other.

        Raises:
            UserError: see `check` and `read`.
        """
        if self.exists:
            self.read()  # a newer schema is refused, not overwritten
        if not self.exists or self.is_empty:
            write_atomic(self.path, json.dumps({"schema": SCHEMA, **identity}, indent=1))
            return
        self.check(identity)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Check that the study, if it exists and is not empty, has this identity.

        Raises:
            UserError: a setting differs, or the study's identity cannot be read.
        """
        if not self.exists:
            return
        stored = self.read()
        if self.is_empty:
            return
        differences = differing(stored, _as_json({"schema": SCHEMA, **identity}))
        if differences:
            raise UserError(
                f"the settings of study {self.folder.name!r} must stay the same, so that its "
                f"results can be compared (got {described(differences)}); use another --name or "
                "the old settings",
                Code.MISMATCH, study=self.folder.name, differences=differences,
            )  # fmt: skip


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value as it is read back, for example with lists for tuples."""
    return json.loads(json.dumps(value))


def differing(stored: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (stored, new) by key for the keys that differ."""
    return {
        key: (stored.get(key), new.get(key))
        for key in {**new, **stored}
        if stored.get(key) != new.get(key)
    }


def described(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Return `key: new, was stored; ...`."""
    return "; ".join(
        f"{key}: {_brief(new)}, was {_brief(stored)}" for key, (stored, new) in differences.items()
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
