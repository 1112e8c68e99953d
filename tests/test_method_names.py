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
