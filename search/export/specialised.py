"""Programs for one runtime or one batch size: an AOTInductor package, and ONNX with fixed shapes.

Each is marked "not verified" in result.json unless it was run here and compared with the measured
model in the same way as the bundle's own programs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitpareto.methods import Code
from vitpareto.search.errors import UserError
from vitpareto.search.export.program_results import SpecialisedProgram
from vitpareto.search.export.reference_outputs import ReferenceOutputs, compare
from vitpareto.search.export.torch_internals import LOAD_PACKAGE, compile_package
from vitpareto.search.runtimes.backends import onnx_session
from vitpareto.search.runtimes.exported_program import ClassifierGraph, trace_program, write_onnx

AOTI = "model.aoti.pt2"

#: run in a fresh process, so that a package that crashes does not end the export
_PROGRAM = f"""
import sys
import numpy as np
import torch

package, images, out = sys.argv[1:4]
run = {LOAD_PACKAGE.format(package="package")}
given = torch.from_numpy(np.load(images))
with torch.no_grad():
    found = [run(given[i : i + 2])[0] for i in range(0, len(given) - 1, 2)]
np.save(out, torch.cat(found).numpy())
"""


def write_aoti(
    graph: ClassifierGraph, images: Tensor, reference: ReferenceOutputs, bundle: Path
) -> SpecialisedProgram:
    """Write an AOTInductor package for this machine's CPU, run it and compare it.

    It takes any batch size of two or more. Raises UserError if it cannot be compiled, for which a
    C++ compiler is required.
    """
    path = bundle / AOTI
    try:
        program = trace_program(graph, images)
        compile_package(program, path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"AOTInductor cannot compile this model here: {reason}",
            Code.UNAVAILABLE,
            name="AOTInductor",
        ) from error
    runs = LOAD_PACKAGE.format(package=f'"{AOTI}"') + "(images)"
    with tempfile.TemporaryDirectory(prefix="vitpareto-aoti-") as scratch:
        inputs, out = Path(scratch) / "images.npy", Path(scratch) / "out.npy"
        np.save(inputs, images.numpy())
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, str(path.absolute()), str(inputs), str(out)],
            cwd=scratch, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return SpecialisedProgram(AOTI, False, f"it does not run here: {reason[:300]}", runs)
        logits = np.load(out)
    return _compared(AOTI, reference, logits, "in batches of 2", runs)


def write_static(
    graph: ClassifierGraph, images: Tensor, reference: ReferenceOutputs, bundle: Path, batch: int
) -> SpecialisedProgram:
    """Write model.bN.onnx, which takes batches of exactly N, for compilers that need fixed shapes.

    It is run with onnxruntime and compared. TensorRT is not run; `runs` holds its command.
    """
    name = f"model.b{batch}.onnx"
    write_onnx(trace_program(graph, images, batch), bundle / name)
    run = onnx_session(bundle / name)
    padded = images[torch.arange(-(-len(images) // batch) * batch) % len(images)]
    logits = np.concatenate([run(part)[0] for part in padded.split(batch)])[: len(images)]
    shape = "x".join(str(n) for n in (batch, *images.shape[1:]))
    runs = f"trtexec --onnx={name} --fp16 --saveEngine=model.engine  # input {shape}; not verified"
    return _compared(name, reference, logits, f"by onnxruntime at batch {batch}", runs)


def _compared(
    name: str, reference: ReferenceOutputs, logits: np.ndarray, how: str, runs: str
) -> SpecialisedProgram:
    found = compare(reference.first(len(logits)), logits, name, len(logits))
    why = (
        f"run {how} on {found.images} images: largest logit difference "
        f"{found.max_difference:.1e}, {found.near_tied} near-tied, {found.wrong} wrong"
    )
    return SpecialisedProgram(name, found.passed, why, runs)
