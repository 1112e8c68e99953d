"""The programs of a bundle timed beside the dense model's, exported the same way: what ships is
what is timed, on the machine at hand.

The dense model has fresh weights of the bundle's architecture: its time does not depend on them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitpareto.methods import BadInput, Recipe
from vitpareto.methods.engine.errors import nearest
from vitpareto.search.errors import UserError
from vitpareto.search.export.verification import (
    ReferenceOutputs,
    check_files,
    fresh_dense,
    normalised,
)
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.runtimes.backends import Run, check_runtime, compile_model, onnx_session
from vitpareto.search.runtimes.exported_program import ClassifierGraph, write_programs

#: what runs model.onnx, what runs model.pt2, and that compiled
RUNTIMES = ("onnxruntime", "torch.export", "torch.compile")
BATCHES = (1, 32)
ROUNDS = 30


@dataclass(frozen=True)
class ProgramTiming:
    """One runtime at one batch. macs_ratio: dense's MACs over the bundle's."""

    runtime: str
    batch: int
    latency: Latency
    macs_ratio: float

    @property
    def efficiency(self) -> float:
        """The measured speed-up as a part of what the MACs promise."""
        return self.latency.speedup / self.macs_ratio


def bench_bundle(
    bundle: Path,
    *,
    runtimes: Sequence[str] = RUNTIMES[:2],
    batches: Sequence[int] = BATCHES,
    device: str = "cpu",
    rounds: int = ROUNDS,
    heard: Callable[[ProgramTiming], None] = lambda _: None,
) -> list[ProgramTiming]:
    """Time them in turn with the dense model's, `rounds` rounds each; `heard` gets each at once.

    UserError: no bundle, a runtime that is none or cannot run here; EditedBundle as in `verify`.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise UserError(f"runtime is {runtime!r}{nearest(runtime, RUNTIMES)}")
        if runtime == "onnxruntime":
            check_runtime(runtime, device, "float32")
    if any(b < 1 for b in batches) or not batches:
        raise UserError(f"batches are {list(batches)}: accepted are numbers of 1 or more")
    result = check_files(bundle)
    ratio = result["dense"]["gmacs"] / result["cost"]["gmacs"]
    preprocess = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    images = normalised(ReferenceOutputs.load(bundle / "verify.npz").images, preprocess)
    out = []
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as scratch:
        head = result["head_indices"]
        dense = ClassifierGraph(dense_model(result), None if head is None else tuple(head))
        write_programs(dense, images, Path(scratch))
        for runtime in runtimes:
            ours, theirs = (loaded(Path(p), runtime, device) for p in (bundle, scratch))
            for size in batches:
                batch = images[torch.arange(size) % len(images)].to(device)
                timed = measure_latency(ours, theirs, batch, rounds=rounds, runtime=runtime)
                out.append(ProgramTiming(runtime, size, timed, ratio))
                heard(out[-1])
    return out


def dense_model(result: dict[str, Any]) -> nn.Module:
    """The dense model of a bundle's result.json, unpruned, with fresh weights. UserError where it
    cannot be built here.
    """
    outputs = len(result["labels"]) if result["head_indices"] is None else None
    try:
        return Recipe().build(fresh_dense(result, outputs))
    except BadInput:
        raise
    except Exception as error:  # a model of a hub that cannot be reached, or of another timm
        raise UserError(
            f"{result['model']}, the dense model, cannot be built here: {error}"
        ) from error


def loaded(place: Path, runtime: str, device: str) -> Run:
    """A folder's program as a call on a batch."""
    if runtime == "onnxruntime":
        return onnx_session(place / "model.onnx", device.startswith("cuda"))
    module = torch.export.load(place / "model.pt2").module().to(device)
    return compile_model(module) if runtime == "torch.compile" else module
