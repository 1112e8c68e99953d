"""Programs of pruned models: torch.export's, and torch.compile's graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.methods.method_settings import CASES, Case, logits, pruned
from tests.methods.tiny_models import dense, images
from vitpareto import methods

#: one block fewer than the others, which saves a quarter of the time
KIND = "layer_scale"


def has_program(case: Case) -> bool:
    shape, declared = methods.model_shape(dense(KIND)), methods.get(case.method)
    return declared.refuses_export(declared.check(case.params(shape), shape), shape) == ""


#: each method's first setting that exports
EXPORTED = list({case.method: case for case in reversed(CASES) if has_program(case)}.values())
#: one of each form for the fast lane: staged, merging, padded, by the attention's maximum
FAST = ("topk", "tome", "ats", "tram")


def lanes(cases: list[Case]) -> list:
    """One parameter a case; those not of FAST are marked slow."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(case, id=str(case), marks=marks[case.method in FAST]) for case in cases]


def attributes(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    """Name, type and attribute names of every module."""
    return [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]


@pytest.mark.parametrize("case", lanes(EXPORTED))
def test_export_leaves_the_model_as_it_was(case: Case):
    """The program gives the model's logits for any batch size."""
    model = dense("class_avg" if case.method == "ats" else KIND)
    reduced, batch = case.build(model), images(model, 5)
    # before the first forward, which sets nothing on a module either
    before_export = attributes(reduced)
    expected, before = logits(reduced, batch), copy.deepcopy(reduced.state_dict())
    with torch.no_grad():
        program = torch.export.export(
            reduced, (batch[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    assert torch.equal(logits(reduced, batch), expected)
    assert attributes(reduced) == before_export
    after = reduced.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    module = program.module()
    for count in (1, 5):
        out = logits(module, batch[:count])
        torch.testing.assert_close(out, expected[:count], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", lanes([case for case in EXPORTED if not case.per_image]))
def test_compiles_as_one_graph(case: Case):
    """A graph break would run the rest eagerly without notice. Methods whose images decide their
    counts are left out: the shapes that follow depend on the data.
    """
    reduced, batch = pruned(KIND, case), images(dense(KIND))
    torch._dynamo.reset()
    compiled = torch.compile(reduced, backend="eager", fullgraph=True)
    expected = logits(reduced, batch)
    if case.method == "tram":  # the one method whose forward differs outside inference mode
        torch.testing.assert_close(logits(compiled, batch), expected, rtol=0, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(batch.clone()), expected, rtol=0, atol=1e-10)


def test_every_method_has_a_program():
    assert {case.method for case in EXPORTED} == set(methods.names())
