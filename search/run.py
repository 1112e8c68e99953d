"""Start, continue and finish a study; measure one recipe without one.

`prepare` looks at everything that can be wrong before anything is started; `search` needs a running
Ray (the caller's: `clusters` starts it) and knows nothing of pictures: hooks are told of results.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import logging
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from ray import tune
from torch import nn

import methods
from methods import ModelShape, Recipe
from search.config import IDENTITY, SearchConfig
from search.cost import device_name, latency, recipe_macs
from search.datasets import Data, Preprocess, check_head, open_data
from search.errors import UserError
from search.models import MappedModel, check_trained, fingerprint, load_model, num_classes
from search.pareto import front_of
from search.results import OBJECTIVES, Latency, TrialResult
from search.searcher import FrontSearcher, Tally
from search.space import Space
from search.store import StudyFolder
from search.trial import RecipeTrial, Task, Workplace, run_trial, window_violation

Hook = Callable[[TrialResult | None, Tally], None]
DecodeProgress = Callable[[int, int], None]

#: proposals drawn to see whether a budget window can be reached at all
WINDOW_PROBES = 300
VERSIONED = ("timm", "ray", "optuna", "vitpareto")


@dataclass
class Prepared:
    """A job whose every part has been looked at: model, data, space, device, window."""

    config: SearchConfig
    folder: StudyFolder
    model: nn.Module
    shape: ModelShape
    preprocess: Preprocess
    data: Data
    head_indices: tuple[int, ...] | None
    device: str
    space: Space
    reshape: Callable[[Recipe], ModelShape]

    @functools.cached_property
    def model_fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def identity(self) -> dict[str, Any]:
        """What the study's numbers depend on (`StudyFolder.settle` refuses to mix)."""
        config = self.config.plain()
        kept = {k: config.get(k) for k in IDENTITY if k not in ("weights", "data", "device")}
        return {
            **kept,
            "methods": list(self.config.study_methods),
            "device": torch.device(self.device).type,
            "model_fingerprint": self.model_fingerprint,
            "data_fingerprint": self.data.fingerprint,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """What made a result: goes into every result file."""
        return {
            "versions": {
                **{name: _version(name) for name in VERSIONED},
                "torch": torch.__version__,  # with its build, which the package's version lacks
                "python": platform.python_version(),
            },
            "model": self.config.model,
            "model_fingerprint": self.model_fingerprint,
            "data": self.config.data,
            "data_fingerprint": self.data.fingerprint,
            "seed": self.config.seed,
            "device": device_name(self.device),
            "dtype": self.config.dtype,
            "batch": self.config.batch,
        }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def resolve_device(asked: str) -> str:
    """auto: the first GPU, or the CPU. UserError where CUDA is asked for and is not there."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda"):
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if there == 0:
            raise UserError(f"device {asked!r} is asked for, and torch sees no CUDA device here")
        if (torch.device(asked).index or 0) >= there:
            raise UserError(f"device {asked!r} is asked for, and torch sees {there} CUDA devices")
    return asked


def prepare(
    config: SearchConfig, decode: DecodeProgress | None = None, recipe: Recipe | None = None
) -> Prepared:
    """Look at every part of the job, decode its images and make its folder, before anything is
    started. BadInput for the first thing that is wrong. recipe: one that is to be measured, looked
    at before any image is.
    """
    folder = StudyFolder(Path(config.store) / config.name)
    space = Space.of(config.study_methods, config.space, config.fixed)
    device = resolve_device(config.device)
    model = load_model(config.model, Path(config.weights) if config.weights else None)
    shape, reshape = methods.model_shape(model), shape_finder(model)
    if recipe is not None:
        reduced = reshape(recipe)
        check_trained(recipe.checked(reduced), reduced)
    preprocess = Preprocess.of(model)
    data = open_data(
        config.data,
        preprocess,
        cache=Path(config.cache),
        seed=config.seed,
        images=config.images,
        progress=decode,
    )
    head = check_head(num_classes(model), data)
    prepared = Prepared(
        config, folder, model, shape, preprocess, data, head, device, space, reshape
    )
    _check_window(prepared)
    folder.check(prepared.identity)
    for split in ("search", "calibration"):  # decoded here, and too many corrupt images said here
        data.split(split)
    folder.create()
    return prepared


def shape_finder(model: nn.Module) -> Callable[[Recipe], ModelShape]:
    """Recipe -> the model's shape after its structural step, computed once a step."""
    skeleton = copy.deepcopy(model).to("meta")
    dense = methods.model_shape(skeleton)
    found: dict[str, ModelShape] = {}

    def shape_of(recipe: Recipe) -> ModelShape:
        if recipe.structure is None:
            return dense
        step = str(recipe.structure.plain())
        if step not in found:
            found[step] = recipe.reshape(dense, skeleton)[0]
        return found[step]

    return shape_of


def _check_window(prepared: Prepared) -> None:
    """UserError where no recipe of the space can meet the budget window."""
    config = prepared.config
    window = (config.min_gmacs, config.max_gmacs)
    if window == (None, None):
        return
    probe = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    costs = []
    for _ in range(WINDOW_PROBES):
        recipe = prepared.space.suggest(probe.ask(), prepared.shape)
        low, high = (m / 1e9 for m in recipe_macs(recipe, prepared.reshape(recipe)))
        costs += [low, high]
        outside = max(
            window_violation(low, (None, window[1])), window_violation(high, (window[0], None))
        )
        if outside <= 0:
            return
    dense = recipe_macs(Recipe(), prepared.shape)[0] / 1e9
    raise UserError(
        f"no recipe of {', '.join(prepared.space.methods)} costs between "
        f"{_bound(config.min_gmacs)} and {_bound(config.max_gmacs)} GMACs: they cost "
        f"{min(costs):.4g} to {max(costs):.4g}, the dense model {dense:.4g}"
    )


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


@dataclass(frozen=True)
class Crew:
    """How trials share a machine or cluster."""

    workers: int
    cpus: int
    gpus: float

    @classmethod
    def of(cls, config: SearchConfig, device: str, cpus: int, gpus: int) -> Crew:
        """cpus, gpus: what the cluster has. UserError where the job asks for more."""
        if device.startswith("cuda"):
            share = config.gpus_per_trial or 1.0
            if share > gpus:
                raise UserError(f"a trial asks for {share:g} GPUs: the cluster has {gpus}")
            workers = config.workers or max(1, int(gpus / share))
            crew = cls(workers, max(1, cpus // (2 * workers)), share)
        else:
            workers = config.workers or min(cpus, 8)
            crew = cls(workers, max(1, cpus // workers), 0.0)
        if "latency_ms" in config.objectives:
            # a latency is measured alone on its device, never beside another worker
            return cls(1, cpus, 1.0 if device.startswith("cuda") else 0.0)
        return crew


def search(
    prepared: Prepared, *, cpus: int, gpus: int, hooks: list[Hook] | None = None
) -> tuple[StudyFolder, Tally]:
    """Run (or continue) the study on the Ray that is there, until its trials are measured.

    Returns the study and how it ended; results are on disk whatever happens. UserError: another
    driver holds the study, its settings differ, or the store cannot be written.
    """
    config, folder = prepared.config, prepared.folder
    crew = Crew.of(config, prepared.device, cpus, gpus)
    with folder.locked():
        if not folder.exists:  # a study without its job could not be continued by name alone
            folder.write_job(config.plain())
        folder.settle(prepared.identity)
        folder.write_job(config.plain())
        epoch = uuid.uuid4().hex
        folder.start_epoch(epoch)
        task = make_task(prepared, epoch, threads=None if crew.gpus else crew.cpus)
        # Ray shows a worker its own GPUs alone, counted from 0
        task = replace(task, device=torch.device(task.device).type)
        searcher = FrontSearcher(
            folder,
            prepared.space,
            prepared.shape,
            objectives=config.objectives,
            sampler=config.sampler,
            seed=config.seed,
            trials=config.trials,
            window=task.window,
            reshape=prepared.reshape,
            hooks=hooks,
        )
        if searcher.done < config.trials:
            _run_tune(searcher, task, crew)
        else:
            searcher.tally.ended = f"{searcher.done} trials measured"
        if config.latency == "front" and searcher.tally.ended:
            time_front(folder, task, config.objectives, cpus, gpus)
    return folder, searcher.tally


def make_task(prepared: Prepared, epoch: str, threads: int | None) -> Task:
    """What the workers need, weights written and images decoded where they can map them."""
    config = prepared.config
    return Task(
        study=replace(prepared.folder, folder=prepared.folder.folder.absolute()),
        epoch=epoch,
        model=MappedModel.save(prepared.model, prepared.folder.weights.absolute()),
        search=prepared.data.split("search"),
        calibration=prepared.data.split("calibration"),
        preprocess=prepared.preprocess,
        head_indices=prepared.head_indices,
        device=prepared.device,
        dtype=config.dtype,
        batch=config.batch,
        threads=threads,
        window=(config.min_gmacs, config.max_gmacs),
        latency_batch=config.latency_batch if "latency_ms" in config.objectives else None,
        provenance=prepared.provenance,
    )


def _run_tune(searcher: FrontSearcher, task: Task, crew: Crew) -> None:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trainable = tune.with_resources(
        tune.with_parameters(RecipeTrial, task=task), {"cpu": crew.cpus, "gpu": crew.gpus}
    )
    # Ray wants a place for its own record of the run; nothing is ever read from it
    scratch = task.study.folder / "ray"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=2**31,  # the searcher says when the study is done
                max_concurrent_trials=crew.workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def time_front(
    folder: StudyFolder, task: Task, objectives: tuple[str, ...], cpus: int, gpus: int
) -> dict[int, Latency]:
    """Latency of every front member beside the dense model, alone on the device (decision 6)."""
    known = folder.latencies()
    config_batch = int(folder.job().get("latency_batch", 1))
    front = front_of(folder.results(), [OBJECTIVES[o] for o in objectives])
    todo = [
        (r.trial, r.resolved or r.recipe)
        for r in front
        if r.trial not in known and r.latency is None
    ]
    if todo:
        alone = ray.remote(_time_recipes).options(
            num_cpus=cpus, num_gpus=1 if task.device.startswith("cuda") and gpus else 0
        )
        found = ray.get(alone.remote(replace(task, threads=None), todo, config_batch))
        known = {**known, **found}
        folder.write_latencies(known)
    return known


def _time_recipes(
    task: Task, recipes: list[tuple[int, dict[str, Any]]], batch: int
) -> dict[int, Latency]:
    place = Workplace.open(task)
    images = place.images(batch)
    return {
        trial: latency(place.build(Recipe.from_dict(recipe)), place.dense, images)
        for trial, recipe in recipes
    }


def measure(
    config: SearchConfig, recipe: Recipe, decode: DecodeProgress | None = None
) -> tuple[TrialResult, TrialResult, Latency]:
    """One recipe and the dense model measured on the search images, in this process; no study.

    Returns (recipe's result, dense's result, latency beside dense). BadInput before any image is
    read: also for a method that needs training (`check_trained`).
    """
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vitpareto-measure-"))
        )
        config = replace(config, store=str(scratch), name="measure")
        prepared = prepare(config, decode, recipe)
        place = Workplace.open(make_task(prepared, epoch="", threads=None))
        dense = run_trial(place, 0, Recipe())
        result = run_trial(place, 1, recipe)
        resolved = Recipe.from_dict(result.resolved)
        timed = latency(place.build(resolved), place.dense, place.images(config.latency_batch))
    return result, dense, timed
