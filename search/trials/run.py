"""Start, continue and finish a study; measure one recipe without one.

`prepare` looks at everything that can be wrong before anything is started; `search` needs a running
Ray (the caller's: `clusters` starts it) and knows nothing of pictures: hooks are told of results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import platform
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, ModelShape, Recipe
from vitpareto.search.code_identity import code_fingerprint
from vitpareto.search.data.datasets import Data, Preprocess, check_head, open_data
from vitpareto.search.errors import UserError
from vitpareto.search.files.filesystems import is_remote
from vitpareto.search.measure.cost import device_name, recipe_macs
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.latency_table import Profile
from vitpareto.search.models.checkpoint_layouts import read_checkpoint
from vitpareto.search.models.loading import (
    MappedModel,
    check_trained,
    fingerprint,
    load_model,
    num_classes,
)
from vitpareto.search.runtimes.backends import check_runtime
from vitpareto.search.stats.racing import Race, rungs
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.job import IDENTITY, TRAINING_IDENTITY, SearchConfig
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.optuna_storage import close, open_storage
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.training.preparation_cache import epochs_key
from vitpareto.search.training.settings import Settings
from vitpareto.search.trials.candidates import StudyTraining
from vitpareto.search.trials.certification import certify_front
from vitpareto.search.trials.distributed import DataParallel
from vitpareto.search.trials.early_stopping import EarlyStopping
from vitpareto.search.trials.latency_actor import timing_on
from vitpareto.search.trials.node_checks import check_code, check_nodes
from vitpareto.search.trials.nodes import (
    Node,
    alive,
    check_target,
    cluster_device,
    largest,
    target_there,
)
from vitpareto.search.trials.preparations import prepare_shared, structural_outcomes
from vitpareto.search.trials.searcher import FrontSearcher, Tally
from vitpareto.search.trials.trial import Task, Worker, run_trial, window_violation
from vitpareto.search.trials.tune import TrialResources, run_tune

Hook = Callable[[TrialResult | None, Tally], None]
DecodeProgress = Callable[[int, int], None]

#: proposals drawn to see whether a budget window can be reached at all
WINDOW_PROBES = 300
VERSIONED = ("timm", "ray", "optuna", "vitpareto")

log = logging.getLogger("vitpareto")


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
    reshape: ShapeFinder
    left_out: dict[str, str]
    profile: Profile | None = None
    #: the complete state dict of the recipe's method, where the job's weights file holds it
    parts: Mapping[str, Tensor] | None = None
    #: of the cluster that is joined; none: trials run on this machine's own Ray
    nodes: tuple[Node, ...] = ()

    @functools.cached_property
    def model_fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def identity(self) -> dict[str, Any]:
        """What the study's numbers depend on (`StudyFolder.settle` refuses to mix)."""
        config = self.config.plain()
        kept = {k: config.get(k) for k in IDENTITY if k not in ("weights", "data", "device")}
        if self.trained:
            kept |= {k: config.get(k) for k in TRAINING_IDENTITY}
            kept["train_fingerprint"] = self.data.split("train").fingerprint
        if self.trained or config["snap"] != "off":
            kept["profile"] = None if self.profile is None else self.profile.digest
        if config["snap"] != "off":
            kept["snap"] = config["snap"]
        if config["latency_runtime"] != "eager":
            kept["latency_runtime"] = config["latency_runtime"]
        if config.get("max_latency_ms") is not None:
            kept["max_latency_ms"] = config["max_latency_ms"]
        if config.get("latency_on") is not None:
            kept["latency_on"] = config["latency_on"]
        if config["race"] != "off":
            kept["race_error"] = config["race_error"]
        return {
            **kept,
            "methods": list(self.space.methods),
            "device": torch.device(self.device).type,
            "model_fingerprint": self.model_fingerprint,
            "data_fingerprint": self.data.fingerprint,
        }

    @property
    def trained(self) -> tuple[str, ...]:
        """The methods of this study that are trained."""
        return tuple(m for m in self.space.methods if epochs_key(m) is not None)

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
            "classes": len(self.data.classes),
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
    config: SearchConfig,
    decode: DecodeProgress | None = None,
    recipe: Recipe | None = None,
    nodes: Sequence[Node] = (),
) -> Prepared:
    """Look at every part of the job, decode its images and make its folder, before anything is
    started. BadInput for the first thing that is wrong. recipe: one that is to be measured, looked
    at before any image is. nodes: of the cluster that trials will run on, where it is not this
    machine's own Ray.
    """
    folder = StudyFolder.open(config.store, config.name)
    Space.of(config.study_methods, config.space, config.fixed)  # before a model is loaded
    device = cluster_device(config.device, nodes) if nodes else resolve_device(config.device)
    if nodes and config.latency_on is not None:
        check_target(config.latency_on, nodes)
    model = load_model(config.model, Path(config.weights) if config.weights else None)
    shape, reshape = methods.model_shape(model), ShapeFinder(model)
    parts = None
    if recipe is not None and recipe.weights is None:  # with weights, the shape may be in them
        recipe = recipe.checked(reshape(recipe))
        if config.weights is not None:
            parts = read_checkpoint(Path(config.weights)).weights_for(recipe, model)
        if parts is None:
            check_trained(recipe, reshape(recipe))
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
    if (config.latency != "off" or config.times_trials) and not nodes:
        check_runtime(config.latency_runtime, device, config.dtype)
    chosen, left_out = _with_images(config, data)
    space = Space.of(chosen, config.space, config.fixed)
    profile = _profile(config, model, space, device)
    if profile is not None and config.snap == "steps":
        profile.snap(shape.prefix + 1)  # a table without steps is refused here
        space = replace(space, snap=profile.snap)
    prepared = Prepared(
        config, folder, model, shape, preprocess, data, head, device, space, reshape,
        left_out, profile, parts, tuple(nodes),
    )  # fmt: skip
    _check_window(prepared)
    splits = ["search", "calibration", *(["train"] if prepared.trained else [])]
    for split in splits:  # decoded here, and too many corrupt images said here
        data.split(split)
    folder.check(prepared.identity)
    folder.create()
    return prepared


def _with_images(config: SearchConfig, data: Data) -> tuple[tuple[str, ...], dict[str, str]]:
    """The methods that can be searched on these images, and why others are left out.

    UserError where one that is asked for by name has no images to be trained on.
    """
    left_out = {n: f"{key} is 0, and training is needed" for n, key in config.untrained.items()}
    if config.methods:
        left_out = {}
    lacking = [n for n in config.study_methods if epochs_key(n) is not None]
    if "train" in data.sizes or not lacking:
        return config.study_methods, left_out
    why = f"{config.data} has no train split: put a train/ folder beside val/"
    if config.methods:
        raise UserError(f"job.methods names {lacking[0]}, which needs training, and {why}")
    left_out |= dict.fromkeys(lacking, f"training is needed, and {why}")
    return tuple(n for n in config.study_methods if n not in lacking), left_out


def _profile(config: SearchConfig, model: nn.Module, space: Space, device: str) -> Profile | None:
    """The latency table. UserError if nothing reads it or it was measured on another target."""
    if config.profile is None:
        return None
    readers = [n for n in methods.names() if methods.get(n).reads_latency_table]
    if not set(readers) & set(space.methods) and config.snap == "off":
        raise UserError(
            f"job.profile must be read by a searched method (got {config.profile}): add one of "
            f"{', '.join(readers)} to methods, with prepare_epochs, or set snap: steps",
            Code.CONFLICT,
            key="profile",
            got=config.profile,
            accepted=readers,
        )
    profile = Profile.load(Path(config.profile))
    profile.check(target_there(config.latency_batch, config.dtype, device), model)
    return profile


def _check_window(prepared: Prepared) -> None:
    """UserError where no recipe of the space can meet the budget window."""
    config = prepared.config
    window = (config.min_gmacs, config.max_gmacs)
    if window == (None, None):
        return
    probe = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    costs = []
    for _ in range(WINDOW_PROBES):
        try:
            recipe = prepared.space.suggest(probe.ask(), prepared.reshape)
            low, high = (m / 1e9 for m in recipe_macs(recipe, prepared.reshape(recipe)))
        except BadInput:  # a choice that this model does not allow
            continue
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
        f"{min(costs, default=dense):.4g} to {max(costs, default=dense):.4g}, the dense model "
        f"{dense:.4g}"
    )


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def search(
    prepared: Prepared,
    *,
    cpus: int,
    gpus: int,
    hooks: list[Hook] | None = None,
    say: Callable[[str], None] = log.info,
) -> tuple[StudyFolder, Tally]:
    """Run (or continue) the study on the Ray that is there, until its trials are measured.

    `say` hears what becomes of the preparations, a line each.

    Returns the study and how it ended; results are on disk whatever happens. UserError: another
    driver holds the study, its settings differ, or the store cannot be written.
    """
    config, folder = prepared.config, prepared.folder
    crew = TrialResources.of(config, prepared.device, cpus, gpus, alive())
    check_code()
    with folder.locked(), contextlib.ExitStack() as stack:
        if not folder.exists:  # a study without its job could not be continued by name alone
            folder.write_job(config.plain())
        folder.settle(prepared.identity)
        folder.write_job(config.plain())
        epoch = uuid.uuid4().hex
        folder.start_epoch(epoch)
        task = make_task(prepared, epoch, threads=None if crew.gpus else crew.cpus)
        # Ray shows a worker its own GPUs alone, counted from 0
        task = replace(task, device=torch.device(task.device).type)
        task = looked_at(prepared, task, say)
        timer = None
        if config.latency_on is not None:
            timer = stack.enter_context(timing_on(config.latency_on, task, say))
        if config.times_trials:
            task = replace(task, timer=timer)
        judge = early_stopping_of(prepared)
        if judge is not None:
            images = len(prepared.data.split("search"))
            task = replace(task, rungs=rungs(images)[:-1])
        if config.budget is None or folder.durable_trials() < config.budget:
            task = prepare_shared(prepared.trained, task, crew.cpus, crew.gpus, say)
        prepared.reshape.use_outcomes(structural_outcomes(folder))
        storage = open_storage(folder, config.storage)
        searcher = FrontSearcher(
            folder,
            prepared.space,
            objectives=config.objectives,
            sampler=config.sampler,
            seed=config.seed,
            trials=config.budget,
            window=task.window,
            reshape=prepared.reshape,
            hooks=hooks,
            judge=judge,
            patience=config.patience,
            seconds=config.seconds,
            storage=storage,
        )
        try:
            if config.budget is None or searcher.done < config.budget:
                run_tune(searcher, task, crew)
            else:
                searcher.tally.ended = f"{searcher.done} trials measured"
        finally:
            close(storage)
        if config.latency == "front" and searcher.tally.ended:
            time_front(folder, task, config.objectives, timer)
        if config.certify == "front" and searcher.tally.ended:
            certify_front(
                folder, task, prepared.data, config.objectives,
                cpus=crew.cpus, gpus=crew.gpus, say=say,
            )  # fmt: skip
    return folder, searcher.tally


def looked_at(prepared: Prepared, task: Task, say: Callable[[str], None]) -> Task:
    """The task, with what other nodes than the driver's need; UserError where one of them cannot
    take part (`check_nodes`).
    """
    if not prepared.nodes:
        return task
    train = () if task.training is None else ("train",)
    data = prepared.data.only("search", "calibration", "held-out", *train)
    check_nodes(task, data, say)
    return replace(task, data=data)


def early_stopping_of(prepared: Prepared) -> EarlyStopping | None:
    """Who decides on every rung; None where everything is measured in full."""
    config = prepared.config
    objectives = [OBJECTIVES[o] for o in config.objectives]
    if config.race == "off":
        return None
    race = Race(len(prepared.data.split("search")), config.race_error, config.budget)
    return EarlyStopping(race, objectives, prepared.provenance)


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
        timed_batch=config.latency_batch,
        times_trials=config.times_trials,
        runtime=config.latency_runtime,
        max_latency_ms=config.max_latency_ms,
        provenance=prepared.provenance,
        training=_training(prepared),
        peak_first="peak_mb" in config.objectives,
        store=config.store if is_remote(config.store) else None,
        code=code_fingerprint(),
    )


def _training(prepared: Prepared) -> StudyTraining | None:
    """What the study's training needs; None where none of its methods is trained."""
    config = prepared.config
    if not prepared.trained:
        return None

    def settings(epochs: int) -> Settings | None:
        if not epochs:
            return None
        return Settings(epochs=epochs, lr=config.lr, batch=config.train_batch, seed=config.seed)

    return training_of(prepared, settings(config.train_epochs), settings(config.prepare_epochs))


def training_of(
    prepared: Prepared, trial: Settings | None, prepare: Settings | None = None
) -> StudyTraining:
    """What training with these settings needs. UserError where the data has no train split."""
    return StudyTraining(
        split=prepared.data.split("train"),
        calibration=prepared.data.split("calibration"),
        preprocess=prepared.preprocess,
        data=prepared.config.data,
        head_indices=prepared.head_indices,
        store=prepared.folder.folder.absolute().parent,
        trial=trial,
        prepare=prepare,
        searched=_searched(prepared.space),
        profile=prepared.profile,
        data_parallel=_data_parallel(prepared),
    )


def _data_parallel(prepared: Prepared) -> DataParallel:
    """How many GPUs train one candidate; a CPU's cores are shared by its threads alone."""
    if not prepared.device.startswith("cuda"):
        return DataParallel()
    return DataParallel(max(1, int(prepared.config.gpus_per_trial or 1)), cuda=True)


def _searched(space: Space) -> dict[str, dict[str, Any]]:
    """What the search can propose, by method: the parameters with their bounds, or fixed values."""
    return {
        name: {**{p.name: p for p in space.parameters[name]}, **space.fixed[name]}
        for name in space.methods
    }


def time_front(
    folder: StudyFolder, task: Task, objectives: tuple[str, ...], timer: Any = None
) -> dict[int, Latency]:
    """Latency of every front member beside the dense model, alone on the device (decision 6).

    timer: the actor of the job's `latency_on`; None: a whole node of those that measured.
    """
    known = folder.latencies()
    front = front_of(folder.results(), [OBJECTIVES[o] for o in objectives])
    todo = [
        (r.trial, r.resolved or r.recipe)
        for r in front
        if r.trial not in known and r.latency is None
    ]
    if todo:
        if timer is not None:
            found = ray.get(timer.timed_all.remote(todo))
        else:
            cuda = task.device.startswith("cuda")
            cpus = largest([n for n in alive() if n.gpus or not cuda])
            alone = ray.remote(_time_recipes).options(num_cpus=cpus, num_gpus=1 if cuda else 0)
            found = ray.get(alone.remote(replace(task, threads=None, timer=None), todo))
        known = {**known, **found}
        folder.write_latencies(known)
    return known


def _time_recipes(task: Task, recipes: list[tuple[int, dict[str, Any]]]) -> dict[int, Latency]:
    place = Worker.open(task)
    return {trial: place.timed(place.build(Recipe.from_dict(recipe))) for trial, recipe in recipes}


def measure(
    config: SearchConfig,
    recipe: Recipe,
    decode: DecodeProgress | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> tuple[TrialResult, TrialResult, Latency]:
    """One recipe and the dense model measured on the search images, in this process; no study.

    trained: the weights that the recipe names. Returns (recipe's result, dense's result, latency
    beside dense). BadInput before any image is read: also for a method that needs training and has
    no weights (`check_trained`).
    """
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vitpareto-measure-"))
        )
        config = replace(config, store=str(scratch), name="measure")
        prepared = prepare(config, decode, recipe)
        given = None if trained is None else prepared.folder.artifacts.save(trained)
        if prepared.parts is not None:
            recipe = replace(recipe, weights=prepared.folder.artifacts.save(prepared.parts))
        elif recipe.weights is not None and not prepared.folder.artifacts.has(recipe.weights):
            raise UserError(
                f"the recipe names the weights {recipe.weights}"
                + (f", those given are {given}" if given else "")
                + ": give the file that holds them as --trained FILE, or the trial as --study NAME "
                "--trial N"
            )
        place = Worker.open(make_task(prepared, epoch="", threads=None))
        dense = run_trial(place, 0, Recipe())
        result = run_trial(place, 1, recipe)
        resolved = Recipe.from_dict(result.resolved)
        timed = place.timed(place.build(resolved))
    return result, dense, timed
