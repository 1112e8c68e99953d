"""SearchConfig: a validated job, from a YAML file, `--set key=value` and command-line options."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vitpareto import methods
from vitpareto.methods.engine.errors import nearest
from vitpareto.methods.engine.parameters import Choice, Float, Int, Parameter, check_values
from vitpareto.methods.engine.recipe_yaml import YamlLoader
from vitpareto.search.data.named import NAMES
from vitpareto.search.errors import UserError
from vitpareto.search.files.cache import default_cache
from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.runtimes.backends import RUNTIMES
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.optuna_storage import check_url
from vitpareto.search.study.samplers import SAMPLERS
from vitpareto.search.training.preparation import needs

DEFAULT_TRIALS, MOST_TRIALS = 100, 1_000_000
SEARCHABLE_OBJECTIVES = ("top1", "top5", "gmacs", "params_m", "latency_ms", "peak_mb")

#: What a study's numbers depend on: a study refuses to continue with another one.
IDENTITY = (
    "model", "data", "weights", "dtype", "device", "images", "seed", "objectives", "methods",
    "space", "fixed", "min_gmacs", "max_gmacs", "batch", "latency_batch", "sampler",
)  # fmt: skip
#: The same, where a method of the study is trained; an untrained study does not depend on them.
TRAINING_IDENTITY = ("train_epochs", "prepare_epochs", "lr", "train_batch")


@dataclass(frozen=True)
class SearchConfig:
    """One search job. Every field is a job key and, with dashes, a command-line option."""

    name: str = "study"
    model: str = "digits"
    data: str = "digits"
    weights: str | None = None
    trials: int | None = None
    time: str | None = None
    patience: int | None = None
    methods: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("top1", "gmacs")
    sampler: str = "tpe"
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch: int = 64
    gpus_per_trial: float | None = None
    images: int | None = None
    min_gmacs: float | None = None
    max_gmacs: float | None = None
    race: str = "on"
    race_error: float = 0.05
    certify: str = "front"
    latency: str = "front"
    latency_batch: int = 1
    latency_runtime: str = "eager"
    max_latency_ms: float | None = None
    latency_on: str | None = None
    train_epochs: int = 0
    prepare_epochs: int = 0
    lr: float = 1e-4
    train_batch: int = 128
    profile: str | None = None
    snap: str = "off"
    tracking_uri: str | None = None
    storage: str | None = None
    space: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    store: str = ""
    cache: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SearchConfig:
        """Checked and completed; UserError naming the key, what came and what is accepted."""
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise UserError(f"a job has no key {key!r}{nearest(str(key), known)}")
        values = {k: v for k, v in given.items() if v is not None}
        for key, on in (("latency", None), ("snap", None), ("certify", None), ("race", "on")):
            if values.get(key) is False:  # YAML reads a bare `off` as false, and `on` as true
                values[key] = "off"
            if on is not None and values.get(key) is True:
                values[key] = on
        lists = {k: _names(k, values.pop(k)) for k in ("methods", "objectives") if k in values}
        maps = {k: _mapping(k, values.pop(k)) for k in ("space", "fixed") if k in values}
        strings = {
            k: _string(k, values.pop(k))
            for k in (
                "name",
                "model",
                "data",
                "weights",
                "device",
                "store",
                "cache",
                "tracking_uri",
                "storage",
                "profile",
                "time",
                "latency_on",
            )
            if k in values
        }
        plain = {k: v for k, v in check_values(_PLAIN, values, "job").items() if v is not _UNSET}
        config = cls(**plain, **lists, **maps, **strings)  # type: ignore[arg-type]
        return dataclasses.replace(
            config,
            # a study is continued by name, from any folder
            model=_absolute(config.model, "local-dir:"),
            tracking_uri=config.tracking_uri and _absolute(config.tracking_uri, "sqlite:///"),
            storage=_database(config.storage),
            store=config.store or os.environ.get("VITPARETO_STORE", "") or "studies",
            cache=config.cache or str(default_cache()),
            data=_placed(config.data),
            weights=os.path.abspath(config.weights) if config.weights else None,
            profile=os.path.abspath(config.profile) if config.profile else None,
        )._checked()

    def _checked(self) -> SearchConfig:
        plain = self.name == Path(self.name).name and self.name.isprintable()
        if not self.name or not plain or self.name.startswith(".") or len(self.name.encode()) > 200:
            raise UserError(f"job.name is {self.name!r}: accepted is a plain folder name")
        for name in self.methods:
            key = needs(name)
            if key is not None and getattr(self, key) == 0:
                raise UserError(
                    f"job.methods names {name}, which needs training, and {key} is 0: give "
                    f"{key}, as in --{key.replace('_', '-')} 5"
                )
        if len(set(self.methods)) != len(self.methods):
            raise UserError(f"job.methods is {list(self.methods)}: accepted is each name once")
        for name in self.objectives:
            if name not in SEARCHABLE_OBJECTIVES:
                hint = nearest(name, SEARCHABLE_OBJECTIVES)
                raise UserError(f"unknown objective {name!r}{hint}")
        if "top1" not in self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise UserError(
                f"job.objectives is {list(self.objectives)}: top1 and others, each once"
            )
        if all(OBJECTIVES[o].direction == "maximize" for o in self.objectives):
            raise UserError(f"job.objectives is {list(self.objectives)}: a cost is missing (gmacs)")
        low, high = self.min_gmacs, self.max_gmacs
        if low is not None and high is not None and low > high:
            raise UserError(f"min_gmacs {low:g} is above max_gmacs {high:g}: no recipe fits")
        if self.time is not None and self.seconds is None:
            raise UserError(
                f"job.time is {self.time!r}: accepted is a number with s, m or h, as in 90s, 30m, "
                "1.5h"
            )
        if self.race == "on" and "top5" in self.objectives:
            raise UserError(
                "job.race is 'on', and top5 is an objective: trials are raced on top1 alone; give "
                "race: off"
            )
        if self.snap == "steps" and self.profile is None:
            raise UserError(
                "job.snap is 'steps', and there is no latency table whose steps they would be: "
                "give profile, a file of vitpareto profile"
            )
        share = self.gpus_per_trial
        if share is not None and share > 1 and not share.is_integer():
            raise UserError(
                f"job.gpus_per_trial is {share:g}: accepted is a fraction of one GPU, or whole GPUs"
            )
        if self.tracking_uri and re.search(r"//[^/@]*:[^/@]+@", self.tracking_uri):
            raise UserError(  # job.yaml stays in the store, and is shown to whoever sees the study
                "job.tracking_uri holds a password, which would be kept in job.yaml: give it as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address as "
                "MLFLOW_TRACKING_URI, in the environment"
            )
        for key, address in (("store", self.store), ("data", self.data)):
            if re.search(r"//[^/@]*@|[?&][^=]*(key|secret|token)=", address):
                raise UserError(  # it is kept in job.yaml, and is shown in MLflow and in logs
                    f"job.{key} holds credentials, which would be kept in job.yaml: give them in "
                    "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                    "GOOGLE_APPLICATION_CREDENTIALS), or give nodes a role"
                )
        if self.storage is not None:
            check_url(self.storage)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"job.device is {self.device!r}: accepted is auto, cpu, cuda or cuda:N")
        return self

    @property
    def budget(self) -> int | None:
        """Trials in all; None: as many as come."""
        return trials_in_all({"trials": self.trials, "time": self.time, "patience": self.patience})

    @property
    def until(self) -> str:
        """When the search stops, in words."""
        said = []
        if self.budget is not None:
            said.append(f"{self.budget} trials")
        if self.time is not None:
            said.append(f"for {self.time}")
        if self.patience is not None:
            said.append(f"until {self.patience} trials bring the front nothing")
        return " or ".join(said)

    @property
    def seconds(self) -> float | None:
        """`time` in seconds; None where it is not given, or is no time."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.time or "")
        if found is None or not float(found[1]):
            return None
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]

    @property
    def times_trials(self) -> bool:
        """Whether every trial's latency is measured, alone on its device: as an objective, or to
        keep within a limit.
        """
        return "latency_ms" in self.objectives or self.max_latency_ms is not None

    @property
    def study_methods(self) -> tuple[str, ...]:
        """What is searched: as asked, or everything but what needs training and has no epochs of
        it. Not dense.
        """
        chosen = self.methods or tuple(n for n in methods.names() if n not in self.untrained)
        return tuple(n for n in chosen if n != "dense")

    @property
    def untrained(self) -> dict[str, str]:
        """Methods that need training which the job gives no epochs, and the key that would."""
        keys = {n: needs(n) for n in methods.names()}
        return {n: key for n, key in keys.items() if key is not None and getattr(self, key) == 0}

    def plain(self) -> dict[str, Any]:
        """For YAML and JSON; keys at their default of None left out."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items() if v is not None}


def trials_in_all(job: Mapping[str, Any]) -> int | None:
    """As asked; where nothing of a job says when to stop, 100; else None, as many as come."""
    if all(job.get(key) is None for key in ("trials", "time", "patience")):
        return DEFAULT_TRIALS
    return job.get("trials")


_UNSET = None
_PLAIN: tuple[Parameter, ...] = (
    Int("trials", low=1, high=MOST_TRIALS, default=_UNSET),
    Int("patience", low=1, high=1_000_000, default=_UNSET),
    Choice("race", choices=("on", "off"), default="on"),
    Float("race_error", low=0.0, high=0.5, default=0.05, open_low=True),
    Choice("certify", choices=("front", "off"), default="front"),
    Choice("sampler", choices=SAMPLERS, default="tpe"),
    Int("seed", low=0, high=2**31 - 1, default=0),
    Int("workers", low=1, high=100_000, default=_UNSET),
    Choice("dtype", choices=tuple(DTYPES), default="float32"),
    Int("batch", low=1, high=65536, default=64),
    Float("gpus_per_trial", low=0.0, high=1024, default=_UNSET, open_low=True),
    Int("images", low=1, high=2**31 - 1, default=_UNSET),
    Float("min_gmacs", low=0.0, high=1e9, default=_UNSET),
    Float("max_gmacs", low=0.0, high=1e9, default=_UNSET),
    Choice("latency", choices=("front", "off"), default="front"),
    Int("latency_batch", low=1, high=65536, default=1),
    Choice("latency_runtime", choices=RUNTIMES, default="eager"),
    Float("max_latency_ms", low=0.0, high=1e9, default=_UNSET, open_low=True),
    Choice("snap", choices=("off", "steps"), default="off"),
    Int("train_epochs", low=0, high=100_000, default=0),
    Int("prepare_epochs", low=0, high=100_000, default=0),
    Float("lr", low=0.0, high=10.0, default=1e-4, open_low=True),
    Int("train_batch", low=1, high=65536, default=128),
)


def _absolute(address: str, scheme: str) -> str:
    """An address whose scheme names a path of this machine, with that path made absolute."""
    if not address.startswith(scheme):
        return address
    return scheme + os.path.abspath(address.removeprefix(scheme))


def _database(storage: str | None) -> str | None:
    """Where Optuna's trials go, None being the study's folder."""
    return None if storage in (None, "journal") else _absolute(str(storage), "sqlite:///")


def _placed(data: str) -> str:
    """Data whose folder is absolute, be it the data itself or behind a name (`imagenette:DIR`)."""
    name, _, folder = data.partition(":")
    if os.path.isdir(data):
        return os.path.abspath(data)
    if name in NAMES and folder:
        return f"{name}:{os.path.abspath(os.path.expanduser(folder))}"
    return data


def _names(key: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) for i in items):
        raise UserError(f"job.{key} is {value!r}: accepted is a list of names")
    return tuple(i.strip() for i in items if i.strip())


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"job.{key} is {value!r}: accepted is a mapping from METHOD.PARAMETER")
    return {str(k): v for k, v in value.items()}


def _string(key: str, value: Any) -> str:
    if not isinstance(value, (str, Path)):
        raise UserError(f"job.{key} is {value!r}: accepted is text")
    return str(value)


def read_job(path: Path | None, sets: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a user gave, later wins: the job file, `--set key=value`, options (None: not given).

    `--set space.topk.keep_rate=[0.5,0.9]` sets one entry of a mapping. Values are read as YAML.
    UserError where an option and a `--set` mean different values of one key: none is guessed.
    """
    job: dict[str, Any] = {}
    set_by: dict[str, str] = {}
    if path is not None:
        try:
            loaded = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
        except OSError as error:
            raise UserError(f"job file {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:  # a ValueError: not UTF-8, or no such date
            raise UserError(f"job file {path} is not YAML: {error}") from error
        if not isinstance(loaded, Mapping):
            raise UserError(f"job file {path} must hold keys and values, got {loaded!r}")
        job.update(loaded)
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--set takes KEY=VALUE, got {text!r}")
        try:
            parsed = yaml.load(value, YamlLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--set {key}: {value!r} is not a YAML value") from error
        head, _, rest = key.partition(".")
        if rest and head in ("space", "fixed"):
            job[head] = {**_mapping(head, job.get(head) or {}), rest: parsed}
        else:
            job[key] = parsed
            set_by[key] = text
    for key, value in options.items():
        if value is None:
            continue
        if key in set_by and _meant(key, job[key]) != _meant(key, value):
            raise UserError(
                f"{key} is given twice: {value!r} by --{key.replace('_', '-')}, {job[key]!r} by "
                f"--set {set_by[key]}; accepted is one of them"
            )
        job[key] = value
    return job


def _meant(key: str, value: Any) -> Any:
    """A job's value as a search takes it: `topk,tome` is [topk, tome], and a bare `off` is off."""
    meant = getattr(SearchConfig.of({key: value}), key)
    return os.path.abspath(meant) if key in ("store", "cache") else meant
