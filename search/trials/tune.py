"""Run trials with Ray Tune: proposals from the searcher to workers, until the study is done.

The searcher decides what is measured, early stopping whether a trial goes on, the worker how it is
measured; nothing is decided here.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import ray
from ray import tune

from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.searcher import FrontSearcher
from vitpareto.search.trials.trial_actor import RUNG
from vitpareto.search.trials.tune_internals import DiskWatch, DropReport, RungScheduler

#: the searcher ends the study, not Ray's number of samples
UNLIMITED = 2**31


def run_tune(
    searcher: FrontSearcher, trainable: type[tune.Trainable], resources: TrialResources
) -> None:
    """Run the searcher's proposals until it ends the study.

    Args:
        trainable: measures proposals (`trial_actor.trainable_of`); it must be reusable.

    Raises:
        BadInput: a worker cannot take part, because its code or its images differ.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    folder = searcher.session.folder.folder.absolute()
    # Where workers fill the cluster, one proposal is made ahead while they are busy. Not with one
    # worker, so that the same seed gives the same trials; not where the proposal would start too.
    full = resources.fit(ray.cluster_resources()) <= resources.workers
    ahead = 1 if resources.workers > 1 and full else 0
    with _scratch(folder / "ray") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=UNLIMITED,
                scheduler=RungScheduler(searcher, resources.workers),
                max_concurrent_trials=resources.workers + ahead,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[DropReport(RUNG), DiskWatch(folder)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()
    if searcher.refusal is not None:
        raise searcher.refusal


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for Ray's record of the run, which is never read; removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
