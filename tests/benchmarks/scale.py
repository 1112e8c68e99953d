"""Many workers, simulated: what the driver of a search does for 64 of them over 5,000 trials.

    python tests/benchmarks/scale.py [--workers 64] [--trials 5000] [--seconds 3] [--sampler tpe]

Trials sleep; searcher, storage, durable results, MLflow and Ray are real, and all processes run on
this machine. Printed: trials a second and what part of their time workers were busy, the driver's
CPU a trial by what it was for, its memory, and what is stored a trial.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import optuna

from vitpareto.clusters.connect import local_cluster  # isort: skip  # before ray: it sets Ray's switches
from overhead import study_of  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--sampler", default="tpe")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("vitpareto").setLevel(logging.ERROR)
    # workers are given this folder, where `sleeping` lies
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    with local_cluster(given.workers):
        row = study_of(given.workers, given.trials, given.seconds, given.sampler, race=False)
    print(f"{row.workers} workers, {row.trials} trials of {given.seconds:g} s, {given.sampler}")
    rate = row.trials / row.seconds
    print(f"{rate:.1f} trials a second, workers busy {100 * row.busy:.1f} %")
    print(f"last fifth over first, driver CPU a trial: {row.growth:.2f}")
    for name, spent in sorted(row.parts.items(), key=lambda item: -item[1]):
        print(f"  {spent:6.1f} ms a trial: {name}")
    first, last = row.memory_mb
    print(f"driver's memory: {first:.0f} MB after a tenth of the trials, {last:.0f} MB at the end")
    for name, size in row.stored.items():
        print(f"  {size:7.0f} bytes a trial: {name}")


if __name__ == "__main__":
    main()
