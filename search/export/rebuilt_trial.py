"""The measured model of a trial, rebuilt on the CPU in float32 with the images of its study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Code, Recipe
from vitpareto.methods.engine.reduction import Trace
from vitpareto.search.data.datasets import check_head, open_data
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.export.preprocessing import normalised, preprocess_json
from vitpareto.search.export.reference_outputs import MAX_NEAR_TIED, ReferenceOutputs
from vitpareto.search.export.verification import eager_logits
from vitpareto.search.models.loading import check_trained, fingerprint, load_model, num_classes
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import TrialResult, unpack_bits

#: relative sizes of the noise that reveals near-tied selections, and the draws of each: float32
#: rounding is 1e-7 per operation, and a block has hundreds in a row
NOISE, DRAWS = (1e-6, 1e-5), 4


class NotVerified(RuntimeError):
    """The rebuilt or exported model is not the measured model. `trial` is its number."""

    def __init__(self, message: str, trial: int) -> None:
        super().__init__(message)
        self.trial = trial


@dataclass(frozen=True)
class RebuiltTrial:
    """A trial's model and images. `dense` is the unpruned model that it was built from."""

    model: nn.Module
    dense: nn.Module
    recipe: Recipe
    preprocess: Preprocess
    search: Split
    calibration: Split
    classes: tuple[str, ...]
    head_indices: tuple[int, ...] | None

    @classmethod
    def of(cls, folder: StudyFolder, result: TrialResult, cache: str | None) -> RebuiltTrial:
        """Raises UserError if it cannot be exported, or the study's model or images changed."""
        job = folder.job().config(store=folder.store, cache=cache or None)
        recipe = result.rebuilt_from.to_recipe()
        dense = load_model(job.model, folder.weights)
        identity = folder.identity.read()
        _check_unchanged(folder, "model", identity["model_fingerprint"], fingerprint(dense))
        weights = None if recipe.weights is None else folder.artifacts.load(recipe.weights)
        shape, _ = recipe.reshape(methods.model_shape(dense), dense, weights)
        if recipe.tokens is not None:
            declared = recipe.tokens.declared
            reason = declared.refuses_export(declared.check(recipe.tokens.params, shape), shape)
            if reason:
                raise UserError(
                    f"trial {result.trial} ({recipe}) {reason}",
                    Code.UNSUPPORTED,
                    trial=result.trial,
                    method=recipe.tokens.method,
                )
        check_trained(recipe.checked(shape), shape)
        preprocess = Preprocess.of(dense)
        data = open_data(
            job.data, preprocess, cache=Path(job.cache), seed=job.seed, images=job.images
        )
        _check_unchanged(folder, "data", identity["data_fingerprint"], data.fingerprint)
        head = check_head(num_classes(dense), data)
        return cls(
            recipe.build(dense, weights=weights).eval(), dense, recipe, preprocess,
            data.split("search"), data.split("calibration"), data.classes, head,
        )  # fmt: skip

    @torch.no_grad()
    def reference_outputs(self, result: TrialResult, images: int) -> tuple[ReferenceOutputs, str]:
        """The model's outputs on the first search images, with and without rounding-sized noise.

        Also returns on how many of them it is right or wrong as the trial was ("20 of 20").

        Raises:
            NotVerified: it disagrees with the trial on more images than near-ties explain.
        """
        count = min(images, len(self.search))
        raw, labels = self.search.batch(0, count)
        inputs = normalised(raw.numpy(), preprocess_json(self.preprocess))
        logits = eager_logits(self.model, inputs, count, self.head_indices)
        _, trace = self._traced(inputs)
        generator = torch.Generator().manual_seed(0)
        other_logits, other_selection = [], []
        for size in NOISE:
            for _ in range(DRAWS):
                noise = size * torch.randn(inputs.shape, generator=generator)
                noisy_logits, noisy_trace = self._traced(inputs * (1 + noise))
                other_logits.append(noisy_logits)
                other_selection.append(_differs(trace, noisy_trace))
        right = logits.argmax(axis=1) == labels.numpy()
        same = int((right == unpack_bits(result.bits, result.images)[:count]).sum())
        exact = result.provenance.dtype == "float32"
        if exact and count - same > max(1, int(MAX_NEAR_TIED * count)):
            raise NotVerified(
                f"the rebuilt model of trial {result.trial} must agree with the measured one on "
                f"all {count} images (got {same})",
                result.trial,
            )
        reference = ReferenceOutputs(
            raw.numpy(), labels.numpy(), logits, np.stack(other_logits), np.stack(other_selection)
        )
        return reference, f"{same} of {count}"

    def _traced(self, inputs: Tensor) -> tuple[np.ndarray, Trace]:
        logits, trace = self.model(inputs, trace=True)
        head = self.head_indices
        return (logits if head is None else logits[:, list(head)]).numpy(), trace


def _differs(trace: Trace, other: Trace) -> np.ndarray:
    """Which images have another patch selected or merged in any block, bool [M]."""
    pairs = zip(trace.group, other.group, strict=True)
    return torch.stack([(a != b).any(dim=1) for a, b in pairs]).any(dim=0).numpy()


def _check_unchanged(folder: StudyFolder, what: str, measured: str, current: str) -> None:
    if current == measured:
        return
    source = "another timm version may be installed" if what == "model" else "it was changed since"
    raise UserError(
        f"the {what} of study {folder.name} must have fingerprint {measured[:16]} "
        f"(got {current[:16]}); {source}",
        Code.MISMATCH,
        study=folder.name,
        key=f"{what}_fingerprint",
        got=current,
        expected=measured,
    )
