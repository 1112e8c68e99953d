"""Methods register themselves; declarations that contradict each other are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_registry import register


@pytest.mark.parametrize(
    ("declared", "code", "got"),
    [
        ({"name": "a.b"}, Code.OUT_OF_RANGE, "a.b"),
        ({"name": "a+b"}, Code.OUT_OF_RANGE, "a+b"),
        ({"name": "a,b"}, Code.OUT_OF_RANGE, "a,b"),
        ({"name": "a b"}, Code.OUT_OF_RANGE, "a b"),
        ({"name": "none"}, Code.OUT_OF_RANGE, "none"),
        ({"needs_preparation": True}, Code.CONFLICT, "none"),
        ({"needs_preparation": True, "training": "calibration"}, Code.CONFLICT, "calibration"),
        ({"reads_calibration": True}, Code.CONFLICT, False),
        ({"reads_latency_table": True}, Code.CONFLICT, False),
        ({"kind": "structure", "training": "calibration"}, Code.CONFLICT, "calibration"),
    ],
    ids=str,
)
def test_declarations_that_no_search_could_follow_are_refused(
    declared: dict[str, Any], code: Code, got: object
) -> None:
    method = type("Declared", (Method,), {"name": "declared", "summary": "", **declared})
    with refused(code, method=method.name, got=got):
        register(method)
    assert method.name not in methods.names()
