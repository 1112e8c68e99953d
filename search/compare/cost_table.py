"""Costs of methods side by side, without a study: MACs, parameters, throughput, peak memory.

Methods are compared at equal rates (`setting_at`). Costs do not depend on the weights, so weights
are random and nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, Recipe
from vitpareto.search.compare.matched_settings import setting_at
from vitpareto.search.compare.published import matching, recompute
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.measure.fvcore_macs import fvcore_macs
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.measure.memory import count_parameters, peak_mb
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.models.loading import fresh_model


@dataclass(frozen=True)
class PublishedFigure:
    """A published cost of the same setting.

    Attributes:
        gflops: as its source counts.
        ours: our count in the same convention; None if it cannot be recomputed.
        differs: timm options by which the source's model differs from the row's; empty if it is
            the same.
        remark: the source's remark on the difference.
    """

    gflops: float
    counter: str
    ours: float | None
    source: str
    differs: str = ""
    remark: str = ""


@dataclass(frozen=True)
class CostRow:
    """The cost of one candidate. A value is None if it was not measured (see `note`).

    Attributes:
        rate: fraction of patches kept; None for the dense model.
        rule: how the setting was matched to the rate.
        gmacs: GMACs per image; `gmacs_low` and `gmacs_high` are bounds, equal unless images decide.
        share: fraction of the dense model's MACs.
        fvcore_gmacs: GMACs per image as fvcore counts them.
        params_m: parameters in millions.
        images_per_s: the dense model's throughput times the speed-up.
        speedup: over the dense model, with its 95 % interval.
        peak_mb: peak memory in MB.
        published: published costs of the same setting.
        target: what the latency holds for.
        note: why values are missing.
    """

    model: str
    method: str
    rate: float | None
    rule: str
    recipe: str
    gmacs: float | None = None
    gmacs_low: float | None = None
    gmacs_high: float | None = None
    share: float | None = None
    fvcore_gmacs: float | None = None
    params_m: float | None = None
    images_per_s: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    peak_mb: float | None = None
    published: tuple[PublishedFigure, ...] = ()
    target: LatencyTarget | None = None
    note: str = ""


@dataclass(frozen=True)
class CostSettings:
    """How candidates are measured.

    Attributes:
        rounds: rounds of paired timing; 0 for costs in closed form only.
        check: count with fvcore too.
        log: called with what is measured next.
    """

    batch: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 30
    check: bool = False
    log: Callable[[str], None] = lambda text: None

    def check_values(self, rates: Sequence[float]) -> None:
        """Raise UserError for a value or a rate out of range."""
        for rate in rates:
            if not 0 < rate < 1:
                raise _out_of_range("rate", rate, "between 0 and 1")
        if self.batch < 1:
            raise _out_of_range("batch", self.batch, "at least 1")
        if self.rounds < 0:
            raise _out_of_range("rounds", self.rounds, "at least 0")
        if self.dtype not in DTYPES:
            raise UserError(
                f"dtype must be one of {', '.join(DTYPES)} (got {self.dtype!r})",
                Code.UNKNOWN_NAME,
                name="dtype",
                got=self.dtype,
                accepted=tuple(DTYPES),
            )


def _out_of_range(name: str, value: float, rule: str) -> UserError:
    return UserError(
        f"{name} must be {rule} (got {value:g})", Code.OUT_OF_RANGE, name=name, got=value
    )


def cost_rows(
    models: Sequence[str], names: Sequence[str], rates: Sequence[float], bench: CostSettings
) -> Iterator[CostRow]:
    """Yield rows as they are measured: for each model the dense one, then every method and rate.

    A method that has no setting at a rate has a row with the reason.

    Raises:
        BadInput: a model or method is unknown, or a value is out of range. Raised before anything
            is measured.
    """
    bench.check_values(rates)
    if not models or not rates:
        name = "rate" if models else "model"
        raise UserError(f"at least one {name} must be given (got none)", Code.MISSING, name=name)
    chosen = [n for n in dict.fromkeys(names) if not methods.get(n).is_reference]
    skeletons: dict[str, nn.Module] = {}
    for name in dict.fromkeys(models):
        with torch.device("meta"):
            skeletons[name] = fresh_model(name)
    for name, skeleton in skeletons.items():
        yield from _model_rows(name, skeleton, chosen, rates, bench)


def _model_rows(
    name: str,
    skeleton: nn.Module,
    names: Sequence[str],
    rates: Sequence[float],
    bench: CostSettings,
) -> Iterator[CostRow]:
    shape = methods.model_shape(skeleton)
    dense: nn.Module | None = None
    images: Tensor | None = None
    if bench.rounds or bench.check:
        dense = fresh_model(name).to(bench.device, DTYPES[bench.dtype])
        images = torch.randn(
            bench.batch, 3, *shape.image, device=bench.device, dtype=DTYPES[bench.dtype]
        )
    # closed forms are fast, so their progress is not reported
    log = bench.log if dense is not None else lambda text: None
    log(f"{name}: dense")
    row = CostRow(name, Recipe().method, None, "", str(Recipe()))
    first = _measured(row, Recipe(), skeleton, dense, images, bench)
    yield first
    for method in names:
        for rate in rates:
            try:
                setting = setting_at(method, rate, shape, skeleton)
            except BadInput as error:
                yield CostRow(name, method, rate, "", "", note=str(error))
                continue
            log(f"{name}: {setting.recipe}")
            row = CostRow(name, method, rate, setting.rule, str(setting.recipe))
            row = _measured(row, setting.recipe, skeleton, dense, images, bench)
            if row.speedup is not None and first.images_per_s is not None:
                row = replace(row, images_per_s=first.images_per_s * row.speedup)
            yield row


def _measured(
    row: CostRow,
    recipe: Recipe,
    skeleton: nn.Module,
    dense: nn.Module | None,
    images: Tensor | None,
    bench: CostSettings,
) -> CostRow:
    """The row with its figures. Those that need a forward pass are missing if `dense` is None."""
    shape = methods.model_shape(skeleton)
    after = recipe.reshape(shape, skeleton)[0]
    recipe = recipe.checked(after)
    low, high = recipe_macs(recipe, after)
    of_dense = recipe_macs(Recipe(), shape)[0]
    row = replace(
        row, gmacs_low=low / 1e9, gmacs_high=high / 1e9, published=_figures(row.model, recipe)
    )
    if low != high:  # with random images and weights the counts would mean nothing
        return replace(row, note="images decide")
    built = _built(recipe, skeleton if dense is None else dense)
    row = replace(
        row, gmacs=low / 1e9, share=low / of_dense, params_m=count_parameters(built) / 1e6
    )
    if dense is None or images is None:
        return row
    if bench.check:
        row = replace(row, fvcore_gmacs=fvcore_macs(built, images[:1]) / 1e9)
    if not bench.rounds:
        return row
    try:
        timed = measure_latency(built, dense, images, bench.rounds, min(5, bench.rounds))
        return _with_times(replace(row, peak_mb=peak_mb(built, images)), timed, bench.batch)
    except torch.OutOfMemoryError:
        return replace(row, note=f"out of memory at batch {bench.batch}")


def _built(recipe: Recipe, dense: nn.Module) -> nn.Module:
    """The candidate. For the empty recipe it is the dense model itself, not a copy."""
    if recipe == Recipe():
        return dense
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", methods.Untrained)  # no accuracy is shown
        return recipe.build(dense)


def _with_times(row: CostRow, timed: Latency, batch: int) -> CostRow:
    return replace(
        row,
        images_per_s=1e3 * batch / timed.p50_ms,
        speedup=timed.speedup,
        speedup_low=timed.speedup_low,
        speedup_high=timed.speedup_high,
        target=timed.target,
    )


def _figures(model: str, recipe: Recipe) -> tuple[PublishedFigure, ...]:
    return tuple(
        PublishedFigure(
            row.gflops,
            row.counter or "not said",
            recompute(row),
            row.source,
            ", ".join(f"{k}={v}" for k, v in row.model_options.items()),
            row.remark if row.model_options else "",
        )
        for row in matching(model, recipe)
        if row.gflops is not None
    )
