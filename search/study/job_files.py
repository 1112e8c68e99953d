"""Read a job as a user gives it: a YAML file, `--set KEY=VALUE` and command-line options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vitpareto.methods.engine.bad_input import Code
from vitpareto.methods.engine.recipe_yaml import YamlLoader
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig, checked_value
from vitpareto.search.study.job_keys import KEYS
from vitpareto.search.study.job_request import JobRequest


def read_job(path: Path | None, sets: Sequence[str], options: Mapping[str, Any]) -> JobRequest:
    """Return the keys that a user gave; later sources win: file, `--set`, options.

    Args:
        path: the job file; None: no file.
        sets: KEY=VALUE texts, the value in YAML. `space.topk.keep_rate=[0.5,0.9]` sets one entry
            of a mapping.
        options: command-line options by key; None: not given.

    Raises:
        UserError: the file or a text cannot be read, or an option and a `--set` give different
            values of one key.
    """
    job = {} if path is None else _read_file(path)
    set_by: dict[str, str] = {}
    for text in sets:
        key, value = _parsed(text)
        head, _, entry = key.partition(".")
        if entry and head in ("space", "fixed"):
            job[head] = {**checked_value(head, job.get(head) or {}), entry: value}
        else:
            job[key] = value
            set_by[key] = text
    for key, value in options.items():
        if value is None:
            continue
        if key in set_by and _meaning(key, job[key]) != _meaning(key, value):
            raise UserError(
                f"job.{key} must be given once (got {value!r} by {KEYS[key].option} and "
                f"{job[key]!r} by --set {set_by[key]})",
                Code.CONFLICT,
                key=key,
                option=value,
                set=job[key],
            )
        job[key] = value
    return JobRequest(job)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        raise UserError(
            f"job file {path} cannot be read: {error.strerror}",
            Code.NOT_FOUND if isinstance(error, FileNotFoundError) else Code.UNREADABLE,
            path=str(path),
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no such date
        raise UserError(
            f"job file {path} is not valid YAML: {error}", Code.UNREADABLE, path=str(path)
        ) from error
    if not isinstance(loaded, Mapping):
        raise UserError(
            f"job file {path} must hold keys and values (got {loaded!r})",
            Code.WRONG_TYPE,
            path=str(path),
            got=loaded,
        )
    return dict(loaded)


def _parsed(text: str) -> tuple[str, Any]:
    """Key and value of a KEY=VALUE text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(
            f"--set must be KEY=VALUE (got {text!r})", Code.WRONG_TYPE, key="set", got=text
        )
    try:
        return key, yaml.load(value, YamlLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"--set {key} must be a YAML value (got {value!r})",
            Code.UNREADABLE,
            key=key,
            got=value,
        ) from error


def _meaning(key: str, value: Any) -> Any:
    """A value as a search takes it: `topk,tome` is [topk, tome], and a bare `off` is off."""
    meaning = getattr(SearchConfig.of({key: value}), key)
    return os.path.abspath(meaning) if key in ("store", "cache") else meaning
