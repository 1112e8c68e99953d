"""Progress on standard error: bars on a terminal, a line every 10 seconds in a log."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from vitpareto.search.study.progress import StudyProgress
    from vitpareto.search.study.results import TrialResult

#: seconds between two lines in a log
LOG_S = 10.0


class ProgressDisplay:
    """Shows progress until the block ends.

    Args:
        terminal: True for bars, False for lines, None for bars if standard error is a terminal.
    """

    def __init__(self, terminal: bool | None = None) -> None:
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown = 0.0  # when a line was last written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Stop the bars and leave them on the screen; the next update starts new ones."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows `what`, for example "decoding images"."""
        return functools.partial(self.count, what)

    def count(self, what: str, done: int, total: int) -> None:
        """Show `what: done/total`; a finished count is always shown."""
        self.show(what, f"{what}: {done}/{total}", done, total, due=done >= total)
        if done >= total:
            self.close()

    def show(self, name: str, text: str, done: int, total: int | None, due: bool = False) -> None:
        """Show one line of text with its bar.

        Args:
            name: of the bar; the same name updates the same bar.
            text: shown beside the bar.
            done: steps done.
            total: steps in total; None if it is not known.
            due: write the line to a log even if less than LOG_S have passed.
        """
        if self._terminal:
            self._draw(name, text, done, total)
        elif due or time.monotonic() - self._shown >= LOG_S:
            self._shown = time.monotonic()
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
            sys.stderr.flush()

    def _draw(self, name: str, text: str, done: int, total: int | None) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(text, total=total)
        self._bars.update(self._tasks[name], description=text, completed=done, total=total)


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    # on a narrow terminal a long text wraps and is not cut
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False))
    return Progress(BarColumn(bar_width=20), text, console=Console(stderr=True, highlight=False))


class SearchProgress:
    """The progress of a search. `on_result` is a hook of the searcher."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        self._begin: float | None = None
        self._first = 0.0  # seconds from the first trial to the first result
        self.results = 0
        self.seconds = 0.0  # from the first trial to the last result

    @property
    def per_minute(self) -> float:
        """Results per minute."""
        return 60 * self.results / max(self.seconds, 1e-9)

    def on_result(self, result: TrialResult | None, state: StudyProgress) -> None:
        """Update the display. `result` is None when a trial starts and when the search ends."""
        if self._begin is None:
            self._begin = time.monotonic()
        if result is not None:
            self.results += 1
            self.seconds = time.monotonic() - self._begin
            self._first = self._first or self.seconds
        ended = bool(state.ended) and result is None
        self._display.show("search", self.text(state), state.done, state.requested, due=ended)

    def text(self, state: StudyProgress) -> str:
        """The state of the search in one line."""
        total = "" if state.requested is None else f"/{state.requested}"
        text = (
            f"{state.done}{total} done, {state.raced_out} of them stopped early, "
            f"{state.running} running, {state.failed} failed; "
            f"front {len(state.front)} trials, hypervolume {state.hypervolume:.4g}"
        )
        left = self._seconds_left(state)
        return text if left is None else f"{text}; about {left // 60} min {left % 60} s left"

    def _seconds_left(self, state: StudyProgress) -> int | None:
        # not from the first result, which includes the start of the workers
        if self.results < 2 or state.requested is None or state.done >= state.requested:
            return None
        each = (self.seconds - self._first) / (self.results - 1)
        return round((state.requested - state.done) * each)
