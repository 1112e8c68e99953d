"""The Ray adapter of a study's session."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from ray.tune.search import Searcher

from vitpareto.search.study.progress import StudyProgress
from vitpareto.search.trials.searcher import FrontSearcher
from vitpareto.search.trials.trial_actor import RUNG


class RecordedSession:
    """Records the calls; proposes one trial."""

    def __init__(self) -> None:
        self.progress = StudyProgress(requested=1)
        self.calls: list[tuple[Any, ...]] = []
        self.proposals: list[Any] = [self]

    def config(self) -> dict[str, Any]:
        return {"trial": 0, "key": "k", "recipe": {}}

    def next(self, trial_id: str) -> Any:
        self.calls.append(("next", trial_id))
        return self.proposals.pop() if self.proposals else None

    def on_rung(self, trial_id: str, report: Any) -> bool:
        self.calls.append(("on_rung", trial_id, report))
        return False

    def complete(self, trial_id: str, **outcome: Any) -> None:
        self.calls.append(("complete", trial_id, outcome))


def adapter() -> tuple[FrontSearcher, RecordedSession]:
    session = RecordedSession()
    return FrontSearcher(session), session  # type: ignore[arg-type]


def test_suggest_returns_a_config_then_none_then_finished() -> None:
    searcher, session = adapter()
    assert searcher.suggest("a") == {"trial": 0, "key": "k", "recipe": {}}
    assert searcher.suggest("b") is None
    session.progress.ended = "1 trials measured"
    assert searcher.suggest("c") == Searcher.FINISHED
    assert session.calls == [("next", "a"), ("next", "b")]


def test_skip_next_skips_one_proposal() -> None:
    searcher, session = adapter()
    searcher.skip_next = True
    assert searcher.suggest("a") is None and session.calls == []
    assert searcher.suggest("a") is not None


def test_rung_reports_and_outcomes_reach_the_session() -> None:
    searcher, session = adapter()
    assert searcher.goes_on("a", {}), "a result without a rung report"
    assert not searcher.goes_on("a", {RUNG: "report"})
    searcher.on_trial_complete("a", {"outside": True, "violation": "0.5"})
    searcher.on_trial_complete("b", error=True)
    assert session.calls == [
        ("on_rung", "a", "report"),
        ("complete", "a", {"violation": 0.5, "worker_died": False}),
        ("complete", "b", {"violation": None, "worker_died": True}),
    ]


def test_copies_and_pickles_hold_no_state() -> None:
    searcher, _ = adapter()
    assert copy.deepcopy(searcher) is searcher
    assert vars(pickle.loads(pickle.dumps(searcher))) == {}
