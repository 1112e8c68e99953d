"""Latency tables: exact on the grid, between its points in between, and for one target alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from tests.refusals import refused
from tests.search.small import vit
from vitpareto.methods.slicing.greedy import plan
from vitpareto.methods.slicing.importance import magnitudes
from vitpareto.methods.slicing.plan import least
from vitpareto.methods.slicing.sliced_model import BlockWidths, Widths, model_widths
from vitpareto.search.errors import UserError
from vitpareto.search.measure.block_timing import measure_latency_table, points_of
from vitpareto.search.measure.latency import LatencyTarget
from vitpareto.search.measure.latency_table import (
    ATTENTION,
    MLP,
    REST,
    Grid,
    LatencyTable,
)

TARGET = LatencyTarget("cpu", "eager", "float32", batch=4, threads=1)


def grid(names: tuple[str, ...], points: dict[str, tuple[int, ...]], ms) -> Grid:
    axes = {n: points[n] for n in names}
    where = np.meshgrid(*axes.values(), indexing="ij")
    return Grid(axes, ms(*where) * np.ones([len(v) for v in axes.values()]))


def table(device: str = "cpu") -> LatencyTable:
    """A made-up machine for models of 64 channels: multiplications alone cost time."""
    points = {"embedding": (16, 32, 64), "heads": (2, 4), "qk": (8, 16), "v": (8, 16),
              "mlp": (16, 64, 128), "tokens": (2, 33, 65)}  # fmt: skip
    return LatencyTable(
        "small",
        replace(TARGET, device=device),
        grid(ATTENTION, points, lambda e, h, q, v, n: 1e-6 * n * h * (e * (2 * q + 2 * v))),
        grid(MLP, points, lambda e, m, n: 2e-6 * n * e * m),
        grid(REST, points, lambda e: 1e-3 * e),
    )


# --- interpolation


def test_it_is_exact_on_every_point_of_the_grid() -> None:
    rng = np.random.default_rng(0)
    axes = {"a": (1, 2, 5), "b": (4, 16), "c": (7,)}
    one = Grid(axes, rng.uniform(1, 2, (3, 2, 1)))
    for place in itertools.product(*(range(len(p)) for p in axes.values())):
        where = {n: axes[n][i] for n, i in zip(axes, place, strict=True)}
        assert one.at(where) == one.ms[place]


def test_between_two_points_it_goes_from_one_to_the_other() -> None:
    """Along every axis, whatever stands on the others: never beyond the neighbours, never back."""
    rng = np.random.default_rng(1)
    axes = {"a": (1, 9, 17), "b": (0, 8), "c": (3, 11, 100)}
    one = Grid(axes, rng.uniform(1, 2, (3, 2, 3)))
    for name, points in axes.items():
        others = [n for n in axes if n != name]
        for _ in range(20):
            where = {n: float(rng.uniform(axes[n][0], axes[n][-1])) for n in others}
            for low, high in itertools.pairwise(points):
                steps = [one.at({**where, name: x}) for x in np.linspace(low, high, 9)]
                change = np.diff(steps)
                assert (change >= -1e-12).all() or (change <= 1e-12).all()
                assert change == pytest.approx(np.full(8, (steps[-1] - steps[0]) / 8))


def test_it_is_multilinear() -> None:
    """Second implementation: the mean of the corners, weighed by the opposite volumes."""
    rng = np.random.default_rng(2)
    axes = {"a": (0, 10), "b": (0, 4), "c": (2, 6)}
    one = Grid(axes, rng.uniform(1, 2, (2, 2, 2)))
    for _ in range(50):
        place = {n: float(rng.uniform(*p)) for n, p in axes.items()}
        share = [(place[n] - p[0]) / (p[1] - p[0]) for n, p in axes.items()]
        corners = itertools.product((0, 1), repeat=3)
        expected = sum(
            one.ms[c] * np.prod([s if i else 1 - s for i, s in zip(c, share, strict=True)])
            for c in corners
        )
        assert one.at(place) == pytest.approx(expected)


def test_outside_the_grid_is_refused() -> None:
    one = table().mlp
    for name, value in (("embedding", 65), ("mlp", 15.9), ("tokens", 1)):
        where = {"embedding": 64, "mlp": 64, "tokens": 65, name: value}
        low, high = one.axes[name][0], one.axes[name][-1]
        with refused("out-of-range", name=name, got=value, low=low, high=high):
            one.at(where)


# --- costs of models


def test_a_models_cost_is_that_of_its_blocks() -> None:
    cost = table().cost(65)
    block = BlockWidths(4, 16, 16, 128)
    one = 1e-6 * 65 * 4 * 64 * 64 + 2e-6 * 65 * 64 * 128
    assert cost(Widths(64, (block,) * 12)) == pytest.approx(64e-3 + 12 * one)
    narrower = cost(Widths(64, (block,) * 11 + (BlockWidths(4, 16, 16, 64),)))
    assert cost(Widths(64, (block,) * 12)) - narrower == pytest.approx(2e-6 * 65 * 64 * 64)


def test_nvit_plans_to_a_target_in_time() -> None:
    widths, cost = model_widths(vit()), table().cost(65)
    assert cost(least(widths)) < 0.5 * cost(widths)
    made = plan(magnitudes(vit()), widths, cost, 0.5 * cost(widths), eta=1.0)
    assert 0.45 * cost(widths) < cost(made) <= 0.5 * cost(widths)


# --- files and targets


def test_a_table_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    table().save(path)
    read = LatencyTable.load(path)
    assert read.to_json() == table().to_json() and read.digest == table().digest
    assert read.digest != table("NVIDIA H200").digest
    with refused("unwritable", UserError):
        table().save(tmp_path / "none" / "p.json")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 3},
        {"schema": None},
        {"mlp": None},
        {"rest": {"axes": {"embedding": [16, 16]}, "ms": [1, 2]}},
        {"rest": {"axes": {"embedding": [16, 32]}, "ms": [1]}},
        {"rest": {"axes": {"width": [16, 32]}, "ms": [1, 2]}},
        {"rest": {"axes": {"embedding": [16, 32]}, "ms": [1, 0]}},
        {"target": {"device": "cpu"}},
    ],
)
def test_an_invalid_table_is_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**table().to_json(), **change}))
    with refused("unreadable", UserError, path=str(path)):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("change", "code", "details"),
    [
        ({"schema": 3}, "unsupported", {"name": "schema", "got": 3, "most": 2}),
        (
            {"rest": {"axes": {"width": [16, 32]}, "ms": [1, 2]}},
            "mismatch",
            {"name": "axes", "got": ("width",), "expected": ("embedding",)},
        ),
        (
            {"rest": {"axes": {"embedding": [16, 32]}, "ms": [1, -2]}},
            "out-of-range",
            {"name": "ms", "got": -2.0},
        ),
    ],
)
def test_what_is_invalid_in_a_table_is_named(change: dict, code: str, details: dict) -> None:
    with refused(code, **details):
        LatencyTable.from_json({**table().to_json(), **change})


def test_a_missing_file_or_other_text_is_refused(tmp_path: Path) -> None:
    with refused("unreadable", UserError):
        LatencyTable.load(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("latency: 3")
    with refused("unreadable", UserError):
        LatencyTable.load(tmp_path / "p.json")


def test_a_table_for_another_target_is_refused() -> None:
    table().check(TARGET, vit())
    with refused("mismatch", UserError, keys=("batch", "threads")):
        table().check(replace(TARGET, batch=1, threads=2), vit())
    with refused("mismatch", UserError, keys=("device", "threads")):
        table("NVIDIA H200").check(replace(TARGET, threads=None), vit())


def test_a_table_of_the_version_before_reads_alike(tmp_path: Path) -> None:
    """Same keys on disk, `threads` only on a CPU, same digest."""
    gpu = replace(table(), target=LatencyTarget("NVIDIA H200", "eager", "bfloat16", 256))
    stored = gpu.to_json()
    assert stored["target"] == {
        "device": "NVIDIA H200", "runtime": "eager", "dtype": "bfloat16", "batch": 256,
    }  # fmt: skip
    assert LatencyTable.from_json(stored).digest == gpu.digest


def test_a_table_for_a_smaller_model_is_refused() -> None:
    with torch.device("meta"):
        larger = timm.create_model("deit_tiny_patch16_224")
    with refused("out-of-range", name="embedding", got=192):
        table().check(TARGET, larger)


# --- measuring


def test_points_lie_on_whole_groups() -> None:
    assert points_of(64, 16, 3) == (16, 32, 64)
    assert points_of(768, 16, 4) == (16, 272, 512, 768)
    assert points_of(3, 2, 3) == (2, 3) and points_of(1, 2, 3) == (1,)
    assert points_of(65, 1, 3, least=2) == (2, 34, 65)


def tiny(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3, **settings
    ).eval()


def test_a_measured_table_reaches_from_one_group_to_the_whole_model() -> None:
    seen: list[tuple[int, int]] = []
    made = measure_latency_table(
        tiny(), "tiny", batch=2, device="cpu", dtype=torch.float32, points=2, rounds=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert made.attention.axes == {
        "embedding": (16, 32), "heads": (2,), "qk": (8, 16), "v": (8, 16), "tokens": (2, 5),
    }  # fmt: skip
    assert made.mlp.axes == {"embedding": (16, 32), "mlp": (16, 128), "tokens": (2, 5)}
    assert seen[-1] == (16 + 8 + 2 + 2 * 4,) * 2
    assert made.target == replace(TARGET, batch=2, threads=torch.get_num_threads())
    for widths in (least(model_widths(tiny())), model_widths(tiny())):
        assert made.cost(5)(widths) > 0


def test_what_cannot_be_cut_has_one_point() -> None:
    made = measure_latency_table(
        tiny(qk_norm=True), "tiny", batch=1, device="cpu", dtype=torch.float32, points=2, rounds=1
    )
    assert made.attention.axes["qk"] == (16,) and len(made.attention.axes["v"]) == 2


@pytest.mark.parametrize(("points", "rounds"), [(1, 5), (3, 0)])
def test_too_few_points_or_rounds(points: int, rounds: int) -> None:
    with refused("out-of-range", UserError, name="points" if points < 2 else "rounds"):
        measure_latency_table(
            tiny(), "tiny", batch=1, device="cpu", dtype=torch.float32, points=points, rounds=rounds
        )


# --- steps over tokens


def stairs(ms: list[float], points: tuple[int, ...]) -> LatencyTable:
    return replace(table(), steps=Grid({"tokens": points}, np.asarray(ms)))


def test_snapping_goes_to_the_end_of_a_step() -> None:
    one = stairs([1.0, 1.005, 1.0, 1.5, 1.5, 2.0], (10, 11, 12, 13, 14, 15))
    assert [one.snap(n) for n in range(10, 16)] == [12, 12, 12, 14, 14, 15]
    assert (one.snap(9), one.snap(16)) == (9, 16), "what was not measured stays"


def test_snapping_between_points_and_where_latency_only_rises() -> None:
    one = stairs([1.0, 2.0, 3.0], (10, 20, 30))
    assert [one.snap(n) for n in (10, 15, 20, 30)] == [10, 15, 20, 30]
    assert stairs([1.0, 1.0, 3.0], (10, 20, 30)).snap(13) == 20


def test_a_table_without_steps_cannot_be_snapped_to(tmp_path: Path) -> None:
    with refused("missing", UserError, name="steps"):
        table().snap(12)
    table().save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json").steps is None


def test_a_measured_table_has_a_step_for_every_number_of_tokens(tmp_path: Path) -> None:
    one = measure_latency_table(vit(), "small", batch=1, device="cpu", dtype=torch.float32,
                          points=2, rounds=1)  # fmt: skip
    assert one.steps is not None and one.steps.axes["tokens"] == tuple(range(2, 66))
    one.save(tmp_path / "t.json")
    again = LatencyTable.load(tmp_path / "t.json")
    assert again.digest == one.digest and [again.snap(n) for n in (5, 40)] == [
        one.snap(n) for n in (5, 40)
    ]
