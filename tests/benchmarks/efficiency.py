"""Search efficiency: image-forwards until the front is as good as all arms' together, by arm.

    python -m tests.benchmarks.efficiency --pool digits.npz
    python -m tests.benchmarks.efficiency --pool cifar.npz --model M --weights W --data D

The pool (`pool.py`) is measured first where its file is not there yet. Every arm then replays it,
five seeds each; the images' order and the sampler differ from seed to seed. An arm pays one forward
for every image that a trial sees, also for a candidate that it proposes a second time, unless it
knows that it has it already. The reference is the hypervolume of everything that any arm measured
in full (dense accuracy - 10 points, dense cost). Draws FILE.png beside the pool.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from ray.tune.search.optuna import OptunaSearch

from tests.benchmarks.pool import Nearest, Pool, build
from vitpareto.methods import BadInput
from vitpareto.search.models.loading import load_model
from vitpareto.search.stats.pareto import non_dominated
from vitpareto.search.stats.racing import Race, rungs
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import Front, reference_point
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.optuna_trials import RACED_OUT_AS, RacedOutAs
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.rungs import RungReport
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.trials.early_stopping import EarlyStopping
from vitpareto.search.trials.trial_actor import RUNG  # noqa

AXES = (OBJECTIVES["top1"], OBJECTIVES["gmacs"])
NAMES = tuple(o.name for o in AXES)
SIGNS = [o.sign for o in AXES]
ENOUGH = 0.99
SUBSET = 0.1
#: of MO-ASHA: how many of a rung go on, and how many rungs there are below all images
ETA, BELOW = 3, 3


@dataclass
class Lab:
    """What arms share: the pool as one seed sees it, and what a recipe of it is."""

    pool: Pool
    space: Space
    reshape: ShapeFinder
    nearest: Nearest
    seed: int
    trials: int

    @property
    def images(self) -> int:
        return self.pool.images

    def point(self, at: int, images: int | None = None) -> tuple[float, float]:
        """Top-1 in percent on the first images, and GMACs."""
        return 100 * float(self.pool.right[at, :images].mean()), float(self.pool.gmacs[at])

    def asked(self, trial: optuna.Trial) -> tuple[int, str] | None:
        """The pool's recipe and the candidate's own key; None for a choice that is not allowed."""
        try:
            recipe = self.space.suggest(trial, self.reshape)
            key = recipe.key(self.reshape(recipe))
        except BadInput:
            return None
        return self.nearest(trial.params), key


@dataclass
class Run:
    """An arm's way: after every trial, image-forwards so far and the hypervolume it had."""

    reference: np.ndarray
    forwards: list[int] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    full: set[int] = field(default_factory=set)
    front: Front = field(init=False)

    def __post_init__(self) -> None:
        self.front = Front(AXES, self.reference)

    def measured(self, lab: Lab, at: int) -> None:
        """A recipe on all images."""
        if at not in self.full:
            self.full.add(at)
            self.front.add(at, dict(zip(NAMES, lab.point(at), strict=True)))

    def step(self, forwards: int) -> None:
        self.forwards.append((self.forwards[-1] if self.forwards else 0) + forwards)
        self.found.append(self.front.progress())


Arm = Callable[[Lab, Run], None]


def ours(race: bool = True, tell: RacedOutAs = RACED_OUT_AS) -> Arm:
    """The searcher itself, as it is; only the worker is replayed."""

    def arm(lab: Lab, run: Run) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = StudyFolder(Path(scratch) / "s")
            folder.create()
            rules = Race(lab.images, 0.05, lab.trials)
            early_stopping = EarlyStopping(rules, AXES, Provenance()) if race else None
            settings = SessionSettings(
                objectives=NAMES, sampler="tpe", seed=lab.seed, trials=lab.trials, raced_out_as=tell
            )
            session = StudySession(
                folder, lab.space, settings, shape_of=lab.reshape, early_stopping=early_stopping,
                storage=optuna.storages.InMemoryStorage(),
            )  # fmt: skip
            looked = rungs(lab.images)[:-1] if race else ()
            while (proposal := session.next("t")) is not None:
                config = proposal.config()
                trial = session.study.get_trials(deepcopy=False)[proposal.number]
                at = lab.nearest(trial.params)
                seen = _climb(lab, session, folder, config, at, looked)
                if seen == lab.images:
                    run.measured(lab, at)
                session.complete("t")
                run.step(seen)

    return arm


def _climb(
    lab: Lab, session: StudySession, folder: StudyFolder, config: dict[str, Any], at: int,
    looked: tuple[int, ...],
) -> int:  # fmt: skip
    """One trial as a worker would have it, its result made durable; the images it saw."""
    right, (top1, gmacs) = lab.pool.right[at], lab.point(at)
    recipe = RecordedRecipe.from_json(config["recipe"])
    for stop in looked:
        values = {"top1": lab.point(at, stop)[0], "gmacs": gmacs}
        rung = RungReport(config["key"], recipe, values, right[:stop])
        if not session.on_rung("t", rung):
            return stop
    folder.trials.write(
        TrialResult(
            config["trial"],
            "finished",
            recipe,
            config["key"],
            {"top1": top1, "gmacs": gmacs},
            recipe,
            len(right),
            pack_bits(right),
            top1,
            top1,
        )  # fmt: skip
    )
    return lab.images


def plain(sampler: Callable[[int], optuna.samplers.BaseSampler], subset: bool = False) -> Arm:
    """Optuna's ask and tell. subset: on a tenth of the images, the front re-measured on all."""

    def arm(lab: Lab, run: Run) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(lab.seed))
        few = round(SUBSET * lab.images) if subset else lab.images
        seen: dict[int, tuple[float, float]] = {}
        spent = 0
        for _ in range(_asks(lab, few)):
            trial = study.ask()
            asked = lab.asked(trial)
            if asked is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            at, _ = asked
            seen[at] = lab.point(at, few)
            study.tell(trial, list(seen[at]))
            if not subset:
                run.measured(lab, at)
                run.step(lab.images)
                continue
            spent += few
            # as if it ended here: its front is measured on all images
            chosen = np.array(list(seen))[non_dominated(np.array(list(seen.values())), SIGNS)]
            run.front = Front(AXES, run.reference)
            for member in chosen.tolist():
                run.front.add(member, dict(zip(NAMES, lab.point(member), strict=True)))
                run.full.add(member)
            run.forwards.append(spent + lab.images * len(chosen))
            run.found.append(run.front.progress())

    return arm


def _asks(lab: Lab, images: int) -> int:
    """As many trials as cost what `lab.trials` cost on all images, but no more than thrice."""
    return min(3 * lab.trials, lab.trials * lab.images // images)


def ray_optuna(lab: Lab, run: Run) -> None:
    """Ray's own OptunaSearch, asked and told as Ray does."""
    found: dict[str, tuple[int, str] | None] = {}

    def space(trial: optuna.Trial) -> dict[str, Any]:
        found["now"] = lab.asked(trial)
        return {}

    search = OptunaSearch(space=space, metric=list(NAMES), mode=["max", "min"], seed=lab.seed)
    for i in range(lab.trials):
        if search.suggest(f"t{i}") is None:
            break
        asked = found["now"]
        if asked is None:
            search.on_trial_complete(f"t{i}", error=True)
            continue
        result = dict(zip(NAMES, lab.point(asked[0]), strict=True))
        search.on_trial_complete(f"t{i}", {**result, "training_iteration": 1})
        run.measured(lab, asked[0])
        run.step(lab.images)


def grid(lab: Lab, run: Run) -> None:
    """The published settings, one after another."""
    for at in [0, *(lab.nearest(p) for _, p in lab.space.preset_params())]:
        run.measured(lab, at)
        run.step(lab.images)


def random_proposals(lab: Lab) -> Iterator[int]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=lab.seed))
    while True:
        asked = lab.asked(study.ask())
        if asked is not None:
            yield asked[0]


def mo_asha(lab: Lab, run: Run) -> None:
    """Syne Tune's rule: at every rung the best third of those that reached it go on, by
    non-dominated sorting and, in a layer, an epsilon-net; random proposals.
    """
    levels = [math.ceil(lab.images / ETA**k) for k in range(BELOW, -1, -1)]
    reached: list[list[tuple[float, float]]] = [[] for _ in levels]
    spent, proposals = 0, random_proposals(lab)
    for _ in range(20 * lab.trials):
        if spent >= lab.trials * lab.images:
            return
        at, seen = next(proposals), 0
        for level, there in zip(levels, reached, strict=True):
            seen = level
            if level == lab.images:
                run.measured(lab, at)
                break
            there.append(lab.point(at, level))
            best = math.ceil(len(there) / ETA)
            if len(there) >= ETA and _place(np.array(there), best) >= best:
                break
        spent += seen
        run.step(seen)


def _place(points: np.ndarray, enough: int) -> int:
    """Where the last of them stands: layers of non-dominated points, each in the order of an
    epsilon-net (every next one is furthest from those before). No further than to `enough`.
    """
    left, place, own = np.arange(len(points)), 0, len(points) - 1
    scale = np.ptp(points, axis=0)
    scaled = points / np.where(scale > 0, scale, 1.0)
    while place < enough:
        layer = left[non_dominated(points[left], SIGNS)]
        if own in layer:
            at, apart = int(layer[0]), np.full(len(layer), np.inf)
            while at != own and place < enough:
                apart = np.minimum(apart, np.linalg.norm(scaled[layer] - scaled[at], axis=1))
                at, place = int(layer[apart.argmax()]), place + 1
            return place
        place += len(layer)
        left = np.setdiff1d(left, layer)
    return place


def at_random(lab: Lab, run: Run) -> None:
    proposals = random_proposals(lab)
    for _ in range(lab.trials):
        run.measured(lab, next(proposals))
        run.step(lab.images)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


PLAIN = "plain Optuna TPE"
ARMS: dict[str, Arm] = {
    "ours": ours(),
    "ours, stopped ones told as estimates": ours(tell="estimate"),
    "ours without racing": ours(race=False),
    "plain Ray OptunaSearch": ray_optuna,
    PLAIN: plain(_tpe),
    "plain Optuna NSGA-II": plain(lambda seed: optuna.samplers.NSGAIISampler(seed=seed)),
    "TPE on 10 %, front re-measured": plain(_tpe, subset=True),
    "the presets' grid": grid,
    "MO-ASHA": mo_asha,
    "random": at_random,
}


def enough(run: Run, wanted: float) -> float:
    """Image-forwards until the hypervolume was there; inf where it never was."""
    return next((f for f, h in zip(run.forwards, run.found, strict=True) if h >= wanted), math.inf)


def gap(run: Run, best: np.ndarray) -> float:
    """The most that the run's front is below the best one, at any budget of that, in points.
    Nothing within a budget is worth as little as the reference point.
    """
    own = np.array([m.values for m in run.front.members()])
    least = float(run.reference[0])
    return max(top1 - max([least, *(a for a, c in own if c <= cost)]) for top1, cost in best)


def median_forwards(some: list[Run], wanted: float) -> float:
    return float(np.median([enough(run, wanted) for run in some]))


def said(forwards: float, base: float) -> str:
    """Forwards, and as a part of plain TPE's where both got there."""
    if math.isinf(forwards):
        return "never"
    share = f" ({100 * forwards / base:.0f} %)" if math.isfinite(base) else ""
    return f"{forwards:,.0f}{share}"


def show(runs: dict[str, list[Run]], pool: Pool, reference: np.ndarray) -> None:
    """The table. Two goals: 99 % of everything that was found by all arms together, and what plain
    TPE has (the median of its seeds) when it ends.
    """
    full = sorted({at for some in runs.values() for run in some for at in run.full})
    points = np.array([[100 * pool.right[at].mean(), pool.gmacs[at]] for at in full])
    front = Front(AXES, reference)
    for at, point in zip(full, points, strict=True):
        front.add(at, dict(zip(NAMES, point, strict=True)))
    best = points[non_dominated(points, SIGNS)]
    best = best[(best * SIGNS <= reference * SIGNS).all(axis=1)]
    goals = (
        ENOUGH * front.progress(),
        float(np.median([run.found[-1] for run in runs[PLAIN]])),
    )
    print(
        f"{len(pool.gmacs)} recipes on {pool.images} images; the best front of all arms has "
        f"{len(best)} members; medians of {len(runs[PLAIN])} seeds, in brackets of {PLAIN}'s\n"
        f"| arm | image-forwards to {ENOUGH:.0%} of all | seeds that got there | "
        "to what plain TPE ends with | image-forwards in all | hypervolume at the end, of all | "
        "most below the best front, points |\n|---|---|---|---|---|---|---|"
    )
    bases = [median_forwards(runs[PLAIN], goal) for goal in goals]
    for name, some in runs.items():
        to = [median_forwards(some, goal) for goal in goals]
        got = sum(math.isfinite(enough(run, goals[0])) for run in some)
        ends = [100 * run.found[-1] / front.progress() for run in some]
        gaps = [gap(run, best) for run in some]
        print(
            f"| {name} | {said(to[0], bases[0])} | {got} of {len(some)} | {said(to[1], bases[1])} |"
            f" {np.median([run.forwards[-1] for run in some]):,.0f} | "
            f"{np.median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f}) | "
            f"{np.median(gaps):.2f} ({min(gaps):.2f}–{max(gaps):.2f}) |"
        )


def draw(runs: dict[str, list[Run]], path: Path, title: str) -> None:
    """Median hypervolume over image-forwards, of every arm."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    top = max(run.found[-1] for some in runs.values() for run in some)
    for i, (name, some) in enumerate(runs.items()):
        grid = np.geomspace(
            min(run.forwards[0] for run in some), max(run.forwards[-1] for run in some), 200
        )
        curves = []
        for run in some:
            at = np.searchsorted(run.forwards, grid, side="right") - 1
            best = np.maximum.accumulate(run.found)
            curves.append(np.where(at >= 0, best[np.maximum(at, 0)], np.nan))
        with np.errstate(all="ignore"):
            median = np.median(curves, axis=0)
        axes.plot(
            grid, median / top, label=name, color=f"C{i}",
            linewidth=2.5 if name == "ours" else 1.3, linestyle="-" if i < 5 else "--",
        )  # fmt: skip
    axes.axhline(ENOUGH, color="0.6", linewidth=1, linestyle=":")
    axes.set(
        xscale="log", xlabel="image-forwards", ylabel="hypervolume, of the best of all",
        ylim=(0.7, 1.005), title=title,
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Setting:
    """What a process needs to replay an arm."""

    pool: Path
    config: SearchConfig
    trials: int


def reference_of(pool: Pool) -> np.ndarray:
    dense = {"top1": 100 * float(pool.right[0].mean()), "gmacs": float(pool.gmacs[0])}
    return reference_point(dense, AXES)


def replay(setting: Setting, name: str, seed: int) -> Run:
    """One arm, one seed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    config, pool = setting.config, Pool.load(setting.pool)
    model = load_model(config.model, Path(config.weights) if config.weights else None)
    space = Space.of(config.study_methods, config.space, config.fixed)
    run = Run(reference_of(pool))
    lab = Lab(pool.shuffled(seed), space, ShapeFinder(model), Nearest(pool), seed, setting.trials)
    ARMS[name](lab, run)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True, help="measured recipes (.npz)")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int)
    parser.add_argument("--cache")
    parser.add_argument("--structure", action="store_true", help="also beneath token methods")
    parser.add_argument("--random", type=int, default=250, help="recipes of a worker, to measure")
    parser.add_argument("--tpe", type=int, default=150)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes that replay")
    given = parser.parse_args()
    config = SearchConfig.of({
        "model": given.model, "data": given.data, "images": given.images, "device": "cpu",
        "weights": given.weights, "cache": given.cache,
        "fixed": {} if given.structure else {"structure": "none"},
    })  # fmt: skip
    if not given.pool.exists():
        build(config, given.random, given.tpe).save(given.pool)
    setting = Setting(given.pool, config, given.trials)
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[Run]] = {}
    with ProcessPoolExecutor(given.workers, mp_context=context) as crew:
        tasks = {
            name: [crew.submit(replay, setting, name, seed) for seed in range(given.seeds)]
            for name in ARMS
        }
        for name, asked in tasks.items():
            runs[name] = [one.result() for one in asked]
            print(f"replayed: {name}", file=sys.stderr, flush=True)
    pool = Pool.load(given.pool)
    show(runs, pool, reference_of(pool))
    draw(runs, given.pool.with_suffix(".png"), f"{config.model} on {config.data}")


if __name__ == "__main__":
    main()
