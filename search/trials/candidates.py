"""From a proposed recipe to one that names its weights: prepared for many, or trained for it.

A search proposes recipes without weights, as it cannot know them. `Trainer.make` finds or trains
them and keeps them by digest, so that the recipe it gives back is rebuilt from the study alone.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Recipe, Step, Untrained
from vitpareto.methods.slicing.sliced_model import Widths, sliced_model
from vitpareto.methods.structure.nvit import ETA, SHARE
from vitpareto.search.data.datasets import Preprocess, Split
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.measure.latency_table import Profile
from vitpareto.search.models.loading import fingerprint, num_classes
from vitpareto.search.models.weight_store import Artifacts
from vitpareto.search.training.batches import TrainImages, choose_augmentation
from vitpareto.search.training.loop import Epoch
from vitpareto.search.training.preparation import Preparation, needs, prepare_once
from vitpareto.search.training.settings import Settings, seeded, train
from vitpareto.search.training.snapshots import Snapshot, WayDown, reachable, snapshot_of
from vitpareto.search.trials.distributed import DataParallel


@dataclass(frozen=True)
class Training:
    """What a study's training needs; pickles small, images travel as paths.

    trial, prepare: settings of a trial's own training and of preparations; None where the job gives
    no epochs for them. targets: NViT's, that the search can propose; snapshots: its weights there,
    once they are prepared; profile: what its targets are fractions of (None: MACs). store: the
    folder of studies, where preparations lie.
    """

    split: Split
    calibration: Split
    preprocess: Preprocess
    data: str
    head_indices: tuple[int, ...] | None
    store: Path
    trial: Settings | None
    prepare: Settings | None
    targets: tuple[float, ...] = ()
    profile: Profile | None = None
    snapshots: dict[float, Snapshot] = field(default_factory=dict)
    several: DataParallel = DataParallel()

    def settings(self, method: str) -> Settings | None:
        """Those for a method's training; None where it needs none, or is given none."""
        key = needs(method)
        if key is None:
            return None
        return self.prepare if key == "prepare_epochs" else self.trial

    def asks(self, recipe: Recipe) -> bool:
        """Whether a recipe has to be given weights here."""
        steps = [s for s in (recipe.structure, recipe.tokens) if s is not None]
        return recipe.weights is None and any(self.settings(s.method) for s in steps)


@dataclass(frozen=True)
class Made:
    """A recipe that names its weights, and how it came by them (for the result's provenance)."""

    recipe: Recipe
    record: dict[str, Any]


class Trainer:
    """Makes candidates' weights in this process. `dense`: the study's model, float32, which trained
    candidates start from and follow.
    """

    def __init__(self, training: Training, dense: nn.Module, artifacts: Artifacts) -> None:
        self.training, self.dense, self.artifacts = training, dense, artifacts
        #: hears how far a training is, a line an epoch or round
        self.heard: Callable[[str], None] = lambda line: None

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.dense)

    # -- the model beneath a token step ------------------------------------------------------------

    def base(self, structure: Step | None) -> nn.Module:
        """The model that a token step acts on, with its weights. BadInput without a snapshot."""
        if structure is None:
            return self.dense
        if structure.method == "nvit":
            snapshot = snapshot_of(self.training.snapshots, structure.params["target"])
            model = sliced_model(self.dense, Widths.from_plain(snapshot.widths))
            model.load_state_dict(self.artifacts.load(snapshot.digest))
            return model.eval()
        return Recipe(structure=structure).reshape(methods.model_shape(self.dense), self.dense)[1]

    # -- weights -----------------------------------------------------------------------------------

    def make(
        self,
        recipe: Recipe,
        calibration: Callable[[], Iterable[Tensor]],
        checkpoint: Callable[[str], Path],
    ) -> Made:
        """The recipe with its weights named, and these among the study's artifacts.

        calibration: gives the batches that a method calibrates on, in float32. checkpoint: the file
        that a killed training goes on from, by the key of the candidate as asked for. Raises what
        building and training raise; FloatingPointError where a loss is not finite.
        """
        structure, tokens = recipe.structure, recipe.tokens
        used: list[dict[str, Any]] = []
        digest = None
        if structure is not None and structure.method == "nvit":
            snapshot = snapshot_of(self.training.snapshots, structure.params["target"])
            digest = snapshot.digest
            used.append({"method": "nvit", "key": snapshot.key, "fresh": False})
        elif structure is not None and needs(structure.method) is not None:
            return self._trained(recipe, self.dense, recipe, checkpoint, used)
        if tokens is not None:
            base = self.base(structure)
            if needs(tokens.method) == "prepare_epochs":
                prepared = self.heads(base)
                below = "" if structure is None else str(Recipe(structure=structure))
                used.append({**prepared.plain(), "on": below})
                digest = str(prepared.outcome["weights"])
                self.artifacts.adopt(digest, prepared.artifacts)
            elif needs(tokens.method) is not None:
                return self._trained(recipe, base, Recipe(tokens=tokens), checkpoint, used)
            elif tokens.declared.needs_calibration(tokens.params):
                built = Recipe(tokens=tokens).build(base, calibration())
                resolved: Recipe = built.recipe  # type: ignore[assignment]
                recipe = replace(recipe, tokens=resolved.tokens)
        return Made(replace(recipe, weights=digest), {"prepared": used})

    def _trained(
        self,
        recipe: Recipe,
        base: nn.Module,
        onto: Recipe,
        checkpoint: Callable[[str], Path],
        used: list[dict[str, Any]],
    ) -> Made:
        """`recipe`, which is `onto` built on `base`, trained; the dense model is its teacher."""
        settings = self.training.trial
        assert settings is not None, "the job gives no epochs for what it proposes"
        begin = time.monotonic()
        model = self._fresh(onto, base, settings)
        key = recipe.key(methods.model_shape(model))
        history = self.fit(model, settings, recipe, checkpoint(key))
        digest = self.artifacts.save(model.state_dict())
        record = {
            **settings.plain(),
            "loss": history[-1].loss,
            "seconds": round(time.monotonic() - begin, 3),
        }
        return Made(replace(recipe, weights=digest), {"prepared": used, "training": record})

    def _fresh(self, recipe: Recipe, base: nn.Module, settings: Settings) -> nn.Module:
        """Built with the same fresh parts every time."""
        device = str(next(base.parameters()).device)
        with seeded(settings.seed, device), warnings.catch_warnings():
            warnings.simplefilter("ignore", Untrained)
            return recipe.build(base)

    def fit(
        self, model: nn.Module, settings: Settings, recipe: Recipe, checkpoint: Path
    ) -> list[Epoch]:
        """Train a built candidate in place with the dense model as its teacher."""
        own, heard = self.training, self.heard
        call = functools.partial(
            train,
            split=own.split,
            preprocess=own.preprocess,
            settings=settings,
            data=own.data,
            head_indices=own.head_indices,
            checkpoint=checkpoint,
            about={"model": self.fingerprint, "recipe": recipe.to_dict()},
            progress=lambda epoch: heard(f"{epoch}, of {settings.epochs}"),
        )
        if own.several.workers == 1:
            return call(model, teacher=self.dense)
        device = next(model.parameters()).device
        # each process has a device of its own: models travel by way of the CPU
        sent = functools.partial(_trained, call, on_cpu(model), on_cpu(self.dense), device.type)
        history, state = own.several.run(sent, checkpoint.parent)
        model.load_state_dict(state)
        model.eval()
        return history

    # -- preparations ------------------------------------------------------------------------------

    def heads(self, base: nn.Module) -> Preparation:
        """TNT's heads on a base, trained once for all of its settings: a complete state dict."""
        settings = self.training.prepare
        assert settings is not None, "the job gives no epochs for what it proposes"
        tnt = methods.get("tnt")
        shape = methods.model_shape(base)
        # any setting that drops something: the heads do not depend on which
        params = tnt.preset(tnt.presets[0], shape)

        def make(progress: Path, artifacts: Artifacts) -> dict[str, Any]:
            model = self._fresh(Recipe(tokens=Step("tnt", params)), base, settings)
            history = self.fit(model, settings, Recipe.of("tnt", **params), progress / "state.pt")
            return {"weights": artifacts.save(model.state_dict()), "loss": history[-1].loss}

        return prepare_once(self.training.store, "tnt", self.depends(base, settings), make)

    def snapshots(self) -> Preparation:
        """NViT's way down through every target that can be reached."""
        own = self.training
        settings = own.prepare
        assert settings is not None, "the job gives no epochs for what it proposes"
        shape, device = methods.model_shape(self.dense), str(next(self.dense.parameters()).device)
        cost = None if own.profile is None else own.profile.cost(shape.patches + shape.prefix)
        targets = reachable(self.dense, own.targets, cost)
        way = way_down(self.dense, own, targets, self.heard)
        what = {
            **self.depends(self.dense, settings),
            "calibration": own.calibration.fingerprint,
            "targets": list(targets),
            "eta": ETA,
            "share": SHARE,
            "profile": None if own.profile is None else own.profile.digest,
        }
        if own.several.workers == 1:
            return prepare_once(own.store, "nvit", what, way.run)
        sent = functools.partial(_way_down, on_cpu(self.dense), own, targets, self.heard, device)
        return prepare_once(
            own.store,
            "nvit",
            what,
            lambda progress, artifacts: own.several.run(
                functools.partial(sent, progress, artifacts), progress
            ),
        )

    def depends(self, base: nn.Module, settings: Settings) -> dict[str, Any]:
        """What every preparation depends on, in JSON's types."""
        own = self.training
        return {
            "model": fingerprint(base),
            "teacher": self.fingerprint,
            "images": own.split.fingerprint,
            "preprocess": own.preprocess.describe(),
            "head_indices": None if own.head_indices is None else list(own.head_indices),
            "settings": {
                **settings.plain(),
                "augment": choose_augmentation(settings.augment, own.preprocess, own.data),
            },
            "versions": {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__},
        }


def way_down(
    dense: nn.Module, own: Training, targets: tuple[float, ...], heard: Callable[[str], None]
) -> WayDown:
    """NViT's, of this dense model on its device."""
    settings, shape = own.prepare, methods.model_shape(dense)
    assert settings is not None
    device = str(next(dense.parameters()).device)
    return WayDown(
        dense,
        targets,
        lambda: labelled(own, settings.batch, device),
        TrainImages(
            own.split,
            own.preprocess,
            num_classes(dense),
            settings.batch,
            seed=settings.seed,
            augmentation=choose_augmentation(settings.augment, own.preprocess, own.data),
            head_indices=own.head_indices,
            device=device,
        ),
        settings,
        None if own.profile is None else own.profile.cost(shape.patches + shape.prefix),
        heard,
    )


# -- in each of several processes (`search.trials.distributed`)
# -----------------------------------------------


def on_cpu(model: nn.Module) -> nn.Module:
    """A copy there."""
    return copy.deepcopy(model).to("cpu")


def _trained(
    call: Callable[..., list[Epoch]], model: nn.Module, teacher: nn.Module, device: str
) -> tuple[list[Epoch], dict[str, Tensor]]:
    model = model.to(device)
    history = call(model, teacher=teacher.to(device).eval())
    return history, {k: v.detach().cpu() for k, v in model.state_dict().items()}


def _way_down(
    dense: nn.Module,
    own: Training,
    targets: tuple[float, ...],
    heard: Callable[[str], None],
    device: str,
    progress: Path,
    artifacts: Artifacts,
) -> dict[str, Any]:
    dense = dense.to(torch.device(device).type).eval()
    return way_down(dense, own, targets, heard).run(progress, artifacts)


def labelled(own: Training, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The calibration split in float32, with labels that are the head's."""
    head = None if own.head_indices is None else torch.tensor(own.head_indices, device=device)
    for images, labels in batches_of(
        own.calibration, own.preprocess, batch=batch, device=device, dtype=torch.float32
    ):
        yield images, labels if head is None else head[labels]
