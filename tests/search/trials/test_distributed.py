"""Training in two processes gives what one gives: the same batches, shared out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from vitpareto.methods import Recipe
from vitpareto.methods.engine.preparation import SharedWeights
from vitpareto.methods.slicing.snapshots import TrajectorySnapshots
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.training.data_parallel import average_gradients, local_share, rank_and_size
from vitpareto.search.training.preparation_trainer import built_fresh
from vitpareto.search.training.settings import TrainingSettings
from vitpareto.search.trials.candidates import CandidateTrainer
from vitpareto.search.trials.distributed import DataParallel
from vitpareto.search.trials.job_check import CheckedJob, check_job
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.study_task import study_task, training_for
from vitpareto.search.trials.worker import Worker

pytestmark = pytest.mark.slow

TWO = DataParallel(2, cuda=False)
SETTINGS = TrainingSettings(epochs=1, lr=3e-4, batch=25)  # odd: the two shares differ


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> CheckedJob:
    folder = tmp_path_factory.mktemp("several")
    job = {"name": "s", "store": str(folder / "s"), "cache": str(folder / "c"), "device": "cpu",
           "methods": ["patchmerger", "tnt", "nvit"], "train_epochs": 1, "prepare_epochs": 1,
           "images": 50, "train_batch": 100}  # fmt: skip
    return check_job(SearchConfig.of(job))


def trainer(prepared: CheckedJob, several: DataParallel, store: Path) -> CandidateTrainer:
    training = training_for(prepared, SETTINGS, SETTINGS)
    training = replace(
        training, data_parallel=several, store=store, searched={"nvit": {"cost": 0.8}}
    )
    worker = Worker.open(study_task(prepared, threads=1))
    return CandidateTrainer(training, worker.dense, prepared.folder.artifacts)


def test_a_single_process_shares_nothing() -> None:
    images, labels = torch.rand(4, 3, 2, 2), torch.arange(4)
    same, also, share = local_share(images, labels)
    assert rank_and_size() == (0, 1) and same is images and also is labels and share == 1.0
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    before = model.weight.grad.clone()  # type: ignore[union-attr]
    assert average_gradients(model, 1.5, 0.3) == 1.5 and torch.equal(before, model.weight.grad)  # type: ignore[arg-type]


@pytest.mark.timeout(900)
def test_two_processes_train_like_one(prepared: CheckedJob, capacity: Any, tmp_path: Path) -> None:
    """A trial's own training, checkpoint included; the difference is rounding, which training
    multiplies: far below what one more step changes.
    """
    recipe = Recipe.of("patchmerger", prune_layers=[6], num_tokens=16)
    made: dict[int, dict[str, torch.Tensor]] = {}
    losses = {}
    for several in (DataParallel(), TWO):
        own = trainer(prepared, several, tmp_path)
        model = built_fresh(recipe, own.dense, SETTINGS)
        checkpoint = tmp_path / str(several.workers) / "state.pt"
        history = own.fit(model, SETTINGS, recipe, checkpoint)
        assert checkpoint.is_file() and not model.training
        assert not list(checkpoint.parent.glob("ray-*")), "nothing is left of Ray's record"
        made[several.workers] = {k: v.clone() for k, v in model.state_dict().items()}
        losses[several.workers] = [epoch.loss for epoch in history]
        start = built_fresh(recipe, own.dense, SETTINGS).state_dict()
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    moved = max((made[1][k] - start[k]).abs().max().item() for k in start)
    apart = max((made[1][k] - made[2][k]).abs().max().item() for k in start)
    assert moved > 1e-3 and apart < moved / 20, (moved, apart)
    # what one process kept, two go on from: all epochs are done, nothing is trained
    own = trainer(prepared, TWO, tmp_path)
    model = built_fresh(recipe, own.dense, SETTINGS)
    again = own.fit(model, SETTINGS, recipe, tmp_path / "1" / "state.pt")
    assert [e.loss for e in again] == losses[1]
    assert all(torch.equal(v, made[1][k]) for k, v in model.state_dict().items())


@pytest.mark.timeout(900)
def test_two_processes_prepare_like_one(
    prepared: CheckedJob, capacity: Any, tmp_path: Path
) -> None:
    """NViT's way down: the same candidates are cut, and kept where the next study finds them."""
    outcome = {}
    for several in (DataParallel(), TWO):
        own = trainer(prepared, several, tmp_path / str(several.workers))
        made = own.prepare("nvit")
        assert made.fresh and isinstance(made.outcome, TrajectorySnapshots)
        assert made.outcome.digests and all(map(made.artifacts.has, made.outcome.digests))
        outcome[several.workers] = [s.widths for s in made.outcome.snapshots]
    assert outcome[1] == outcome[2]


@pytest.mark.timeout(900)
def test_two_processes_prepare_heads_like_one(
    prepared: CheckedJob, capacity: Any, tmp_path: Path
) -> None:
    """TNT's noise is drawn in the forward: each process draws for its own images."""
    losses = {}
    for several in (DataParallel(), TWO):
        own = trainer(prepared, several, tmp_path / str(several.workers))
        made = own.prepare("tnt")
        assert made.fresh and isinstance(made.outcome, SharedWeights)
        assert made.artifacts.has(made.outcome.weights)
        losses[several.workers] = made.outcome.loss
    assert losses[2] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.timeout(900)
def test_an_error_in_a_process_is_raised_in_the_caller(capacity: Any, tmp_path: Path) -> None:
    def fails() -> None:
        raise FloatingPointError("the training loss became nan at epoch 0, step 3")

    with pytest.raises(FloatingPointError):
        TWO.run(fails, tmp_path)
    assert ray.is_initialized() and not list(tmp_path.glob("ray-*"))


def test_a_trial_on_several_gpus_holds_a_fraction_of_one() -> None:
    config = SearchConfig.of({"gpus_per_trial": 4})
    resources = TrialResources.of(config, "cuda", 32, 8)
    assert resources.workers == 2 and resources.gpus == 0.1
    assert TrialResources.of(replace(config, gpus_per_trial=1.0), "cuda", 32, 8).gpus == 1.0
