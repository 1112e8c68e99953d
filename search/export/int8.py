"""The int8 program of a bundle: onnxruntime's static quantisation, measured on the search images.

Weights and the activations that meet them are quantised to 8 bits, per channel, with ranges from
the calibration split. Products of two activations, as in attention, stay in float32, because their
scores decide which patches are kept. Accuracy and latency are measured again, beside the dense
model in int8.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

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
from vitpareto.search.export.program_results import Int8Result
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.runtimes.backends import Run, onnx_session
from vitpareto.search.stats.intervals import paired_difference
from vitpareto.search.study.certificates import flips
from vitpareto.search.study.certification_record import ERROR

FILE = "model.int8.onnx"
#: number of calibration images, and images per call
CALIBRATION, BATCH = 256, 64
#: batch sizes at which latency is measured
BATCHES = (1, 32)
#: operators that are quantised if one of their inputs is a weight
OPERATORS = ("MatMul", "Gemm", "Conv")


class _CalibrationImages(CalibrationDataReader):
    """Batches of normalised images for the program's input `name`."""

    def __init__(self, batches: Iterable[NDArray[np.float32]], name: str) -> None:
        self.batches: Iterator[NDArray[np.float32]] = iter(batches)
        self.name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def quantise(program: Path, out: Path, images: Iterable[NDArray[np.float32]]) -> None:
    """Write the int8 form of an ONNX program, calibrated on batches of normalised images."""
    with tempfile.TemporaryDirectory(prefix="vitpareto-int8-") as scratch, _errors_only():
        ready = Path(scratch) / "ready.onnx"
        # not all symbolic shapes of a graph that gathers by scores can be inferred
        quant_pre_process(str(program), str(ready), skip_symbolic_shape=True)
        graph = onnx.load(ready).graph
        constants = {i.name for i in graph.initializer}
        without_weights = [
            node.name
            for node in graph.node
            if node.op_type in OPERATORS and not constants & set(node.input)
        ]
        quantize_static(
            str(ready),
            str(out),
            _CalibrationImages(images, graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_exclude=without_weights,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    onnx.checker.check_model(str(out))


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Hide what onnxruntime's tools log to the root logger: advice that is followed here."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)


def measure_int8(
    program: Path, dense: Path, out: Path, search: Split, calibration: Split, preprocess: Preprocess
) -> Int8Result:
    """Write `out`, the int8 form of `program`, and measure it on all search images.

    Args:
        program: the bundle's float32 ONNX program.
        dense: the dense model's float32 ONNX program, which is quantised and measured too.
    """
    calibrated_on = min(CALIBRATION, len(calibration))
    with tempfile.TemporaryDirectory(prefix="vitpareto-int8-") as scratch:
        dense_int8 = Path(scratch) / "dense.onnx"
        for source, target in ((program, out), (dense, dense_int8)):
            images = (x.numpy() for x, _ in _batches(calibration, preprocess, calibrated_on))
            quantise(source, target, images)
        runs = {
            name: onnx_session(path)
            for name, path in (("int8", out), ("float", program), ("dense", dense_int8))
        }
        correct = {name: _correct(run, search, preprocess) for name, run in runs.items()}
        latencies, over_float = _latencies(runs, search, preprocess)
    int8, float32 = correct["int8"], correct["float"]
    images_seen = len(int8)
    lost, gained = flips(int8, float32)
    low, high = paired_difference(gained, lost, images_seen, ERROR)
    top1 = {name: 100 * float(c.mean()) for name, c in correct.items()}
    return Int8Result(
        images=images_seen,
        calibrated_on=calibrated_on,
        top1=top1["int8"],
        float_top1=top1["float"],
        dense_top1=top1["dense"],
        change=100 * (gained - lost) / images_seen,
        change_low=low,
        change_high=high,
        agree=int((int8 == float32).sum()),
        latency=latencies,
        over_float=over_float,
        megabytes=out.stat().st_size / 1e6,
        float_megabytes=program.stat().st_size / 1e6,
    )


def _latencies(
    runs: dict[str, Run], search: Split, preprocess: Preprocess
) -> tuple[dict[int, Latency], dict[int, float]]:
    """By batch: latency beside the dense int8 program, and speed-up over the float32 program."""
    latencies, over_float = {}, {}
    images, _ = next(_batches(search, preprocess))
    for batch in BATCHES:
        inputs = images[torch.arange(batch) % len(images)]
        latencies[batch] = measure_latency(
            runs["int8"], runs["dense"], inputs, runtime="onnxruntime int8"
        )
        over_float[batch] = measure_latency(runs["int8"], runs["float"], inputs).speedup
    return latencies, over_float


def _batches(
    split: Split, preprocess: Preprocess, stop: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The programs' input [B, 3, H, W] and labels [B] of the split's first `stop` images."""
    return batches_of(split, preprocess, batch=BATCH, device="cpu", dtype=torch.float32, stop=stop)


def _correct(run: Run, split: Split, preprocess: Preprocess) -> NDArray[np.bool_]:
    """Which images a program classifies correctly, bool [M]."""
    correct = []
    for batch, labels in _batches(split, preprocess):
        logits = run(batch)[0]
        correct.append(logits.argmax(axis=1) == labels.numpy())
    return np.concatenate(correct)
