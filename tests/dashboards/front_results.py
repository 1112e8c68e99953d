"""Made-up results of a study with everything that a row of the front's table can hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.study.front_table import FrontRow, front_rows
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import Certified, TrialResult, WorstClass, pack_bits

TARGET = LatencyTarget("cpu", "eager", "float32", 64)


def certified(bits: list[int], dense: list[int] | None) -> Certified:
    right = np.array(bits, dtype=bool)
    top1 = 100 * float(right.mean())
    made = Certified(len(bits), pack_bits(right), top1, top1 - 30, min(100.0, top1 + 30))
    if dense is None:
        return made
    worst = WorstClass("cat", 25.0, 4, False)
    return replace(
        made, change=-12.5, change_low=-40.0, change_high=15.0, lost=2, gained=1, worst=worst
    )


def results() -> list[TrialResult]:
    """Dense, two members of a front whose order held-out images reverse, one stopped trial."""
    dense = [1, 1, 1, 1, 1, 1, 1, 0]
    tome = RecordedRecipe.from_json({"tokens": {"method": "tome", "r": 8}})
    topk = RecordedRecipe(
        RecordedStep("resize", {"size": 160}),
        RecordedStep("topk", {"keep_rate": 0.7, "prune_layers": [3, 6]}),
    )
    common = {"params_m": 22.05}
    search = pack_bits(np.array(dense, dtype=bool))
    return [
        TrialResult(
            0, "finished", RecordedRecipe(), "k0", {"top1": 79.85, "gmacs": 4.608, **common},
            None, 8, search, 78.5, 81.2, certified=certified(dense, None),
        ),
        TrialResult(
            1, "finished", tome, "k1", {"top1": 79.1, "gmacs": 3.1, "peak_mb": 310.5, **common},
            None, 8, pack_bits(np.array([1, 1, 1, 1, 0, 1, 1, 0], dtype=bool)), 77.7, 80.4,
            seconds=1.23456, certified=certified([1, 1, 1, 0, 0, 1, 0, 1], dense),
        ),
        TrialResult(
            2, "finished", topk, "k2", {"top1": 75.0, "top5": 92.5, "gmacs": 2.25, **common},
            None, 8, search, certified=certified([1, 1, 1, 1, 1, 1, 0, 1], dense),
        ),
        TrialResult(
            3, "raced_out", tome, "k3", {"top1": 41.0, "gmacs": 2.9, **common}, None, 2, "wA==",
            reason="worse than trial 1",
        ),
    ]  # fmt: skip


LATENCIES = {1: Latency(20.0, 25.5, 40.0, 2.0, 1.9, 2.1, 30, TARGET)}
OBJECTIVES = ("top1", "gmacs")


def rows() -> list[FrontRow]:
    """The front, and the recovered front of one trial that gained a point."""
    measured = results()
    recovered = [
        replace(r, values={**r.values, "top1": r.values["top1"] + 1}, certified=None)
        for r in measured[1:2]
    ]
    front = front_rows(measured, LATENCIES, OBJECTIVES)
    return front + front_rows(recovered, LATENCIES, OBJECTIVES, measured)
