"""Show the coverage of every room, and fail where it fell below what it was.

Reads `.coverage` in the working directory, which pytest-cov wrote; `.ci/run` calls it after both
lanes. Processes that a test starts (Ray workers, commands) are not traced, so a figure is a lower
bound; the floors are a point below what the fast lane alone reached when they were written.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import coverage

from tests.architecture import ALLOWED, ROOT, module_of, room_of

FLOORS = Path(__file__).with_name("coverage_floors.json")


def covered() -> dict[str, tuple[int, int]]:
    """(lines run, lines) of every room."""
    data = coverage.Coverage()
    data.load()
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name in data.get_data().measured_files():
        path = Path(name)
        if not path.is_relative_to(ROOT) or "tests" in path.relative_to(ROOT).parts:
            continue
        _, lines, _, missing, _ = data.analysis2(name)
        room = found[room_of(module_of(path))]
        room[0] += len(lines) - len(missing)
        room[1] += len(lines)
    return {room: (run, lines) for room, (run, lines) in found.items() if lines}


def main() -> int:
    floors: dict[str, float] = json.loads(FLOORS.read_text())
    found, fell = covered(), []
    print(f"{'room':<22} {'lines':>6} {'covered':>8} {'floor':>6}")
    for room in ALLOWED:
        if room not in found:
            continue
        run, lines = found[room]
        percent, floor = 100 * run / lines, floors[room]
        print(f"{room:<22} {lines:>6} {percent:>7.1f}% {floor:>5.1f}%")
        if percent < floor:
            fell.append(room)
    if missing := sorted(set(floors) - set(found)):
        print(f"rooms without coverage data: {', '.join(missing)}")
    if fell:
        print(f"coverage fell: {', '.join(fell)}")
    return 1 if fell or missing else 0


if __name__ == "__main__":
    sys.exit(main())
