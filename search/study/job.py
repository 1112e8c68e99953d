"""SearchConfig: a job whose every key was checked, and what follows from the keys together.

The keys are declared in `job_keys`; files and `--set` are read in `job_files`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vitpareto import methods
from vitpareto.methods.engine.bad_input import Code, closest, suggestion
from vitpareto.search.data.named import NAMES
from vitpareto.search.errors import UserError
from vitpareto.search.files.cache import default_cache
from vitpareto.search.study.job_keys import DEFAULT_TRIALS, KEYS, JobKeys
from vitpareto.search.study.job_rules import check_rules
from vitpareto.search.study.key_declarations import Identity
from vitpareto.search.study.key_kinds import OneOf, Rejected
from vitpareto.search.training.preparation_cache import epochs_key


@dataclass(frozen=True)
class SearchConfig(JobKeys):
    """One search job, checked and completed."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SearchConfig:
        """Check and complete a job; a key that is None counts as not given.

        Raises:
            UserError: names the key, the value and the rule.
        """
        for name in given:
            if name not in KEYS:
                raise UserError.unknown(
                    f"a job has no key {name!r}",
                    name,
                    KEYS,
                    key=name,
                )
        config = cls(**{k: checked_value(k, v) for k, v in given.items() if v is not None})
        # absolute: a study continues by its name, from any folder
        paths: dict[str, Any] = {
            key.name: _absolute(value, key.path_after) if value or key.path_after else None
            for key in KEYS.values()
            if key.path_after is not None and (value := getattr(config, key.name)) is not None
        }
        config = dataclasses.replace(
            config,
            **paths,
            tracking_uri=config.tracking_uri and _absolute(config.tracking_uri, "sqlite:///"),
            storage=_database(config.storage),
            store=config.store or os.environ.get("VITPARETO_STORE", "") or "studies",
            cache=config.cache or str(default_cache()),
            data=_absolute_data(config.data),
        )
        check_rules(config)
        return config

    def identity(self, *, trained: bool) -> dict[str, Any]:
        """The keys that a study's numbers depend on, as study.json holds them, without what it
        holds as a fingerprint.

        Args:
            trained: whether a method of the study is trained.
        """
        holds = {
            Identity.ALWAYS: True,
            Identity.IF_TRAINED: trained,
            Identity.IF_RACED: self.race != "off",
        }
        plain, identity = self.plain(), {}
        for key in KEYS.values():
            changed = key.identity is Identity.IF_CHANGED and plain.get(key.name) != key.default
            if changed or holds.get(key.identity, False):
                identity[key.name] = plain.get(key.name)
        return identity

    @property
    def budget(self) -> int | None:
        """Trials in total; None: unlimited."""
        return trials_in_all(self.trials, self.time, self.patience)

    @property
    def until(self) -> str:
        """When the search stops, in words."""
        ends = []
        if self.budget is not None:
            ends.append(f"{self.budget} trials")
        if self.time is not None:
            ends.append(f"for {self.time}")
        if self.patience is not None:
            ends.append(f"until {self.patience} trials without improvement of the front")
        return " or ".join(ends)

    @property
    def seconds(self) -> float | None:
        """`time` in seconds; None where it is not given."""
        if self.time is None:
            return None
        return float(self.time[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.time[-1]]

    @property
    def times_trials(self) -> bool:
        """Whether the latency of every trial is measured: as an objective, or for a limit."""
        return "latency_ms" in self.objectives or self.max_latency_ms is not None

    @property
    def study_methods(self) -> tuple[str, ...]:
        """Methods that are searched, without dense: as given, or all except `untrained`."""
        chosen = self.methods or tuple(n for n in methods.names() if n not in self.untrained)
        return tuple(n for n in chosen if not methods.get(n).is_reference)

    @property
    def untrained(self) -> dict[str, str]:
        """Methods that need training for which the job gives no epochs, and the key of these."""
        keys = {n: epochs_key(n) for n in methods.names()}
        return {n: key for n, key in keys.items() if key is not None and getattr(self, key) == 0}

    def plain(self) -> dict[str, Any]:
        """The job for YAML and JSON; keys that are None are left out."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items() if v is not None}


def checked_value(name: str, value: Any, option: str = "") -> Any:
    """Return one key's value in its canonical type.

    Args:
        option: of a command that is no search, by which the message names the key.

    Raises:
        UserError: the key does not accept the value.
    """
    kind = KEYS[name].kind
    try:
        return kind.check(value)
    except Rejected as rejected:
        choices = kind.choices if isinstance(kind, OneOf) and isinstance(value, str) else ()
        raise UserError(
            f"{option or f'job.{name}'} must be {kind.rule} (got {value!r})"
            f"{suggestion(value, choices)}",
            Code(rejected.code),
            key=name,
            got=value,
            accepted=kind.rule,
            closest=closest(value, choices),
            **({"option": option} if option else {}),
        ) from None


def trials_in_all(trials: int | None, time: str | None, patience: int | None) -> int | None:
    """Trials in total: as given; the default where the job names no end; else None, unlimited."""
    if trials is None and time is None and patience is None:
        return DEFAULT_TRIALS
    return trials


def _absolute(address: str, scheme: str) -> str:
    """Make the path behind `scheme` absolute; another address stays as it is."""
    if not address.startswith(scheme):
        return address
    return scheme + os.path.abspath(address.removeprefix(scheme))


def _database(storage: str | None) -> str | None:
    """The address of the database for Optuna's trials; None: the study's folder."""
    return None if storage in (None, "journal") else _absolute(str(storage), "sqlite:///")


def _absolute_data(data: str) -> str:
    """Make a data folder absolute, also behind a name (`imagenette:DIR`)."""
    name, _, folder = data.partition(":")
    if os.path.isdir(data):
        return os.path.abspath(data)
    if name in NAMES and folder:
        return f"{name}:{os.path.abspath(os.path.expanduser(folder))}"
    return data
