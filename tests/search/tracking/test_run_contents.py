"""The contents of runs, without a server."""

from __future__ import annotations

from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, TrialState
from vitpareto.search.tracking.run_contents import MAX_TAG_CHARS, fit_note, ranks_of


def test_a_long_note_is_cut_at_the_end_of_a_line() -> None:
    note = "\n".join(f"| {i} | line |" for i in range(2000))
    cut = fit_note(note)
    assert len(cut) <= MAX_TAG_CHARS
    *kept, empty, mark = cut.splitlines()
    assert kept == note.splitlines()[: len(kept)] and empty == "" and mark.startswith("…")
    assert fit_note("short") == "short"


def test_only_members_of_the_front_have_rank_zero() -> None:
    def trial(
        number: int, top1: float, gmacs: float, state: TrialState = "finished"
    ) -> TrialResult:
        return TrialResult(
            number, state, RecordedRecipe(), str(number), {"top1": top1, "gmacs": gmacs}
        )

    results = [
        trial(0, 80, 4), trial(1, 80, 4), trial(2, 70, 4), trial(3, 60, 1),
        trial(4, 99, 1, "raced_out"),
    ]  # fmt: skip
    assert ranks_of(results, ("top1", "gmacs")) == {0: 0, 1: 1, 2: 1, 3: 0}
    assert ranks_of([], ("top1", "gmacs")) == {}
