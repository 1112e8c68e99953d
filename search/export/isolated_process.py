"""Runs a bundle's programs in a fresh process that can import neither this project nor timm."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCHES = (1, 2, 5)
#: top-level names that the process refuses to import: this project and timm
REFUSED = ("vitpareto", "timm")

#: Run with `python -I` in an empty folder. Arguments: bundle, refused names, batches, output file.
PROGRAM = r"""
import importlib, importlib.abc, json, sys
from pathlib import Path

bundle, refused, batches, out = Path(sys.argv[1]), *map(json.loads, sys.argv[2:4]), sys.argv[4]


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} cannot be imported here", name=name)


# before the finders of an editable install
sys.meta_path.insert(0, Refuse())
cannot = []
for name in refused:
    assert name not in sys.modules, name
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        cannot.append(name)

import numpy as np
import onnxruntime
import torch

preprocess = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
with np.load(bundle / "verify.npz", allow_pickle=False) as stored:
    images = stored["images"].astype(np.float32) / 255
mean, std = (np.array(preprocess[k], dtype=np.float32) for k in ("mean", "std"))
images = np.ascontiguousarray(((images - mean) / std).transpose(0, 3, 1, 2))

# two thread pools that wait for each other slow a small model down tenfold
torch.set_num_threads(1)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(
    bundle / "model.onnx", options, providers=["CPUExecutionProvider"]
)
names = [o.name for o in session.get_outputs()]
assert names == ["logits", "score", "class"], names
program = torch.export.load(bundle / "model.pt2").module()


def onnx(batch):
    return session.run(None, {"images": batch})


@torch.no_grad()
def pt2(batch):
    return [t.numpy() for t in program(torch.from_numpy(batch))]


found = {}
for runtime, run in (("onnx", onnx), ("pt2", pt2)):
    for size in batches:
        parts = [run(images[i : i + size]) for i in range(0, len(images), size)]
        for output, values in zip(("logits", "score", "class"), zip(*parts)):
            found[f"{runtime}.{size}.{output}"] = np.concatenate(values)
versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
loaded = sorted({m.partition(".")[0] for m in sys.modules} & set(refused))
found["report"] = np.array(json.dumps({"cannot": cannot, "loaded": loaded, "versions": versions}))
np.savez(out, **found)
"""


@dataclass(frozen=True)
class IsolatedRun:
    """What the process returned.

    Attributes:
        outputs: arrays by `runtime.batch.output`, for example `onnx.2.logits`.
        cannot_import: the refused names that it could not import, as required.
        loaded: the refused names that were loaded all the same.
        versions: of onnxruntime and torch.
        error: the end of its error output; empty if it succeeded.
    """

    outputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    cannot_import: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def isolated(self) -> bool:
        """Whether it succeeded without this project and timm."""
        return not self.error and self.cannot_import == REFUSED and not self.loaded


def run_isolated(bundle: Path) -> IsolatedRun:
    """Run `PROGRAM` on the bundle at every batch size of `BATCHES`.

    The process inherits nothing: no environment variables (`-I`), no path, an empty folder.
    """
    with tempfile.TemporaryDirectory(prefix="vitpareto-verify-") as scratch:
        out = Path(scratch) / "outputs.npz"
        arguments = (json.dumps(REFUSED), json.dumps(BATCHES), str(out))
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROGRAM, str(bundle.absolute()), *arguments],
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            return IsolatedRun(error=done.stderr.strip()[-1500:] or f"exit code {done.returncode}")
        with np.load(out, allow_pickle=False) as stored:
            outputs = {name: stored[name] for name in stored.files}
    report = json.loads(str(outputs.pop("report")))
    return IsolatedRun(
        outputs, tuple(report["cannot"]), tuple(report["loaded"]), dict(report["versions"])
    )
