"""Read the inputs of commands: studies by name, recipe files, trained weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpareto.search.study.job_keys import KEYS

if TYPE_CHECKING:
    from vitpareto.methods import Recipe
    from vitpareto.search.study.folder import StudyFolder


def chosen_store(store: str | None) -> str:
    """The store of a command: as given, VITPARETO_STORE, or ./studies."""
    return store or os.environ.get("VITPARETO_STORE") or "studies"


def find_study(store: str | None, name: str) -> StudyFolder:
    """The study of this name. Raises UserError if it does not exist."""
    from vitpareto.search.study.folder import StudyFolder

    return StudyFolder.find(chosen_store(store), name)


def cache_folder(cache: str | None) -> Path:
    """The folder of decoded images: as given, or the user's."""
    from vitpareto.search.files.cache import default_cache

    return Path(cache) if cache else default_cache()


def job_value(name: str, value: Any, option: str = "") -> Any:
    """The value of a job key that a command takes by itself, or the key's default if it was not
    given.

    Args:
        option: the command's option for the key [--NAME].

    Raises UserError for a value that the key does not accept.
    """
    from vitpareto.search.study.job import checked_value

    key = KEYS[name]
    return key.default if value is None else checked_value(name, value, option or key.option)


def job_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """`job_value` of each option."""
    return {name: job_value(name, value) for name, value in options.items()}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises UserError."""
    from vitpareto.methods import Code, Recipe
    from vitpareto.search.errors import UserError

    try:
        return Recipe.from_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"recipe file {path} cannot be read: {error.strerror}",
            Code.NOT_FOUND if isinstance(error, FileNotFoundError) else Code.UNREADABLE,
            path=str(path),
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"recipe file {path} must be UTF-8 text", Code.UNREADABLE, path=str(path)
        ) from error


def read_weights(path: Path | None) -> Mapping[str, Any] | None:
    """The state dict in a weights file; None without a file. Raises UserError."""
    from vitpareto.search.models.weight_files import read_weights_file

    return None if path is None else read_weights_file(path).state


def check_recipe_or_trial(recipe: Path | None, study: str | None, trial: int | None) -> None:
    """Raise UserError unless exactly one of --recipe and --study with --trial is given."""
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    if (recipe is None) == (study is None) or (study is None) != (trial is None):
        raise UserError(
            "give either --recipe FILE, or --study NAME with --trial N",
            Code.MISSING if recipe is None else Code.CONFLICT,
            options=("--recipe", "--study", "--trial"),
        )


def check_parent(option: str, path: Path) -> None:
    """Raise UserError, before anything is measured, if a file cannot be in its folder."""
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    if not path.parent.is_dir():
        raise UserError(
            f"{option} must be in a folder that exists (got {str(path)!r})",
            Code.NOT_FOUND,
            option=option,
            path=str(path.parent),
        )
