"""Outside `methods`, no code asks which method it has by name: what differs is declared by the
method. A new method would otherwise be treated as one of those that were thought of.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitpareto import methods

ROOT = Path(__file__).parent.parent
NAMES = frozenset(methods.names())
#: (file, name): literals outside a method's own file, with the reason
ELSEWHERE = {
    ("search/choices.py", "random"): "Optuna's random sampler",
    ("search/study/samplers.py", "random"): "Optuna's random sampler",
    ("search/training/checkpoints.py", "random"): "the state of the random generators",
    ("search/export/preprocessing.py", "resize"): "the step of the preprocessing",
    ("search/export/readme.py", "resize"): "the step of the preprocessing",
    ("search/export/bundle_result.py", "dense"): "a key of result.json: the dense model's figures",
    ("search/export/int8.py", "dense"): "a key: the dense model's figures",
    ("search/training/teachers.py", "dense"): "the dense model as teacher",
    ("dashboards/explorer_page.py", "dense"): "a key of the page's data: the dense model's colour",
    ("dashboards/front_artists.py", "dense"): "an element's id: the dense model's star",
    ("dashboards/token_rows.py", "dense"): "a key: the dense model's prediction",
    ("methods/engine/recipe.py", "dense"): "the empty recipe in one word",
    ("search/compare/matched_settings.py", "topk"): "the yardstick of published comparisons",
    ("search/models/checkpoint_layouts.py", "tnt"): "a published layout of checkpoints",
    ("search/models/checkpoint_layouts.py", "dynamicvit"): "a published layout of checkpoints",
    ("search/models/checkpoint_layouts.py", "nvit"): "a published layout of checkpoints",
}
#: words that are a method's name and mean something else: (file, word)
OTHER_MEANING = {("search/study/samplers.py", "random")}  # Optuna's random sampler


def literals(node: ast.AST) -> Iterator[str]:
    """The registered names among the literals of an operand: 'a', ('a', 'b'), {'a'}."""
    elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    for element in elements:
        if isinstance(element, ast.Constant) and element.value in NAMES:
            yield str(element.value)


def comparisons(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) wherever code compares, matches or selects by a registered method's name."""
    for node in ast.walk(ast.parse(source)):
        operands: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.BitOr)):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith", "get"):
                operands = list(node.args)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute) and owner.attr in (
                "methods",
                "parameters",
                "fixed",
            ):
                operands = [node.slice]
        for operand in operands:
            for name in literals(operand):
                yield node.lineno, name


@pytest.mark.parametrize("package", ["search", "clusters", "dashboards", "vitpareto"])
def test_no_method_is_told_apart_by_its_name(package: str) -> None:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for line, name in comparisons(path.read_text(encoding="utf-8")):
            if (where, name) not in OTHER_MEANING:
                found.append(f"{where}:{line}: {name!r}")
    assert not found, "\n".join(found)


def test_a_method_is_named_in_its_own_file_alone() -> None:
    """No list, table or default elsewhere, which a new method would have to be added to."""
    own = ("methods/token/", "methods/structure/", "methods/controls/")
    found = set()
    for package in ("methods", "search", "clusters", "dashboards", "vitpareto"):
        for path in (ROOT / package).rglob("*.py"):
            where = path.relative_to(ROOT).as_posix()
            if not where.startswith(own):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                found |= {(where, name) for node in ast.walk(tree) for name in literals(node)}
    assert found == ELSEWHERE.keys()


@pytest.mark.parametrize(
    "source",
    [
        'if step.method == "nvit": pass',
        'if "tnt" in space.methods: pass',
        'if name in ("tome", "tram"): pass',
        'chosen = names - {"dense"}',
        'match name:\n    case "resize": pass',
        'methods.get("topk").counts(params, shape)',
        'space.fixed["nvit"]',
    ],
)
def test_a_comparison_is_found(source: str) -> None:
    assert list(comparisons(source))


def test_other_words_are_left_alone() -> None:
    assert not list(comparisons('row = {"dense": 1}; kind == "soft"; say("resize")'))
