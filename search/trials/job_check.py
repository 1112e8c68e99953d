"""Check every part of a job before anything is started: model, data, space, device and budgets.

Does not import ray or optuna: a single measurement starts without them.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.data.datasets import Data, check_head, open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.device import device_name, resolve_device
from vitpareto.search.measure.latency_table import LatencyTable
from vitpareto.search.models.loading import check_trained, fingerprint, load_model, num_classes
from vitpareto.search.models.pretrained import read_pretrained
from vitpareto.search.runtimes.backends import check_runtime
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.study.window_check import check_window
from vitpareto.search.training.preparation_cache import epochs_key
from vitpareto.search.trials.latency_target import latency_target
from vitpareto.search.trials.nodes import Node, cluster_device, latency_slot
from vitpareto.search.versions import package_versions

#: called with (images decoded, images in all)
DecodeProgress = Callable[[int, int], None]

#: packages whose versions are part of a result's provenance
VERSIONED = ("timm", "ray", "optuna", "vitpareto", "torch")


@dataclass(frozen=True)
class CheckedModel:
    """The job's dense model. parts: the complete state dict of the measured recipe, if the job's
    weights file holds one.
    """

    dense: nn.Module
    shape: ModelShape
    reshape: ShapeFinder
    preprocess: Preprocess
    parts: Mapping[str, Tensor] | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.dense)


@dataclass(frozen=True)
class CheckedJob:
    """A job whose every part was checked.

    Attributes:
        head_indices: logits that the data's classes correspond to; None means all.
        left_out: methods that are not searched, with the reason.
        profile: the latency table that methods (`reads_latency_table`) and `snap` read.
        nodes: of the cluster that was joined; none if trials run on this machine's own Ray.
    """

    config: SearchConfig
    folder: StudyFolder
    model: CheckedModel
    data: Data
    head_indices: tuple[int, ...] | None
    device: str
    space: Space
    left_out: dict[str, str] = field(default_factory=dict)
    profile: LatencyTable | None = None
    nodes: tuple[Node, ...] = ()

    @property
    def window(self) -> BudgetWindow:
        return BudgetWindow(self.config.min_gmacs, self.config.max_gmacs)

    @property
    def trained(self) -> tuple[str, ...]:
        """The methods of this study that need training."""
        return tuple(m for m in self.space.methods if epochs_key(m) is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """What the study's numbers depend on; `StudyFolder.settle` refuses to mix others."""
        identity = self.config.identity(trained=bool(self.trained))
        if self.trained:
            identity["train_fingerprint"] = self.data.split("train").fingerprint
        if self.trained or self.config.snap != "off":
            identity["profile"] = None if self.profile is None else self.profile.digest
        return {
            **identity,
            "methods": list(self.space.methods),
            "device": torch.device(self.device).type,
            "model_fingerprint": self.model.fingerprint,
            "data_fingerprint": self.data.fingerprint,
        }

    @property
    def provenance(self) -> Provenance:
        """What made a result; part of every result file."""
        return Provenance(
            versions={**package_versions(*VERSIONED), "python": platform.python_version()},
            model=self.config.model,
            classes=len(self.data.classes),
            model_fingerprint=self.model.fingerprint,
            data=self.config.data,
            data_fingerprint=self.data.fingerprint,
            seed=self.config.seed,
            device=device_name(self.device),
            dtype=self.config.dtype,
            batch=self.config.batch,
        )


def check_job(
    config: SearchConfig,
    decode: DecodeProgress | None = None,
    recipe: Recipe | None = None,
    nodes: Sequence[Node] = (),
) -> CheckedJob:
    """Check every part of the job, decode its images and create its folder.

    Args:
        decode: called with the progress of decoding.
        recipe: the recipe of a single measurement, checked before any image is read.
        nodes: of the cluster that trials run on, if it is not this machine's own Ray.

    Raises BadInput for the first part that is wrong.
    """
    folder = StudyFolder.open(config.store, config.name)
    Space.of(config.study_methods, config.space, config.fixed)  # before a model is loaded
    device = cluster_device(config.device, nodes) if nodes else resolve_device(config.device)
    if nodes and config.latency_on is not None:
        latency_slot(config.latency_on, nodes)
    model = _check_model(config, recipe)
    data = open_data(
        config.data,
        model.preprocess,
        cache=Path(config.cache),
        seed=config.seed,
        images=config.images,
        progress=decode,
    )
    head = check_head(num_classes(model.dense), data)
    if (config.latency != "off" or config.times_trials) and not nodes:
        check_runtime(config.latency_runtime, device, config.dtype)
    names, left_out = _trainable(config, data)
    space = Space.of(names, config.space, config.fixed)
    profile = _check_profile(config, model.dense, space, device)
    if profile is not None and config.snap == "steps":
        profile.snap(model.shape.prefix + 1)  # refuses a table without steps
        space = replace(space, snap=profile.snap)
    job = CheckedJob(
        config, folder, model, data, head, device, space, left_out, profile, tuple(nodes)
    )
    check_window(space, job.window, model.reshape)
    for split in ("search", "calibration", *(("train",) if job.trained else ())):
        data.split(split)  # decodes it, and refuses it if too many images are corrupt
    folder.identity.check(job.identity)
    folder.create()
    return job


def _check_model(config: SearchConfig, recipe: Recipe | None) -> CheckedModel:
    """Load the dense model, and check the recipe of a single measurement against it."""
    weights = None if config.weights is None else Path(config.weights)
    dense = load_model(config.model, weights)
    reshape, parts = ShapeFinder(dense), None
    if recipe is not None and recipe.weights is None:  # trained weights may decide the shape
        recipe = recipe.checked(reshape(recipe))
        if weights is not None:
            parts = read_pretrained(weights).weights_for(recipe, dense)
        if parts is None:
            check_trained(recipe, reshape(recipe))
    return CheckedModel(dense, methods.model_shape(dense), reshape, Preprocess.of(dense), parts)


def _trainable(config: SearchConfig, data: Data) -> tuple[tuple[str, ...], dict[str, str]]:
    """The methods that can be searched on these images, and why others are left out.

    Raises UserError if a method that the job names needs training images and there are none.
    """
    left_out = {}
    if not config.methods:
        left_out = {n: f"it needs training, and {key} is 0" for n, key in config.untrained.items()}
    to_train = [n for n in config.study_methods if epochs_key(n) is not None]
    if "train" in data.sizes or not to_train:
        return config.study_methods, left_out
    why = f"{config.data} has no train split; put a train/ folder beside val/"
    if config.methods:
        raise UserError(
            f"methods that need training must have training images (got {to_train[0]!r}): {why}",
            Code.MISSING,
            key="methods",
            got=to_train[0],
            data=config.data,
        )
    left_out |= dict.fromkeys(to_train, f"it needs training, and {why}")
    return tuple(n for n in config.study_methods if n not in to_train), left_out


def _check_profile(
    config: SearchConfig, dense: nn.Module, space: Space, device: str
) -> LatencyTable | None:
    """The job's latency table. Raises UserError if it is of another target, or nothing reads it."""
    if config.profile is None:
        return None
    readers = [n for n in methods.names() if methods.get(n).reads_latency_table]
    if not set(readers) & set(space.methods) and config.snap == "off":
        raise UserError(
            f"profile must be read by a searched method (got {config.profile}); add one of "
            f"{', '.join(readers)} to methods, with prepare_epochs, or set snap: steps",
            Code.CONFLICT,
            key="profile",
            got=config.profile,
            accepted=readers,
        )
    profile = LatencyTable.load(Path(config.profile))
    profile.check(latency_target(config.latency_batch, config.dtype, device), dense)
    return profile
