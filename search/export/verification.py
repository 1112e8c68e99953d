"""Prove a bundle: its files are the ones written, and its programs are the model that was measured.

`verify` hashes every file, rebuilds the eager model from recipe and weights, and runs the ONNX and
torch.export programs in a fresh process that can import neither this project nor timm. It changes
nothing in the bundle. Hashes show that a file was edited, not who wrote it: torch.export.load runs
only once they hold, and still only on bundles whose origin is trusted.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from vitpareto.methods import BadInput, Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.models import embedded_model

Floats = NDArray[np.float32]

BATCHES = (1, 2, 5)
#: Largest accepted logit difference, per unit of the measured model's largest logit. Float32
#: rounding through 12 blocks gave at most 2e-6 of it; a mean read as a sum gives 1e-2 and more.
TOLERANCE = 1e-4
#: Share of the images that may differ by a near-tied selection (at least one image may).
NEAR_TIED = 0.05
#: What the fresh process refuses to import: this project, and the models' library it builds on.
REFUSED = ("vitpareto", "timm")

RESULT = "result.json"
REQUIRED = (
    "recipe.yaml", "weights.safetensors", "model.onnx", "model.pt2", "preprocess.json",
    "labels.json", "README.md", "verify.npz",
)  # fmt: skip

#: Run with `python -I` in a folder of its own: bundle, refused names, batches, result file.
PROGRAM = r"""
import importlib, importlib.abc, json, sys
from pathlib import Path

bundle, refused, batches, out = Path(sys.argv[1]), *map(json.loads, sys.argv[2:4]), sys.argv[4]


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is refused here", name=name)


# first, before the finders that an editable install puts on the path
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

# one thread each: two pools that wait for each other cost a small model ten times its forward
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


class EditedBundle(UserError):
    """A file of the bundle is not the one that was written; the message names file and hashes."""


@dataclass(frozen=True)
class Comparison:
    """One runtime at one batch size against the measured model, over all verification images.

    max_difference: largest absolute logit difference over the images that are not near-tied.
    same_class: images with the measured model's prediction. near_tied: images that differ by a
    near-tied selection (`compare`). wrong: images that differ otherwise.
    """

    runtime: str
    batch: int
    images: int
    max_difference: float
    same_class: int
    near_tied: int
    wrong: int

    @property
    def good(self) -> bool:
        few = self.near_tied <= max(1, int(NEAR_TIED * self.images))
        return self.wrong == 0 and few and self.same_class >= self.images - self.near_tied


@dataclass(frozen=True)
class Verification:
    """What `verify` found. tolerance: in logits. cannot_import: what the fresh process could not
    import. notes: what could not be checked, and why, and anything else that was wrong.
    """

    verified: bool
    images: int
    tolerance: float
    comparisons: tuple[Comparison, ...]
    cannot_import: tuple[str, ...]
    versions: dict[str, str]
    notes: tuple[str, ...]
    seconds: float

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """A few lines of text: the verdict and one row a runtime and batch size."""
        head = f"{'runtime':<13}{'batch':>5}  {'max difference':>14}  {'same class':>10}  "
        rows = [head + f"{'near-tied':>9}  {'wrong':>5}"]
        for c in self.comparisons:
            rows.append(
                f"{c.runtime:<13}{c.batch:>5}  {c.max_difference:>14.1e}  "
                f"{f'{c.same_class}/{c.images}':>10}  {c.near_tied:>9}  {c.wrong:>5}"
            )
        verdict = "verified" if self.verified else "NOT VERIFIED"
        rows.append(
            f"{verdict}: {self.images} images, tolerance {self.tolerance:.1e} in logits; "
            f"the fresh process could not import {', '.join(self.cannot_import) or 'nothing'}"
        )
        return "\n".join([*rows, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class ReferenceOutputs:
    """The measured model on the verification images, as stored in verify.npz.

    images uint8 [M, H, W, 3]; labels int64 [M]; logits [M, K]; other_logits [R, M, K] and
    other_selection bool [R, M]: the same model with its input changed by rounding-sized noise,
    and whether it then selected other patches for that image.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    logits: Floats
    other_logits: Floats
    other_selection: NDArray[np.bool_]

    @classmethod
    def load(cls, path: Path) -> ReferenceOutputs:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in cls.__dataclass_fields__})

    def save(self, path: Path) -> None:
        np.savez_compressed(path, allow_pickle=False, **self.__dict__)

    @property
    def tolerance(self) -> float:
        """In logits."""
        return TOLERANCE * max(1.0, float(np.abs(self.logits).max()))


def compare(measured: ReferenceOutputs, logits: Floats, runtime: str, batch: int) -> Comparison:
    """Count agreeing, near-tied and wrong images; logits [M, K] of a runtime at a batch size.

    An image agrees where every logit is within the tolerance of the measured model's. One that
    does not is near-tied, not wrong, only if both hold: (1) the measured model itself, in eager
    mode, selected other patches for it when its input was changed by rounding-sized noise (a
    relative 1e-6 or 1e-5); (2) the runtime's logits are within the tolerance of such a run's. So
    a near-tied image still has to equal a result of the measured model, and at most 5 % of the
    images (or one) may be near-tied: a wrong export cannot pass as one.
    """
    limit = measured.tolerance
    # a NaN is no agreement: it must not pass a comparison that is false for it
    off = np.nan_to_num(np.abs(logits - measured.logits).max(axis=1), nan=np.inf)
    agrees = off <= limit
    others = np.abs(logits[None] - measured.other_logits).max(axis=2) <= limit
    tied = ~agrees & (others & measured.other_selection).any(axis=0)
    same = logits.argmax(axis=1) == measured.logits.argmax(axis=1)
    return Comparison(
        runtime, batch, len(logits), float(off[~tied].max(initial=0.0)), int(same.sum()),
        int(tied.sum()), int((~agrees & ~tied).sum()),
    )  # fmt: skip


def sha256(path: Path) -> str:
    """Of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(result: dict[str, Any]) -> str:
    """sha256 of what result.json says, its own `seal` left out."""
    rest = {k: v for k, v in result.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_files(bundle: Path) -> dict[str, Any]:
    """result.json, after its seal and the hash of every other file are found to hold.

    UserError where `bundle` is none; EditedBundle naming each file at fault, with its hashes.
    """
    path = bundle / RESULT
    if not path.is_file():
        raise UserError(f"{bundle} is not a bundle: it has no {RESULT}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        files = {str(k): str(v["sha256"]) for k, v in result["files"].items()}
        sealed = str(result["seal"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a bundle's: {error!r}") from error
    wrong = []
    if sealed != seal(result):
        wrong.append(f"{RESULT} has sha256 {seal(result)} without its seal, sealed as {sealed}")
    wrong += [f"{name} is not listed in {RESULT}" for name in REQUIRED if name not in files]
    for name, expected in files.items():
        if Path(name).name != name:
            wrong.append(f"{name} is not a file of the bundle")
        elif not (bundle / name).is_file():
            wrong.append(f"{name} is missing, expected with sha256 {expected}")
        elif (found := sha256(bundle / name)) != expected:
            wrong.append(f"{name} has sha256 {found}, expected {expected}")
    if wrong:
        raise EditedBundle(f"{bundle} is not as it was exported: {'; '.join(wrong)}")
    return result


def rebuild(bundle: Path, result: dict[str, Any]) -> nn.Module:
    """The measured model from recipe.yaml, weights.safetensors and what result.json says of its
    architecture, in eager mode, on the CPU.
    """
    weights = safetensors.torch.load_file(bundle / "weights.safetensors")
    dense = fresh_dense(result, len(weights["head.weight"]))
    recipe = Recipe.from_yaml((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    return recipe.build(dense, weights=weights).eval()


def fresh_dense(result: dict[str, Any], outputs: int | None = None) -> nn.Module:
    """The dense model that result.json names, with fresh weights; outputs: of its head, where they
    are not those of its architecture. Raises whatever timm raises.
    """
    if result["model"] == embedded_model.NAME:
        return embedded_model.build(pretrained=False).eval()
    options = dict(result.get("model_args", {}))
    if outputs is not None:
        options["num_classes"] = outputs
    return timm.create_model(result.get("architecture", result["model"]), **options).eval()


def normalised(images: NDArray[np.uint8], preprocess: dict[str, Any]) -> torch.Tensor:
    """uint8 [M, H, W, 3] -> float32 [M, 3, H, W], as preprocess.json says."""
    mean, std = (np.array(preprocess[k], dtype=np.float32) for k in ("mean", "std"))
    scaled = (images.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


@torch.no_grad()
def eager_logits(
    model: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    batch: int,
    head_indices: list[int] | None,
) -> Floats:
    """Logits [M, K] of an eager model, `batch` images at a time, restricted to the data's."""
    logits = torch.cat([cast(torch.Tensor, model(part)) for part in images.split(batch)])
    return (logits if head_indices is None else logits[:, head_indices]).numpy()


def run_isolated(bundle: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any], str]:
    """`PROGRAM` on the bundle: its outputs by name, its report, and what went wrong ("": nothing).

    Nothing of this process reaches it: no environment (`-I`), no path, its own empty folder.
    """
    with tempfile.TemporaryDirectory(prefix="vitpareto-verify-") as scratch:
        out = Path(scratch) / "found.npz"
        words = (json.dumps(REFUSED), json.dumps(BATCHES), str(out))
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROGRAM, str(bundle.absolute()), *words],
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            return {}, {}, f"the fresh process failed: {done.stderr.strip()[-1500:]}"
        with np.load(out, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    return found, json.loads(str(found.pop("report"))), ""


def verify(bundle: Path) -> Verification:
    """Hashes first, then every runtime at batches 1, 2 and 5 against the measured model's logits.

    UserError where `bundle` is none, EditedBundle where a file is not the one written. An export
    that differs is no error: `verified` is False.
    """
    return check_programs(bundle, check_files(bundle))


def check_programs(bundle: Path, result: dict[str, Any]) -> Verification:
    """`verify` without the hashes; result: what result.json says of model and head_indices."""
    begin = time.monotonic()
    measured = ReferenceOutputs.load(bundle / "verify.npz")
    preprocess = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    notes, comparisons = [], []
    try:
        model = rebuild(bundle, result)
    except BadInput:
        raise
    except Exception as error:  # a model of a hub that cannot be reached, or of another timm
        notes.append(f"{result['model']} cannot be built here, so eager was not checked: {error}")
    else:
        images = normalised(measured.images, preprocess)
        for batch in BATCHES:
            logits = eager_logits(model, images, batch, result["head_indices"])
            comparisons.append(compare(measured, logits, "eager", batch))
    found, report, failed = run_isolated(bundle)
    sound = not failed and report["cannot"] == list(REFUSED) and not report["loaded"]
    if failed:
        notes.append(failed)
    elif not sound:
        notes.append(f"the fresh process could import {report['loaded']}: it proves nothing")
    for runtime, name in (("onnx", "onnxruntime"), ("pt2", "torch.export")) if found else ():
        for batch in BATCHES:
            logits, score, label = (
                found[f"{runtime}.{batch}.{output}"] for output in ("logits", "score", "class")
            )
            comparisons.append(compare(measured, logits, name, batch))
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            off = np.abs(1 / shares.sum(axis=1) - score).max()
            if label.dtype != np.int64 or (label != logits.argmax(1)).any() or not off < 1e-5:
                sound = False
                notes.append(f"{name} at batch {batch}: score or class do not follow its logits")
    return Verification(
        sound and all(c.good for c in comparisons),
        len(measured.images),
        measured.tolerance,
        tuple(comparisons),
        tuple(report.get("cannot", ())),
        dict(report.get("versions", {})),
        tuple(notes),
        round(time.monotonic() - begin, 2),
    )
