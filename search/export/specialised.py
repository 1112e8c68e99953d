"""Programs for one runtime or one size, beside a bundle's: an AOTInductor package, and ONNX of a
fixed batch for TensorRT.

Each is marked "not verified" in result.json unless it was run here and compared with the measured
model as the bundle's own programs are (`search.export.verification`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitpareto.search.errors import UserError
from vitpareto.search.export.verification import ReferenceOutputs, compare
from vitpareto.search.runtimes.backends import onnx_session
from vitpareto.search.runtimes.exported_program import ClassifierGraph, trace_program, write_onnx

AOTI = "model.aoti.pt2"

#: run in a fresh process: a package that crashes shall not take an export with it
_PROGRAM = """
import sys
import numpy as np
import torch

package, images, out = sys.argv[1:4]
run = torch._inductor.aoti_load_package(package)
given = torch.from_numpy(np.load(images))
with torch.no_grad():
    found = [run(given[i : i + 2])[0] for i in range(0, len(given) - 1, 2)]
np.save(out, torch.cat(found).numpy())
"""


@dataclass(frozen=True)
class SpecialisedProgram:
    """One more program. verified: it was run here and its logits are the measured model's; else
    `why` says what is known. runs: what to run it with.
    """

    file: str
    verified: bool
    why: str
    runs: str

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def said(self) -> str:
        """One line."""
        return f"{self.file}: {'verified' if self.verified else 'not verified'}, {self.why}"


def write_aoti(
    deployed: ClassifierGraph, images: Tensor, measured: ReferenceOutputs, bundle: Path
) -> SpecialisedProgram:
    """An AOTInductor package for this machine's CPU, any batch of two or more; run and compared.

    UserError where it cannot be compiled (it needs a C++ compiler).
    """
    path = bundle / AOTI
    try:
        torch._inductor.aoti_compile_and_package(
            trace_program(deployed, images), package_path=str(path)
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"AOTInductor cannot compile this model here: {first[:300]}") from error
    runs = f'torch._inductor.aoti_load_package("{AOTI}")(images)'
    with tempfile.TemporaryDirectory(prefix="vitpareto-aoti-") as scratch:
        given, out = Path(scratch) / "images.npy", Path(scratch) / "out.npy"
        np.save(given, images.numpy())
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, str(path.absolute()), str(given), str(out)],
            cwd=scratch, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
            return SpecialisedProgram(AOTI, False, f"it does not run here: {last[:300]}", runs)
        logits = np.load(out)
    return _compared(AOTI, measured, logits, "in batches of 2", runs)


def write_static(
    deployed: ClassifierGraph, images: Tensor, measured: ReferenceOutputs, bundle: Path, batch: int
) -> SpecialisedProgram:
    """model.bN.onnx, which takes batches of exactly N: for compilers that want fixed shapes. It is
    run with onnxruntime and compared; TensorRT is not run, and `runs` says how to.
    """
    name = f"model.b{batch}.onnx"
    write_onnx(trace_program(deployed, images, batch), bundle / name)
    run = onnx_session(bundle / name)
    whole = images[torch.arange(-(-len(images) // batch) * batch) % len(images)]
    logits = np.concatenate([run(part)[0] for part in whole.split(batch)])[: len(images)]
    side = "x".join(str(n) for n in (batch, *images.shape[1:]))
    runs = f"trtexec --onnx={name} --fp16 --saveEngine=model.engine  # input {side}; not verified"
    return _compared(name, measured, logits, f"by onnxruntime at batch {batch}", runs)


def _compared(
    name: str, measured: ReferenceOutputs, logits: np.ndarray, how: str, runs: str
) -> SpecialisedProgram:
    some = ReferenceOutputs(
        measured.images[: len(logits)], measured.labels[: len(logits)],
        measured.logits[: len(logits)], measured.other_logits[:, : len(logits)],
        measured.other_selection[:, : len(logits)],
    )  # fmt: skip
    found = compare(some, logits, name, len(logits))
    why = (
        f"run {how} on {found.images} images: largest logit difference "
        f"{found.max_difference:.1e}, {found.near_tied} near-tied, {found.wrong} wrong"
    )
    return SpecialisedProgram(name, found.good, why, runs)
