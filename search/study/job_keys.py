"""The keys of a search job: each is declared here, once.

The command-line option, the check with its message, the JSON Schema and the table in
search/README.md are generated from these declarations. Standard library only, so that
`vitpareto --help` does not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitpareto.search.choices import DTYPES, RUNTIMES, SAMPLERS, SEARCHABLE_OBJECTIVES
from vitpareto.search.study.key_kinds import Entries, Integer, Kind, Names, Number, OneOf, Text

#: trials of a job that names no end (`trials`, `time` or `patience`)
DEFAULT_TRIALS = 100


@dataclass(frozen=True)
class Key:
    """One job key. `shown_default` describes the default in help texts and in the table."""

    name: str
    kind: Kind
    default: Any
    help: str
    shown_default: str

    @property
    def option(self) -> str:
        """The command-line option, for example --max-gmacs."""
        return f"--{self.name.replace('_', '-')}"


def key(kind: Kind, default: Any, help: str, shown: str = "") -> Any:
    """Declare a field of `JobKeys`. A mutable default is copied for every job."""
    about = {"kind": kind, "default": default, "help": help, "shown": shown}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class JobKeys:
    """All job keys in the order in which `job.yaml` holds them."""

    name: str = key(Text(), "study", "study name; an existing study is continued")
    model: str = key(Text(), "digits", "timm name, hf-hub:NAME, local-dir:PATH or digits")
    data: str = key(
        Text(), "digits",
        "image folder, s3:// or gs:// address, digits, or cifar10, fashionmnist or imagenette, "
        "each with or without :DIR",
    )  # fmt: skip
    weights: str | None = key(
        Text(), None, "weights of the model, .safetensors or .pth", "timm's weights"
    )
    trials: int | None = key(
        Integer(low=1, high=1_000_000), None,
        "trials in total, the dense model and trials stopped early included",
        f"{DEFAULT_TRIALS}, unlimited with time or patience",
    )  # fmt: skip
    time: str | None = key(
        Text(
            pattern=r"(?=.*[1-9])\d+(\.\d+)?\s*[smh]",
            form="a number above 0 with s, m or h, for example 90s, 30m or 1.5h",
        ),
        None, "start no new trials after this long, for example 90s, 30m or 1.5h", "no limit",
    )  # fmt: skip
    patience: int | None = key(
        Integer(low=1, high=1_000_000), None,
        "stop after this many trials without a 0.1 % gain in hypervolume", "no limit",
    )  # fmt: skip
    methods: tuple[str, ...] = key(
        Names(), (), "methods to search, for example rajni,tome",
        "all, except methods whose training has no epochs",
    )  # fmt: skip
    objectives: tuple[str, ...] = key(
        Names(known=SEARCHABLE_OBJECTIVES), ("top1", "gmacs"),
        f"top1 and at least one cost, of {', '.join(SEARCHABLE_OBJECTIVES)}",
    )  # fmt: skip
    sampler: str = key(OneOf(choices=SAMPLERS), "tpe", "Optuna sampler: tpe, nsga2 or random")
    seed: int = key(Integer(), 0, "seed of the splits, the image order and the sampler")
    workers: int | None = key(
        Integer(low=1, high=100_000), None, "trials that run at the same time", "as many as fit"
    )
    device: str = key(
        Text(pattern=r"auto|cpu|cuda(:\d+)?", form="auto, cpu, cuda or cuda:N"), "auto",
        "auto, cpu, cuda or cuda:N",
    )  # fmt: skip
    dtype: str = key(
        OneOf(choices=DTYPES), "float32", "dtype of the model: float32, bfloat16 or float16"
    )
    batch: int = key(Integer(low=1, high=65536), 64, "images per forward pass")
    gpus_per_trial: float | None = key(
        Number(high=1024, open_low=True), None,
        "GPUs per trial; 0.25 shares one GPU among four trials", "1",
    )  # fmt: skip
    images: int | None = key(
        Integer(low=1), None, "number of search images to use", "all search images"
    )
    min_gmacs: float | None = key(
        Number(), None, "lower end of the budget window, GMACs per image", "no limit"
    )
    max_gmacs: float | None = key(
        Number(), None, "upper end of the budget window, GMACs per image", "no limit"
    )
    race: str = key(
        OneOf(choices=("on", "off")), "on",
        "on: stop dominated trials early; off: measure every trial on all images",
    )  # fmt: skip
    race_error: float = key(
        Number(high=0.5, open_low=True), 0.05,
        "probability per study of losing a front member to early stopping",
    )  # fmt: skip
    certify: str = key(
        OneOf(choices=("front", "off")), "front",
        "front: measure the front on the held-out images at the end; off: do not",
    )  # fmt: skip
    latency: str = key(
        OneOf(choices=("front", "off")), "front",
        "front: measure the latency of the front at the end; off: do not",
    )  # fmt: skip
    latency_batch: int = key(Integer(low=1, high=65536), 1, "batch size for latency")
    latency_runtime: str = key(
        OneOf(choices=RUNTIMES), "eager", f"runtime for latency: {', '.join(RUNTIMES)}"
    )
    max_latency_ms: float | None = key(
        Number(open_low=True), None,
        "maximum latency of a trial in ms, at that batch size in that runtime", "no limit",
    )  # fmt: skip
    latency_on: str | None = key(
        Text(), None,
        "where latency is measured: accelerator:H200, or a resource of one node",
        "where trials run",
    )  # fmt: skip
    train_epochs: int = key(
        Integer(high=100_000), 0,
        "training epochs of each trial whose method is trained in it; 0 leaves such methods out",
    )  # fmt: skip
    prepare_epochs: int = key(
        Integer(high=100_000), 0,
        "epochs of training that is done once per study (TNT, NViT); 0 leaves such methods out",
    )  # fmt: skip
    lr: float = key(Number(high=10.0, open_low=True), 1e-4, "learning rate of all training")
    train_batch: int = key(Integer(low=1, high=65536), 128, "images per training step")
    profile: str | None = key(
        Text(), None, "latency table of `vitpareto profile`: NViT prunes to fractions of its time"
    )
    snap: str = key(
        OneOf(choices=("off", "steps")), "off",
        "steps: keep as many tokens as cost the same in the latency table; off: do not",
    )  # fmt: skip
    tracking_uri: str | None = key(
        Text(), None, "MLflow server; store: SQLite in the store; none: no MLflow",
        "MLFLOW_TRACKING_URI, or store",
    )  # fmt: skip
    storage: str | None = key(
        Text(), None,
        "database for Optuna's trials, postgresql+psycopg://USER@HOST/DB", "the study's folder",
    )  # fmt: skip
    space: dict[str, Any] = key(
        Entries(), {},
        "narrower ranges: {topk.keep_rate: [0.5, 0.9]}; structure lists what may lie beneath",
    )  # fmt: skip
    fixed: dict[str, Any] = key(
        Entries(), {}, "fixed parameters: {tome.inflection: 0}, {structure: none}"
    )
    store: str = key(
        Text(), "", "folder of studies, or s3:// or gs:// address", "VITPARETO_STORE, or ./studies"
    )
    cache: str = key(
        Text(), "", "folder of decoded images",
        "VITPARETO_CACHE, or the user's cache folder",
    )  # fmt: skip


def _shown(default: Any) -> str:
    if default is None or default == {}:
        return "none"
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _declared() -> Iterator[Key]:
    for f in dataclasses.fields(JobKeys):
        about = f.metadata
        shown = about["shown"] or _shown(about["default"])
        yield Key(f.name, about["kind"], about["default"], about["help"], shown)


#: every job key by its name
KEYS: Mapping[str, Key] = {key.name: key for key in _declared()}
