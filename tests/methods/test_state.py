"""A pruned model is copied, pickled, rebuilt from its recipe and shared between threads."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.methods.method_settings import CASES, COVERING, PAIRS, Case, logits, pairs, pruned
from tests.methods.tiny_models import dense, images
from vitpareto import methods


@pairs(PAIRS, fast=COVERING)
def test_copies_pickles_and_rebuilds(kind, case: Case):
    model, reduced = dense(kind), pruned(kind, case)
    batch = images(model, 2)
    expected = logits(reduced, batch)
    assert torch.equal(logits(copy.deepcopy(reduced), batch), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(reduced)), batch), expected)
    recipe = methods.Recipe.from_yaml(reduced.recipe.to_yaml())
    assert recipe.checked(methods.model_shape(reduced)) == reduced.recipe
    assert torch.equal(logits(recipe.build(model, weights=reduced.state_dict()), batch), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_threads_at_once(case: Case):
    reduced = pruned("registers", case)
    batches = [images(dense("registers"), 3, seed) for seed in range(6)]
    one_by_one = [logits(reduced, batch) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(lambda batch: logits(reduced, batch), batches))
    for a, b in zip(one_by_one, at_once, strict=True):
        assert torch.equal(a, b)
