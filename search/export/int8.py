"""A bundle's program in int8: onnxruntime's static quantisation, measured before it is offered.

Weights and the activations that meet them are 8 bits (per channel, calibrated on the calibration
split); products of two activations, attention's, stay float32: there scores decide which patches
are kept. Another arithmetic is another model, so accuracy and latency are measured anew, the dense
model's in int8 beside them.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.runtimes.backends import Run, onnx_session
from vitpareto.search.stats.intervals import paired_difference
from vitpareto.search.study.certificates import ERROR, flips

FILE = "model.int8.onnx"
#: calibration images, and images a call
CALIBRATION, BATCH = 256, 64
#: the batches that latencies are measured at
BATCHES = (1, 32)
#: operators of which those with weights become int8
OPERATORS = ("MatMul", "Gemm", "Conv")
#: points of top-1 that it may lose against the float32 program and still be called verified
MOST_LOST = 1.0


@dataclass(frozen=True)
class Int8:
    """The int8 program, measured. Accuracies in percent on the same search images: its own, the
    float32 program's and the dense model's in int8. `change` (points, with its 95 % interval) is
    its own minus float32's. `latency`: beside the dense model in int8, by batch; `over_float`: its
    speed-up over the float32 program. verified: measured, and no more than a point lost.
    """

    images: int
    calibrated_on: int
    top1: float
    float_top1: float
    dense_top1: float
    change: float
    change_low: float
    change_high: float
    agree: int
    latency: Mapping[int, Latency]
    over_float: Mapping[int, float]
    megabytes: float
    float_megabytes: float

    @property
    def verified(self) -> bool:
        return self.change >= -MOST_LOST

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "latency": {batch: timed.to_json() for batch, timed in self.latency.items()},
            "verified": self.verified,
            "most_lost": MOST_LOST,
        }

    def said(self) -> str:
        """One line."""
        fast = "; ".join(
            f"batch {batch}: {timed.speedup:.2f} times dense int8, "
            f"{self.over_float[batch]:.2f} times float32"
            for batch, timed in self.latency.items()
        )
        word = "verified" if self.verified else "NOT VERIFIED"
        return (
            f"int8 {word}: top-1 {self.top1:.2f} % on {self.images} search images, float32 "
            f"{self.float_top1:.2f} ({self.change:+.2f}, 95 %: {self.change_low:+.2f} to "
            f"{self.change_high:+.2f}), dense int8 {self.dense_top1:.2f}; {fast}; "
            f"{self.megabytes:.1f} MB, float32 {self.float_megabytes:.1f}"
        )


class _Images(CalibrationDataReader):
    def __init__(self, batches: Iterable[NDArray[np.float32]], name: str) -> None:
        self.left: Iterator[NDArray[np.float32]] = iter(batches)
        self.name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        found = next(self.left, None)
        return None if found is None else {self.name: found}


def quantised(program: Path, out: Path, images: Iterable[NDArray[np.float32]]) -> None:
    """Write the int8 form of an ONNX program, calibrated on batches of normalised images."""
    with tempfile.TemporaryDirectory(prefix="vitpareto-int8-") as scratch, _quietly():
        ready = Path(scratch) / "ready.onnx"
        # symbolic shapes of a graph that gathers by scores cannot all be inferred
        quant_pre_process(str(program), str(ready), skip_symbolic_shape=True)
        graph = onnx.load(ready).graph
        constants = {i.name for i in graph.initializer}
        without = [
            node.name
            for node in graph.node
            if node.op_type in OPERATORS and not constants & set(node.input)
        ]
        quantize_static(
            str(ready),
            str(out),
            _Images(images, graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_exclude=without,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    onnx.checker.check_model(str(out))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """onnxruntime's tools log to the root: advice on what is done here already."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)


def measure_int8(
    program: Path, dense: Path, out: Path, search: Split, calibration: Split, preprocess: Preprocess
) -> Int8:
    """Write `out`, the int8 form of `program`, and measure it beside float32 and the `dense`
    program's int8 form, on all search images.
    """
    most = min(CALIBRATION, len(calibration))
    with tempfile.TemporaryDirectory(prefix="vitpareto-int8-") as scratch:
        dense8 = Path(scratch) / "dense.onnx"
        for source, target in ((program, out), (dense, dense8)):
            calibrating = (x.numpy() for x, _ in _batches(calibration, preprocess, most))
            quantised(source, target, calibrating)
        runs = {
            name: onnx_session(path)
            for name, path in (("int8", out), ("float", program), ("dense", dense8))
        }
        right = {name: _right(run, search, preprocess) for name, run in runs.items()}
        own, before = right["int8"], right["float"]
        count = len(own)
        lost, gained = flips(own, before)
        low, high = paired_difference(gained, lost, count, ERROR)
        timed, over = {}, {}
        like, _ = next(_batches(search, preprocess))
        for batch in BATCHES:
            some = like[torch.arange(batch) % len(like)]
            timed[batch] = measure_latency(
                runs["int8"], runs["dense"], some, runtime="onnxruntime int8"
            )
            over[batch] = measure_latency(runs["int8"], runs["float"], some).speedup
    top1 = {name: 100 * float(found.mean()) for name, found in right.items()}
    return Int8(
        images=count,
        calibrated_on=most,
        top1=top1["int8"],
        float_top1=top1["float"],
        dense_top1=top1["dense"],
        change=100 * (gained - lost) / count,
        change_low=low,
        change_high=high,
        agree=int((own == before).sum()),
        latency=timed,
        over_float=over,
        megabytes=out.stat().st_size / 1e6,
        float_megabytes=program.stat().st_size / 1e6,
    )


def _batches(
    split: Split, preprocess: Preprocess, most: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the programs take them, with their labels; at most so many."""
    return batches_of(split, preprocess, batch=BATCH, device="cpu", dtype=torch.float32, stop=most)


def _right(run: Run, split: Split, preprocess: Preprocess) -> NDArray[np.bool_]:
    """Which images a program gets right."""
    found = []
    for batch, labels in _batches(split, preprocess):
        logits = run(batch)[0]
        found.append(logits.argmax(axis=1) == labels.numpy())
    return np.concatenate(found)
