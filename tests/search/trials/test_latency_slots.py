"""What a cluster's nodes offer for latencies."""

from __future__ import annotations

import pytest

from vitpareto.search.errors import UserError
from vitpareto.search.trials.nodes import Node, check_target


def test_a_slot_for_latencies_is_exclusive_and_named_as_the_cluster_names_it() -> None:
    plain = Node("a" * 56, "10.0.0.1", {"CPU": 8.0, "node:10.0.0.1": 1.0, "memory": 1e9})
    board = Node("b" * 56, "10.0.0.2", {"CPU": 4.0, "stopwatch": 2.0})
    card = Node("c" * 56, "10.0.0.3", {"CPU": 16.0, "GPU": 8.0, "accelerator_type:H200": 1.0})
    nodes = [plain, board, card]
    assert check_target("stopwatch", nodes) == {"stopwatch": 1.0, "CPU": 4.0}, "the whole node"
    slot = check_target("accelerator:H200", nodes)
    assert slot["GPU"] == 1.0, "a whole card, whatever share trials have"
    assert 0 < slot["accelerator_type:H200"] < 0.01, "all eight cards are of the kind"
    with pytest.raises(
        UserError, match="'stopclock', and no node has it: there is accelerator:H200, stopwatch"
    ):
        check_target("stopclock", nodes)
    with pytest.raises(UserError, match="no accelerator and no resource of the owner's"):
        check_target("accelerator:H200", [plain])
