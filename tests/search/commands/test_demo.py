"""`vitpareto demo`: a search whose best trial is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import Run


@pytest.mark.slow
def test_a_demo_without_a_knee_exports_the_most_accurate_trial(
    command: Run, cache: Path, tmp_path: Path
) -> None:
    result = command("demo", "--trials", 2, "--store", tmp_path, "--cache", cache)
    assert result.code == 0, result.err
    line = next(x for x in result.out.splitlines() if "its most accurate trial" in x)
    more = line.partition("may give one: ")[2]
    assert more == f"vitpareto demo --trials 60 --store {tmp_path} --cache {cache}"
    assert "front of demo" in result.out
    (bundle,) = tmp_path.glob("demo/bundle*")
    assert f"the most accurate, to deploy: {bundle}/README.md" in result.out
    assert f"is trial {int(bundle.name.removeprefix('bundle-'))}." in line
    assert json.loads((bundle / "verification.json").read_text())
