"""How much a study loses when it is killed again and again: nothing, or a table that says what.

    python -m tests.benchmarks.faults [--kills 30] [--trials 600] [--seed 0]

kill -9 of the driver at random moments of one study, tracked in MLflow, and of random workers while
another runs. After each, what lies on disk and in MLflow is compared with what was there before
(`tests.search.faults`).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.search import faults
from tests.search.faults import Broken


def drivers(scratch: Path, cache: Path, kills: int, trials: int, seed: int) -> Broken:
    """From the first second of a start, before Ray is up, to the middle of its trials."""
    (scratch / "drivers").mkdir()
    draw = random.Random(seed)
    moments = [draw.uniform(1.0, 30.0) for _ in range(kills)]
    return kill_drivers(scratch / "drivers", cache, trials, moments)


def kill_drivers(store: Path, cache: Path, trials: int, moments: Iterable[float]) -> Broken:
    """One study whose driver is killed so many seconds after every start, then left to end.

    A killed driver's results are looked at before the next one begins.
    """
    seen: dict[str, bytes] = {}
    kills, log = 0, store / "log"
    changed: set[str] = set()
    for moment in moments:
        begun = faults.driver(store, cache, log, "--trials", trials)
        end = time.monotonic() + moment
        while time.monotonic() < end and begun.poll() is None:
            time.sleep(0.01)
        if begun.poll() is not None:
            assert begun.returncode == 0, log.read_text()[-3000:]
            break
        faults.kill(begun)
        kills += 1
        now = faults.results(store)
        changed |= {n for n in seen if now.get(n) != seen[n]}
        seen = now
    last = faults.driver(store, cache, log, "--trials", trials)
    code = last.wait(timeout=1500)
    assert code == 0, log.read_text()[-3000:]
    found = faults.look(store, "driver", kills, seen)
    found.changed = sorted({*found.changed, *changed})
    return found


def workers(scratch: Path, cache: Path, kills: int, trials: int, seed: int) -> Broken:
    """One study whose workers are killed every few seconds."""
    store, draw = scratch / "workers", random.Random(seed)
    store.mkdir()
    begun = faults.driver(store, cache, store / "log", "--trials", trials)
    done, seen = 0, dict[str, bytes]()
    while begun.poll() is None:
        time.sleep(draw.uniform(2, 8))
        running = faults.workers()
        if running and done < kills:
            seen = faults.results(store)
            faults.kill_process(draw.choice(running))
            done += 1
    assert begun.returncode == 0, (store / "log").read_text()[-3000:]
    return faults.look(store, "worker", done, seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(
        "| killed | times | trials | lost | changed | measured twice | failed | unequal in MLflow |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for part in (drivers, workers):
            at = Path(scratch)
            one = part(at, at / "cache", given.kills, given.trials, given.seed)
            print(
                f"| {one.what} | {one.kills} | {one.trials} | {len(one.lost)} | "
                f"{len(one.changed)} | {len(one.twice)} | {len(one.failed)} | "
                f"{len(one.unequal)} |",
                flush=True,
            )
            for said in (one.lost, one.changed, one.twice, one.failed, one.unequal):
                if said:
                    print("   ", "; ".join(said[:10]))


if __name__ == "__main__":
    main()
