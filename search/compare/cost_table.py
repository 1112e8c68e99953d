"""What methods cost side by side, without a study: MACs, parameters, throughput, memory.

A rate makes methods comparable: `setting_at` says what a method's setting at a rate is. No weight
decides any of these figures, so that models get fresh ones and nothing is downloaded; methods whose
trained parts are fresh have the right costs too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, ModelShape, Recipe
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.parameters import Counts, Float, Int
from vitpareto.methods.engine.staged import LAYERS_SPACE
from vitpareto.search.compare.published import matching, recompute
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.measure.fvcore_macs import fvcore_macs
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.measure.memory import count_parameters, peak_mb
from vitpareto.search.measure.timing import measure_latency
from vitpareto.search.models.loading import fresh_model

#: search choices that are a rate: the fraction of the patches kept at each prune layer
RATES = ("keep_rate", "rate")
#: values of a choice that are tried to come near a cost
STEPS = 256

KEPT = "keep rate"
NEAREST = "MACs nearest TopK's"
AT_MOST = "at most: nearest TopK's"
GIVEN = "TopK's counts"


@dataclass(frozen=True)
class MatchedSetting:
    """A recipe for a rate, and by which rule (KEPT, NEAREST, AT_MOST, GIVEN)."""

    recipe: Recipe
    rule: str


@dataclass(frozen=True)
class PublishedFigure:
    """A published figure of the same setting: GFLOPs as its source counts, and ours so counted
    (None where that cannot be recomputed). differs: how the model of both is not the row's, ""
    where it is, as timm's options; remark: what the source's row says of that.
    """

    gflops: float
    counter: str
    ours: float | None
    source: str
    differs: str = ""
    remark: str = ""


@dataclass(frozen=True)
class CostRow:
    """One candidate's cost. None: not measured, or not to be known without images (`note`).

    gmacs, share (of the dense model's MACs), params_m, images_per_s (the dense model's throughput
    times the speed-up), speedup with its 95 % interval, peak_mb: as `search.measure.cost` measures
    them; gmacs_low, gmacs_high: bounds, equal where no image decides; fvcore_gmacs: fvcore's own
    count.
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
    """How candidates are measured. rounds: of paired timing, 0 for costs in closed form alone;
    check: count with fvcore too; say: hears what is being measured.
    """

    batch: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 30
    check: bool = False
    say: Callable[[str], None] = lambda text: None

    def check_values(self, rates: Sequence[float]) -> None:
        """UserError for a value, or a rate, that cannot be."""
        for rate in rates:
            if not 0 < rate < 1:
                raise UserError(f"rate is {rate:g}: accepted is a number, 0 < rate < 1")
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}: accepted is a whole number, 1 <= batch")
        if self.rounds < 0:
            raise UserError(f"rounds is {self.rounds}: accepted is a whole number, 0 <= rounds")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}: accepted is one of {', '.join(DTYPES)}")


def setting_at(method: str, rate: float, shape: ModelShape, skeleton: nn.Module) -> MatchedSetting:
    """The method's setting at `rate` on a model of this shape (`skeleton`: the model, no weights).

    From the method's first preset: (1) a choice that is a rate takes it; (2) where images decide
    the counts and the method takes given ones, it is given TopK's at that rate; (3) otherwise the
    first choice besides the layers is moved within the method's space until the MACs are as near
    to TopK's at that rate as they come: the most it may cost, where images decide.

    Raises BadInput where the method has no preset or no setting fits the model.
    """
    declared = methods.get(method)
    if not declared.presets:
        raise BadInput(f"{method} has no published setting to start from")
    choices = dict(declared.presets[0].choices)
    for name in RATES:
        if name in choices:
            params = declared.resolve({**choices, name: rate}, shape)
            return MatchedSetting(_recipe(declared, declared.check(params, shape)), KEPT)
    topk = setting_at("topk", rate, shape, skeleton).recipe.checked(shape)
    adaptive = declared.kind == "tokens" and (
        declared.counts(declared.preset(declared.presets[0], shape), shape) is None
    )
    if adaptive and any(isinstance(p, Counts) for p in declared.parameters):
        assert topk.tokens is not None
        counts = topk.tokens.declared.counts(topk.tokens.params, shape)
        return MatchedSetting(_recipe(declared, declared.check({"counts": counts}, shape)), GIVEN)
    target = recipe_macs(topk, shape)[1]
    moved = _moved(declared, choices)
    found: dict[str, tuple[int, Recipe]] = {}
    refused = ""
    for value in _values(moved):
        try:
            params = declared.check(declared.resolve({**choices, moved.name: value}, shape), shape)
            recipe = _recipe(declared, params)
            if str(recipe) not in found:
                cost = recipe_macs(recipe, recipe.reshape(shape, skeleton)[0])[1]
                found[str(recipe)] = (abs(cost - target), recipe)
        except BadInput as error:
            refused = str(error)
    if not found:
        raise BadInput(f"no setting of {method} fits the model: {refused}")
    nearest = min(found.values(), key=lambda pair: pair[0])[1]
    return MatchedSetting(nearest, AT_MOST if adaptive else NEAREST)


def _recipe(declared: Method, params: dict[str, Any]) -> Recipe:
    return Recipe.of(declared.name, **{k: v for k, v in params.items() if v is not None})


def _moved(declared: Method, choices: dict[str, Any]) -> Float | Int:
    """The choice that `setting_at` moves: the first number of the space that is not a layer's."""
    layers = {p.name for p in LAYERS_SPACE}
    for p in declared.space:
        if isinstance(p, (Float, Int)) and p.name in choices and p.name not in layers:
            return p
    raise BadInput(f"{declared.name} has no choice that a cost could be reached by")


def _values(choice: Float | Int) -> list[float]:
    """Evenly spaced over the choice's range, in logs where it is searched in logs."""
    if isinstance(choice, Int):
        return list(range(choice.low, min(choice.high, choice.low + STEPS) + 1))
    steps = [i / STEPS for i in range(STEPS + 1)]
    if choice.log:
        return [choice.low * (choice.high / choice.low) ** s for s in steps]
    return [choice.low + (choice.high - choice.low) * s for s in steps]


def cost_rows(
    models: Sequence[str], names: Sequence[str], rates: Sequence[float], bench: CostSettings
) -> Iterator[CostRow]:
    """For each model the dense one, then every method at every rate, each row as it is measured.

    Raises BadInput for unknown models, methods or rates before anything is measured. A method that
    has no setting at a rate is a row with the reason.
    """
    bench.check_values(rates)
    if not models or not rates:
        raise UserError(f"no {'rate' if models else 'model'} is named: nothing to cost")
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
    say = bench.say if dense is not None else lambda text: None  # closed forms need no patience
    say(f"{name}: dense")
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
            say(f"{name}: {setting.recipe}")
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
    """The row with its figures; those that need a forward only where `dense` is there."""
    shape = methods.model_shape(skeleton)
    after = recipe.reshape(shape, skeleton)[0]
    recipe = recipe.checked(after)
    low, high = recipe_macs(recipe, after)
    of_dense = recipe_macs(Recipe(), shape)[0]
    row = replace(
        row, gmacs_low=low / 1e9, gmacs_high=high / 1e9, published=_figures(row.model, recipe)
    )
    if low != high:  # noise and fresh weights would say nothing of it
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
    """The candidate; the dense model itself for the empty recipe, whose time is the reference."""
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
