"""The keys of a search job: each is declared here, once.

The command-line option, the check with its message, the JSON Schema, the table in
search/README.md, and which keys a study's identity, a package or a single measurement holds are
read from these declarations. Standard library only, so that `vitpareto --help` does not import
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vitpareto.search.choices import DTYPES, RUNTIMES, SAMPLERS, SEARCHABLE_OBJECTIVES
from vitpareto.search.study.key_declarations import Identity, Key, key
from vitpareto.search.study.key_kinds import Entries, Integer, Names, Number, OneOf, Text

#: trials of a job that names no end (`trials`, `time` or `patience`)
DEFAULT_TRIALS = 100


@dataclass(frozen=True)
class JobKeys:
    """All job keys in the order in which `job.yaml` holds them."""

    name: str = key(Text(), "study", "Name of the study; an existing study is continued")
    model: str = key(
        Text(),
        "digits",
        "Model: timm name, hf-hub:NAME, local-dir:PATH or digits",
        identity=Identity.ALWAYS,
        measured=True,
        path_after="local-dir:",
    )
    data: str = key(
        Text(), "digits",
        "Images: a folder, s3:// or gs:// address, digits, or cifar10, fashionmnist or imagenette, "
        "each with or without :DIR",
        identity=Identity.BY_CONTENT, measured=True,
    )  # fmt: skip
    weights: str | None = key(
        Text(), None, "Weights of the model: .safetensors, or .pth with tensors only",
        "timm's weights",
        identity=Identity.BY_CONTENT, measured=True, path_after="",
    )  # fmt: skip
    trials: int | None = key(
        Integer(low=1, high=1_000_000), None,
        "Trials in total, including the dense model and trials that are stopped early",
        f"{DEFAULT_TRIALS}; unlimited with time or patience",
    )  # fmt: skip
    time: str | None = key(
        Text(
            pattern=r"(?=.*[1-9])\d+(\.\d+)?\s*[smh]",
            form="a number above 0 with s, m or h, for example 90s, 30m or 1.5h",
        ),
        None, "Start no new trials after this long, for example 90s, 30m or 1.5h", "no limit",
    )  # fmt: skip
    patience: int | None = key(
        Integer(low=1, high=1_000_000), None,
        "Stop after this many trials without a 0.1 % gain in hypervolume", "no limit",
    )  # fmt: skip
    methods: tuple[str, ...] = key(
        Names(), (), "Methods to search, for example rajni,tome",
        "all, except methods whose training has no epochs",
        identity=Identity.ALWAYS,
    )  # fmt: skip
    objectives: tuple[str, ...] = key(
        Names(known=SEARCHABLE_OBJECTIVES), ("top1", "gmacs"),
        "Objectives: top1, at least one of gmacs, params_m, latency_ms, peak_mb; also top5",
        identity=Identity.ALWAYS,
    )  # fmt: skip
    sampler: str = key(
        OneOf(choices=SAMPLERS),
        "tpe",
        "Optuna sampler: tpe, nsga2 or random",
        identity=Identity.ALWAYS,
    )
    seed: int = key(
        Integer(),
        0,
        "Seed of the splits, the image order and the sampler",
        identity=Identity.ALWAYS,
        measured=True,
    )
    workers: int | None = key(
        Integer(low=1, high=100_000), None, "Trials that run at the same time", "as many as fit"
    )
    device: str = key(
        Text(pattern=r"auto|cpu|cuda(:\d+)?", form="auto, cpu, cuda or cuda:N"), "auto",
        "Device: auto, cpu, cuda or cuda:N",
        identity=Identity.BY_CONTENT, measured=True,
    )  # fmt: skip
    dtype: str = key(
        OneOf(choices=DTYPES),
        "float32",
        "Dtype: float32, bfloat16 or float16",
        identity=Identity.ALWAYS,
        measured=True,
    )
    batch: int = key(
        Integer(low=1, high=65536),
        64,
        "Images per forward pass",
        identity=Identity.ALWAYS,
        measured=True,
    )
    gpus_per_trial: float | None = key(
        Number(high=1024, open_low=True), None,
        "GPUs per trial; with 0.25, four trials share a GPU", "1",
    )  # fmt: skip
    images: int | None = key(
        Integer(low=1),
        None,
        "Number of search images to use",
        "all",
        identity=Identity.ALWAYS,
        measured=True,
    )
    min_gmacs: float | None = key(
        Number(),
        None,
        "Lower end of the budget window, GMACs per image",
        "no limit",
        identity=Identity.ALWAYS,
    )
    max_gmacs: float | None = key(
        Number(),
        None,
        "Upper end of the budget window, GMACs per image",
        "no limit",
        identity=Identity.ALWAYS,
    )
    race: str = key(
        OneOf(choices=("on", "off")), "on",
        "Stop dominated trials early: on, or off to measure every trial on all images",
    )  # fmt: skip
    race_error: float = key(
        Number(high=0.5, open_low=True), 0.05,
        "Probability per study of losing a front member to early stopping",
        identity=Identity.IF_RACED,
    )  # fmt: skip
    certify: str = key(
        OneOf(choices=("front", "off")), "front",
        "Measure the front on the held-out images at the end: front or off",
    )  # fmt: skip
    latency: str = key(
        OneOf(choices=("front", "off")), "front",
        "Measure the latency of the front at the end: front or off",
    )  # fmt: skip
    latency_batch: int = key(
        Integer(low=1, high=65536),
        1,
        "Batch size at which latency is timed",
        identity=Identity.ALWAYS,
        measured=True,
    )
    latency_runtime: str = key(
        OneOf(choices=RUNTIMES), "eager",
        "Runtime that is timed: eager, compiled, cudagraph or onnxruntime",
        identity=Identity.IF_CHANGED, measured=True,
    )  # fmt: skip
    max_latency_ms: float | None = key(
        Number(open_low=True), None,
        "Maximum latency of a trial in ms, at latency_batch in latency_runtime", "no limit",
        identity=Identity.IF_CHANGED,
    )  # fmt: skip
    latency_on: str | None = key(
        Text(), None,
        "Node on which latency is measured: accelerator:H200, or a custom resource of the node",
        "where trials run",
        identity=Identity.IF_CHANGED,
    )  # fmt: skip
    train_epochs: int = key(
        Integer(high=100_000), 0,
        "Training epochs of each trial whose method is trained; 0 excludes these methods",
        identity=Identity.IF_TRAINED,
    )  # fmt: skip
    prepare_epochs: int = key(
        Integer(high=100_000), 0,
        "Epochs of training that is done once per study; 0 excludes the methods that need it",
        identity=Identity.IF_TRAINED,
    )  # fmt: skip
    lr: float = key(
        Number(high=10.0, open_low=True),
        1e-4,
        "Learning rate of all training",
        identity=Identity.IF_TRAINED,
    )
    train_batch: int = key(
        Integer(low=1, high=65536), 128, "Images per training step", identity=Identity.IF_TRAINED
    )
    profile: str | None = key(
        Text(),
        None,
        "Latency table of `vitpareto profile`, for methods that read one and for snap",
        identity=Identity.BY_CONTENT,
        path_after="",
    )
    snap: str = key(
        OneOf(choices=("off", "steps")), "off",
        "Round token counts up while a block's latency in the profile stays the same: steps or off",
        identity=Identity.IF_CHANGED,
    )  # fmt: skip
    tracking_uri: str | None = key(
        Text(), None, "MLflow server; store for SQLite in the store; none for no MLflow",
        "MLFLOW_TRACKING_URI, or store",
    )  # fmt: skip
    storage: str | None = key(
        Text(), None,
        "Database for Optuna's trials, for example postgresql+psycopg://USER@HOST/DB",
        "the study's folder",
    )  # fmt: skip
    space: dict[str, Any] = key(
        Entries(),
        {},
        "Narrower ranges, for example {topk.keep_rate: [0.5, 0.9]}",
        identity=Identity.ALWAYS,
    )
    fixed: dict[str, Any] = key(
        Entries(),
        {},
        "Fixed parameters, for example {tome.inflection: 0, structure: none}",
        identity=Identity.ALWAYS,
    )
    store: str = key(
        Text(), "", "Studies: a folder, or s3:// or gs:// address", "VITPARETO_STORE, or ./studies"
    )
    cache: str = key(
        Text(),
        "",
        "Folder of decoded images",
        "VITPARETO_CACHE, or the user's cache folder",
        measured=True,
    )


def _declared() -> Iterator[Key]:
    for f in dataclasses.fields(JobKeys):
        yield Key(f.name, **f.metadata)


#: every job key by its name
KEYS: Mapping[str, Key] = {key.name: key for key in _declared()}
