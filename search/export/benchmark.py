"""Times the programs of a bundle beside the dense model, exported in the same way, on this machine.

The dense model has fresh weights, because its latency does not depend on them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitpareto.methods import BadInput, Code, Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.export import preprocessing
from vitpareto.search.export.bundle_result import BundleResult
from vitpareto.search.export.preprocessing import normalised
from vitpareto.search.export.reference_outputs import ReferenceOutputs
from vitpareto.search.export.verification import check_files, fresh_dense
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.runtimes.backends import Run, check_runtime, compile_model, onnx_session
from vitpareto.search.runtimes.exported_program import ClassifierGraph, write_programs

#: onnxruntime runs model.onnx; torch.export runs model.pt2, and torch.compile compiles that
RUNTIMES = ("onnxruntime", "torch.export", "torch.compile")
BATCHES = (1, 32)
ROUNDS = 30


@dataclass(frozen=True)
class ProgramTiming:
    """One runtime at one batch size. `macs_ratio` is the dense model's MACs over the bundle's."""

    runtime: str
    batch: int
    latency: Latency
    macs_ratio: float

    @property
    def efficiency(self) -> float:
        """The measured speed-up divided by `macs_ratio`."""
        return self.latency.speedup / self.macs_ratio


def bench_bundle(
    bundle: Path,
    *,
    runtimes: Sequence[str] = RUNTIMES[:2],
    batches: Sequence[int] = BATCHES,
    device: str = "cpu",
    rounds: int = ROUNDS,
    on_result: Callable[[ProgramTiming], None] = lambda _: None,
) -> list[ProgramTiming]:
    """Time the bundle's programs and the dense model's in alternation.

    Args:
        rounds: timed rounds per runtime and batch size.
        on_result: called with each timing as soon as it is measured.

    Raises:
        UserError: `bundle` is not a bundle, or a runtime is unknown or cannot run here.
        EditedBundle: as for `verify`.
    """
    _check(runtimes, batches, device)
    result = check_files(bundle)
    if result.dense is None:
        raise UserError(
            f"{bundle} has no dense result: its study has no reference trial",
            Code.MISSING,
            path=str(bundle),
        )
    ratio = result.dense["gmacs"] / result.cost["gmacs"]
    steps = json.loads((bundle / preprocessing.FILE).read_text(encoding="utf-8"))
    images = normalised(ReferenceOutputs.load(bundle / "verify.npz").images, steps)
    timings = []
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as scratch:
        graph = ClassifierGraph(dense_model(result), result.head_indices)
        write_programs(graph, images, Path(scratch))
        for runtime in runtimes:
            pruned, dense = (load_program(f, runtime, device) for f in (bundle, Path(scratch)))
            for batch in batches:
                inputs = images[torch.arange(batch) % len(images)].to(device)
                latency = measure_latency(pruned, dense, inputs, rounds=rounds, runtime=runtime)
                timings.append(ProgramTiming(runtime, batch, latency, ratio))
                on_result(timings[-1])
    return timings


def _check(runtimes: Sequence[str], batches: Sequence[int], device: str) -> None:
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise UserError.unknown(
                f"runtime {runtime!r} does not exist",
                runtime,
                RUNTIMES,
                key="runtime",
                got=runtime,
                accepted=RUNTIMES,
            )
        if runtime == "onnxruntime":
            check_runtime(runtime, device, "float32")
    if any(b < 1 for b in batches) or not batches:
        raise UserError(
            f"batches must be one or more numbers of at least 1 (got {list(batches)})",
            Code.OUT_OF_RANGE,
            key="batches",
            got=list(batches),
        )


def dense_model(result: BundleResult) -> nn.Module:
    """The dense model of a bundle, with fresh weights. Raises UserError if it cannot be built."""
    outputs = len(result.labels) if result.head_indices is None else None
    try:
        return Recipe().build(fresh_dense(result, outputs))
    except BadInput:
        raise
    except Exception as error:  # a hub that cannot be reached, or another version of timm
        raise UserError(
            f"the dense model {result.model} cannot be built here: {error}",
            Code.UNAVAILABLE,
            model=result.model,
        ) from error


def load_program(folder: Path, runtime: str, device: str) -> Run:
    """The program of a folder as a call on a batch."""
    if runtime == "onnxruntime":
        return onnx_session(folder / "model.onnx", device.startswith("cuda"))
    module = torch.export.load(folder / "model.pt2").module().to(device)
    return compile_model(module) if runtime == "torch.compile" else module
