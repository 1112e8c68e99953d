"""Certification on held-out images: what is measured, and the coverage of the intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm

from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.methods import Recipe
from vitpareto.search.data import embedded_images
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.models.loading import load_model
from vitpareto.search.stats.intervals import clopper_pearson, paired_difference, wilson_interval
from vitpareto.search.study import certificates
from vitpareto.search.study.certificates import (
    NAMED,
    attach,
    measured,
    order_changes,
    order_note,
    why_not,
    worst_class,
)
from vitpareto.search.study.certification_record import ERROR, CertificationRecord
from vitpareto.search.study.choice import choose
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import TrialResult, pack_bits, unpack_bits
from vitpareto.search.study.verdict import is_control
from vitpareto.search.trials.certification import certify_front, members_of
from vitpareto.search.trials.job_check import CheckedJob, check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

OBJECTIVES = ("top1", "gmacs")
AXES = objectives_named(OBJECTIVES)
#: error probability of the bounds on simulated rates
BOUND_ERROR = 0.01


def trial(
    number: int, right: np.ndarray, gmacs: float, method: str = "tome", **more: object
) -> TrialResult:
    tokens = None if method == "dense" else RecordedStep(method, {"r": 1})
    recipe = RecordedRecipe(tokens=tokens)
    values = {"top1": 100 * float(right.mean()), "gmacs": gmacs, "params_m": 1.0}
    low, high = wilson_interval(int(right.sum()), len(right))
    return TrialResult(
        number, "finished", recipe, f"k{number}", values, recipe, len(right), pack_bits(right),
        low, high, **more,  # type: ignore[arg-type]
    )  # fmt: skip


# -- simulation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedStudy:
    """Recipes with known accuracies, whose errors fall on the same hard images.

    Recipe r, of cost r + 1, is right on an image if a_r + sqrt(.6) z + sqrt(.4) e > 0. z is shared
    by all recipes, e is noise, and both are normal, so the accuracy is Phi(a_r). The last recipe is
    dense. Accuracies increase so little with the cost that noise decides which appear best.
    """

    draw: np.random.Generator
    recipes: int = 40
    search: int = 300
    held_out: int = 500

    @property
    def truth(self) -> np.ndarray:
        return np.linspace(0.80, 0.82, self.recipes)

    def study(self) -> tuple[list[TrialResult], list[TrialResult]]:
        """Return all recipes on search images, and on held-out images."""
        images = self.search + self.held_out
        hard = self.draw.standard_normal(images, dtype=np.float32)
        noise = self.draw.standard_normal((self.recipes, images), dtype=np.float32)
        level = norm.ppf(self.truth)[:, None].astype(np.float32)
        right = level + np.float32(0.6**0.5) * hard + np.float32(0.4**0.5) * noise > 0
        names = ["tome"] * (self.recipes - 1) + ["dense"]
        both = []
        for part in (right[:, : self.search], right[:, self.search :]):
            both.append([trial(i, part[i], i + 1.0, names[i]) for i in range(self.recipes)])
        return both[0], both[1]


def at_most(misses: int, studies: int) -> float:
    """Return an upper bound on a probability, with error BOUND_ERROR."""
    return float(beta.isf(BOUND_ERROR, misses + 1, studies - misses))


def at_least(misses: int, studies: int) -> float:
    return float(beta.ppf(BOUND_ERROR, misses, studies - misses + 1)) if misses else 0.0


def certified_study(world: SimulatedStudy) -> tuple[list[TrialResult], list[TrialResult]]:
    """Return the results on search images, and the front with certificates."""
    search, held_out = world.study()
    members = members_of(search, OBJECTIVES)
    labels = np.arange(world.held_out) % 5
    record = CertificationRecord("f", tuple("abcde"), labels, (tuple(r.trial for r in members),))
    certified = [held_out[r.trial] for r in members]
    return search, [r for r in attach(search, record, certified, held_out[-1]) if r.certified]


def test_certified_intervals_hold_simultaneously() -> None:
    """Selection included: the front is chosen on the search images, as a search does.

    Each of the search's intervals holds for a recipe that was named before; of those that won they
    are too high, even shared among the members like the certified ones.
    """
    world = SimulatedStudy(np.random.default_rng(0))
    studies, missed, naive, shared, winners = 2000, 0, 0, 0, 0
    for _ in range(studies):
        search, held_out = world.study()
        front = front_of(search, AXES)
        error = ERROR / len(front)

        def outside(results: list[TrialResult], error: float = error) -> bool:
            return any(
                not low <= 100 * world.truth[r.trial] <= high
                for r in results
                for low, high in [clopper_pearson(round(r.images * r.values["top1"] / 100),
                                                  r.images, error)]
            )  # fmt: skip

        missed += outside([held_out[r.trial] for r in front])
        shared += outside(front)
        best = front[-1]
        assert best.top1_low is not None and best.top1_high is not None
        truth = 100 * world.truth[best.trial]
        naive += any(not r.top1_low <= 100 * world.truth[r.trial] <= r.top1_high  # type: ignore[operator]
                     for r in front)  # fmt: skip
        winners += not best.top1_low <= truth <= best.top1_high
    assert at_most(missed, studies) <= ERROR, missed
    assert at_least(naive, studies) > 2 * ERROR, naive
    assert at_least(winners, studies) > 2 * ERROR, winners
    assert at_least(shared, studies) > ERROR, shared


def test_certified_accuracies_and_differences_hold_simultaneously() -> None:
    """The intervals of accuracies, and of differences from the dense model."""
    world = SimulatedStudy(np.random.default_rng(1), 20, 150, 250)
    studies, accuracies, differences, missed_targets = 1500, 0, 0, 0
    for _ in range(studies):
        _, certified = certified_study(world)
        truth = {r.trial: 100 * float(world.truth[r.trial]) for r in certified}
        by_trial = {r.trial: r.certified for r in certified}
        accuracies += any(not c.low <= truth[t] <= c.high for t, c in by_trial.items() if c)
        dense = truth[world.recipes - 1]
        differences += any(
            not c.change_low <= truth[t] - dense <= c.change_high  # type: ignore[operator]
            for t, c in by_trial.items()
            if c and c.change is not None
        )
        # the guarantee of `export --min-top1`: the chosen trial has at least this accuracy
        wanted = min(c.low for c in by_trial.values() if c)
        missed_targets += (
            100 * float(world.truth[choose(certified, min_top1=wanted).trial]) < wanted
        )
    assert at_most(accuracies, studies) <= ERROR, accuracies
    assert at_most(differences, studies) <= ERROR, differences
    assert at_most(missed_targets, studies) <= ERROR, missed_targets


def test_certified_rounds_hold_under_optional_continuation() -> None:
    """A user continues the search until no certified accuracy is below a target."""
    draw, studies, missed, continued = np.random.default_rng(2), 3000, 0, 0
    truth, images = 0.8, 400
    for _ in range(studies):
        rounds: list[list[int]] = []
        while len(rounds) < 6 and not any(n > 0.83 * images for some in rounds for n in some):
            rounds.append(list(draw.binomial(images, truth, size=4)))
        continued += len(rounds) > 1
        numbers = iter(range(100))
        record = CertificationRecord(
            "f", (), np.array([]), tuple(tuple(next(numbers) for _ in r) for r in rounds)
        )
        errors = record.errors()
        counts = dict(enumerate(n for some in rounds for n in some))
        ends = {t: clopper_pearson(int(n), images, errors[t]) for t, n in counts.items()}
        missed += any(not low <= 100 * truth <= high for low, high in ends.values())
    assert continued > 0.5 * studies
    assert at_most(missed, studies) <= ERROR, missed


# -- certificates -----------------------------------------------------------------------------


def bits(images: int, wrong: object) -> np.ndarray:
    right = np.full(images, True)
    right[wrong] = False
    return right


def certified(results: list[TrialResult], held: list[np.ndarray]) -> list[TrialResult]:
    """Return the results with certificates from correctness on held-out images; dense is first."""
    labels = np.repeat(np.arange(4), len(held[0]) // 4)
    record = CertificationRecord(
        "f", ("ant", "bee", "cat", "dog"), labels, (tuple(r.trial for r in results),)
    )
    pairs = zip(results, held, strict=True)
    held_out = [trial(r.trial, right, r.values["gmacs"], r.method) for r, right in pairs]
    return attach(results, record, held_out, held_out[0])


def test_certificate_records_its_counts() -> None:
    images = 80
    base = bits(images, [0, 1])
    pruned = bits(images, [1, 60, 61, 62, 63, 64, 65, 66, 67])  # gains 0, loses eight dogs
    dense, tome = certified([trial(0, base, 4.0, "dense"), trial(1, base, 2.0)], [base, pruned])
    certificate = tome.certified
    assert certificate is not None and dense.certified is not None
    assert (certificate.images, certificate.lost, certificate.gained) == (80, 8, 1)
    assert certificate.top1 == 100 * 71 / 80 and certificate.change == 100 * -7 / 80
    error = 0.9 * ERROR / 2
    assert (certificate.low, certificate.high) == clopper_pearson(71, 80, error)
    assert (certificate.change_low, certificate.change_high) == paired_difference(1, 8, 80, error)
    assert certificate.worst == certificates.WorstClass("dog", 40.0, 20, beyond_noise=True)
    assert dense.certified.change is None and dense.certified.worst is None
    assert (unpack_bits(certificate.bits, 80) == pruned).all()


def test_certificate_of_another_recipe_is_not_attached() -> None:
    base = bits(40, [0])
    results = [trial(0, base, 4.0, "dense"), trial(1, base, 2.0)]
    record = CertificationRecord("f", ("a",), np.zeros(40, dtype=np.int64), ((0, 1),))
    other = replace(results[1], key="another recipe")
    found = attach(results, record, [results[0], other], results[0])
    assert [r.certified is not None for r in found] == [True, False]


def test_worst_class_has_the_largest_drop() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 40])
    names = ("ant", "bee", "cat", "dog")  # no image of a dog
    dense = np.full(70, True)
    equal = bits(70, [0, 10, 11, 30, 31, 32, 33])  # a tenth of every class
    found = worst_class(equal, dense, labels, names)
    assert found == certificates.WorstClass("cat", 10.0, 40, beyond_noise=False)
    gone = bits(70, range(10, 20))
    assert worst_class(gone, dense, labels, names) == certificates.WorstClass(
        "bee", 50.0, 20, beyond_noise=True
    )
    better = worst_class(dense, gone, labels, names)
    assert better is not None and better.drop == 0 and not better.beyond_noise
    assert worst_class(dense[:0], dense[:0], labels[:0], names) is None


def test_worst_class_is_rarely_significant_if_no_class_lost_accuracy() -> None:
    """Some of 100 classes always loses accuracy by chance; it is rarely significant."""
    draw, studies, called = np.random.default_rng(3), 1000, 0
    labels = np.repeat(np.arange(100), 20)
    for _ in range(studies):
        dense, right = draw.random((2, len(labels))) < 0.8
        found = worst_class(right, dense, labels, [str(i) for i in range(100)])
        assert found is not None and found.drop > 0
        called += found.beyond_noise
    assert at_most(called, studies) <= ERROR, called


def test_changes_of_order_are_reported() -> None:
    images = 400
    right = {n: bits(images, range(0, wrong)) for n, wrong in ((0, 10), (1, 20), (2, 30), (3, 40))}
    results = [trial(n, r, 4.0 - n, "dense" if n == 0 else "tome") for n, r in right.items()]
    # on held-out images trial 2 is slightly above trial 1, and trial 3 far above both
    held = [bits(images, range(5)), bits(images, range(50)), bits(images, range(48)),
            bits(images, range(20))]  # fmt: skip
    front = front_of(certified(results, held), AXES)
    changes = order_changes(front)
    assert [(c.first, c.second, c.beyond_noise) for c in changes] == [
        (1, 3, True), (2, 3, True), (1, 2, False)
    ]  # fmt: skip
    assert changes[0].search == pytest.approx(5.0)
    assert changes[0].held_out == pytest.approx(7.5)
    note = order_note(front)
    assert note == (
        "order: 3 of 6 pairs are reversed on held-out images, 2 significantly: trial 3 above trial "
        "1 by 7.50 points (significant); trial 3 above trial 2 by 7.00 points (significant); "
        "trial 2 above trial 1 by 0.50 points"
    )
    same = front_of(certified(results, list(right.values())), AXES)
    assert order_changes(same) == []
    assert (
        order_note(same)
        == "order: the same as on the search images for all 6 pairs of certified trials"
    )
    assert order_note(results) == "" and order_changes(results[:1]) == []


def test_long_note_lists_the_largest_changes() -> None:
    images, count = 1000, 12
    results = [trial(0, bits(images, []), 99.0, "dense")]
    results += [trial(n, bits(images, range(10 * n)), 50.0 - n) for n in range(1, count)]
    held = [bits(images, []), *(bits(images, range(500 - 40 * n)) for n in range(1, count))]
    note = order_note(front_of(certified(results, held), AXES))
    assert note.count("trial") == 2 * NAMED and note.endswith(f"; and {55 - NAMED} more")


def test_reversal_is_rarely_significant_if_members_are_equal() -> None:
    draw, studies, called = np.random.default_rng(4), 300, 0
    for _ in range(studies):
        hard = draw.normal(size=300) > 0.8
        search = [bits(100, range(n)) for n in range(8)]
        held = [(~hard) ^ (draw.random(300) < 0.05) for _ in range(8)]
        results = [trial(n, r, 8.0 - n, "dense" if n == 0 else "tome") for n, r in
                   enumerate(search)]  # fmt: skip
        called += any(c.beyond_noise for c in order_changes(certified(results, held)))
    assert at_most(called, studies) <= ERROR, called


def test_certified_trials_are_both_fronts_and_the_dense_model() -> None:
    def at(number: int, top1: int, gmacs: float, method: str) -> TrialResult:
        return trial(number, bits(100, range(100 - top1)), gmacs, method)

    results = [
        at(0, 80, 10.0, "dense"), at(1, 82, 5.0, "tome"), at(2, 60, 4.0, "random"),
        at(3, 50, 4.5, "random"), at(4, 70, 6.0, "resize"), at(5, 55, 5.5, "topk"),
        at(6, 65, 3.0, "tome"), at(7, 40, 1.0, "tome"),
        replace(at(8, 99, 0.1, "tome"), state="raced_out"),
        replace(at(9, 0, 9.0, "tome"), state="failed", values={}),
    ]  # fmt: skip
    assert is_control(results[2]) and is_control(results[0]) and not is_control(results[1])
    assert [r.trial for r in members_of(results, OBJECTIVES)] == [0, 1, 2, 4, 6, 7]
    assert members_of(results[8:], OBJECTIVES) == []


# ------------------------------------------------------------------------------------ a real study


@dataclass
class CertifiedSearch:
    """A finished search, and its certification."""

    prepared: CheckedJob
    resources: TrialResources
    messages: list[str]

    @property
    def folder(self) -> StudyFolder:
        return self.prepared.folder

    def certify(self, recovered: bool = False) -> dict[int, str]:
        task = study_task(self.prepared, threads=self.resources.cpus)
        return certify_front(
            self.folder, task, self.prepared.data, OBJECTIVES, cpus=self.resources.cpus,
            gpus=self.resources.gpus, report=self.messages.append, recovered=recovered,
        )  # fmt: skip

    def files(self) -> dict[str, int]:
        return {
            p.name: p.stat().st_mtime_ns for p in self.folder.folder.glob("certified/[0-9]*.json")
        }


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, capacity: ClusterCapacity
) -> Iterator[CertifiedSearch]:
    config = SearchConfig.of({
        "name": "s", "trials": 8, "images": 60, "store": str(tmp_path_factory.mktemp("store")),
        "cache": str(cache), "workers": 1, "device": "cpu", "latency": "off", "certify": "off",
        "race": "off",
    })  # fmt: skip
    prepared = check_job(config)
    run_study(prepared, cpus=1, gpus=0)
    prepared.folder.write_job(
        JobRequest({**config.plain(), "certify": "front"})
    )  # as if it had been broken off
    yield CertifiedSearch(prepared, TrialResources.of(config, "cpu", 1, 0), [])


def test_certification_equals_a_plain_loop_over_held_out_images(real: CertifiedSearch) -> None:
    """The second implementation is a loop over the model from timm, the recipe and the images."""
    assert real.certify() == {}
    members = members_of(real.folder.trials.all(), OBJECTIVES)
    assert real.messages == [f"certifying {len(members)} trials on 400 held-out images"]
    held = {r.trial: r for r in real.folder.certification().results()}
    assert set(held) == {r.trial for r in members}
    model = load_model("digits")
    raw, labels = embedded_images.draw("held-out")
    images = Preprocess.of(model).normalise(torch.from_numpy(raw))
    for result in members:
        assert result.resolved is not None
        pruned = result.resolved.to_recipe().build(model)
        with torch.inference_mode():
            right = pruned(images).argmax(dim=1).numpy() == labels
        found = held[result.trial]
        # other thread counts and batches may flip a near-tied image
        assert int(np.sum(right != unpack_bits(found.bits, found.images))) <= 1
        assert found.key == result.key and found.images == 400
        assert found.provenance.split == "held-out"
    certified = [r for r in measured(real.folder) if r.certified is not None]
    assert [r.trial for r in certified] == sorted(held)
    assert sum(r.certified.images for r in certified if r.certified) == 400 * len(held)
    front = front_of(measured(real.folder), AXES)
    assert why_not(real.folder, front) == ""
    worst = front[0].certified.worst if front[0].certified else None
    assert worst is not None and worst.name in embedded_images.CLASSES


def test_certified_trial_is_not_measured_again(real: CertifiedSearch) -> None:
    real.certify()
    before, count = real.files(), len(real.messages)
    assert real.certify() == {}
    assert real.files() == before and len(real.messages) == count
    # as if the driver had died before the last one was durable
    path = max((real.folder.folder / "certified").glob("[0-9]*.json"))
    whole = json.loads(path.read_text())
    path.unlink()
    assert real.certify() == {}
    assert real.messages[-1] == "certifying 1 trials on 400 held-out images"
    after = real.files()
    assert {k: v for k, v in after.items() if k != path.name} == {
        k: v for k, v in before.items() if k != path.name
    }
    assert json.loads(path.read_text())["bits"] == whole["bits"]
    assert len(real.folder.certification().read().rounds) == 1, "the same round of the error"


def test_later_member_gets_a_new_round(real: CertifiedSearch) -> None:
    real.certify()
    before = {r.trial: r.certified for r in measured(real.folder)}
    results = real.folder.trials.all()
    cheapest = min(results, key=lambda r: r.values["gmacs"])
    recipe = Recipe.of("tome", r=8)
    worker = Worker.open(study_task(real.prepared, threads=None))
    added = measure_recipe(worker, len(results), recipe)
    assert added.values["gmacs"] < cheapest.values["gmacs"]
    real.folder.trials.write(added)
    assert why_not(real.folder, front_of(measured(real.folder), AXES)).startswith(
        f"trials not certified on held-out images yet: {added.trial}; run vitpareto search --name s"
    )
    assert real.certify() == {}
    rounds = real.folder.certification().read().rounds
    assert rounds[-1] == (added.trial,) and len(rounds) == 2
    now = {r.trial: r.certified for r in measured(real.folder)}
    assert {t: now[t] for t in before} == before, "no earlier interval may change"
    certificate = now[added.trial]
    right = int(unpack_bits(certificate.bits, 400).sum())
    assert (certificate.low, certificate.high) == pytest.approx(
        clopper_pearson(right, 400, 0.05 * 0.1 * 0.5)
    )


def test_other_held_out_images_are_refused(real: CertifiedSearch) -> None:
    real.certify()
    record = real.folder.certification().read()
    before = real.files()
    try:
        real.folder.certification().write(replace(record, fingerprint="of others"))
        assert real.certify() == {}
        assert "other held-out images" in real.messages[-1] and real.files() == before
    finally:
        real.folder.certification().write(record)


def test_failing_member_does_not_stop_the_others(
    real: CertifiedSearch,
) -> None:
    real.certify()
    number = front_of(real.folder.trials.all(), AXES)[0].trial
    path = real.folder.folder / "certified" / f"{number:06d}.json"
    path.unlink()
    trials = real.folder.folder / "trials" / f"{number:06d}.json"
    text = trials.read_text()
    broken = json.loads(text)
    broken["resolved"] = {"weights": "0123456789abcdef"}
    trials.write_text(json.dumps(broken))
    try:
        failed = real.certify()
        assert list(failed) == [number] and "0123456789abcdef" in failed[number]
        assert real.messages[-1].startswith(f"trial {number} is not certified: ")
        note = why_not(real.folder, front_of(measured(real.folder), AXES))
        assert note.startswith(f"trials not certified on held-out images yet: {number}; ")
    finally:
        trials.write_text(text)
    assert real.certify() == {} and path.is_file(), "tried again by the next call"


def test_recovered_front_is_certified(real: CertifiedSearch) -> None:
    results = real.folder.trials.all()
    one = next(r for r in front_of(results, AXES) if not r.is_reference)
    model = load_model("digits")
    pruned = one.rebuilt_from.to_recipe().build(model)
    with torch.no_grad():  # as fine-tuning would, it moves a weight
        pruned.head.bias += 0.01  # type: ignore[union-attr, operator]
    digest = real.folder.artifacts.save(pruned.state_dict())
    recipe = replace(one.rebuilt_from.to_recipe(), weights=digest)
    worker = Worker.open(study_task(real.prepared, threads=None))
    after = measure_recipe(worker, one.trial, recipe)
    (real.folder.folder / "recovered").mkdir(exist_ok=True)
    real.folder.recovery.write(replace(after, recipe=one.recipe))
    away = real.folder.folder / "certified"
    away.rename(away.with_name("away"))
    try:
        assert real.certify(recovered=True) == {}
        assert "the study's dense model is not" in real.messages[-1]
    finally:
        away.with_name("away").rename(away)
    real.certify()
    assert real.certify(recovered=True) == {}
    (found,) = [r for r in measured(real.folder, recovered=True) if r.certified is not None]
    certificate = found.certified
    assert found.trial == one.trial and certificate is not None and certificate.images == 400
    assert certificate.change is not None, "compared with the dense model before recovery"
    assert [r.trial for r in real.folder.recovery.results()] == [one.trial]


def test_labels_and_rounds_round_trip() -> None:
    labels = np.array([0, 999, 3, 65535 % 1000])
    record = CertificationRecord("abc", tuple(map(str, range(1000))), labels, ((0, 3), (7,)))
    again = CertificationRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert (again.labels == labels).all() and again.rounds == record.rounds
    assert again.classes == record.classes and again.fingerprint == "abc"
    expected = {0: 0.9 * ERROR / 2, 3: 0.9 * ERROR / 2, 7: 0.1 * ERROR * 0.5}
    assert again.errors() == pytest.approx(expected)
