"""The registered methods by name.

`@register` above a method's class is all it takes: the search space, the command line, the tests
and the tables list what is registered.
"""

from __future__ import annotations

import re
from typing import TypeVar

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method

#: what a recipe without a structural step is called in a job
NONE = "none"

_REGISTRY: dict[str, Method] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator that registers the method under its name.

    Raises BadInput for declarations that no search could follow (`_check_declarations`).
    """
    assert method.name not in _REGISTRY, f"method {method.name!r} is registered twice"
    _check_declarations(method)
    _REGISTRY[method.name] = method()
    return method


def _check_declarations(method: type[Method]) -> None:
    """Raises BadInput unless the declarations fit each other.

    A name is part of recipes, of options (`topk.keep_rate`), of lists (`topk,tome`) and of tables
    (`resize+tome`), so it has none of their separators.
    """

    def check(valid: bool, code: Code, rule: str, got: object) -> None:
        if not valid:
            message = f"method {method.name!r}: {rule} (got {got!r})"
            raise BadInput(message, code, method=method.name, got=got)

    name, training = method.name, method.training
    valid_name = re.fullmatch(r"[a-z][a-z0-9_-]*", name) and name != NONE
    check(bool(valid_name), Code.OUT_OF_RANGE,
          "its name must be lower-case letters, digits, - and _, and not none", name)  # fmt: skip
    check(training == "required" or not method.needs_preparation, Code.CONFLICT,
          "training must be required where needs_preparation is set", training)  # fmt: skip
    for attribute in ("reads_calibration", "reads_latency_table"):
        check(method.needs_preparation or not getattr(method, attribute), Code.CONFLICT,
              f"needs_preparation must be set where {attribute} is: its preparation reads it",
              method.needs_preparation)  # fmt: skip
    check(method.kind == "tokens" or training != "calibration", Code.CONFLICT,
          "training must not be calibration for a structural method", training)  # fmt: skip


def names(kind: str | None = None) -> tuple[str, ...]:
    """Names of the registered methods, optionally of one kind: dense, other controls, the rest."""
    chosen = [m for m in _REGISTRY.values() if kind is None or m.kind == kind]
    chosen.sort(key=lambda m: (not m.is_reference, not m.control, m.name))
    return tuple(m.name for m in chosen)


def get(name: str) -> Method:
    """The method of that name. Raises BadInput, with the nearest name, if there is none."""
    if name not in _REGISTRY:
        raise BadInput.unknown(
            f"unknown method {name!r}",
            name,
            _REGISTRY,
            name=name,
            accepted=list(names()),
        )
    return _REGISTRY[name]
