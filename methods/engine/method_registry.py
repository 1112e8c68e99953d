"""The registered methods by name.

`@register` above a method's class is all it takes: the search space, the command line, the tests
and the tables list what is registered.
"""

from __future__ import annotations

from typing import TypeVar

from vitpareto.methods.engine.bad_input import BadInput, Code, closest, nearest
from vitpareto.methods.engine.method import Method

_REGISTRY: dict[str, Method] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator that registers the method under its name."""
    assert method.name not in _REGISTRY, f"method {method.name!r} is registered twice"
    _REGISTRY[method.name] = method()
    return method


def names(kind: str | None = None) -> tuple[str, ...]:
    """Names of the registered methods, optionally of one kind: dense, other controls, the rest."""
    chosen = [m for m in _REGISTRY.values() if kind is None or m.kind == kind]
    chosen.sort(key=lambda m: (not m.is_reference, not m.control, m.name))
    return tuple(m.name for m in chosen)


def get(name: str) -> Method:
    """The method of that name. Raises BadInput, with the nearest name, if there is none."""
    if name not in _REGISTRY:
        raise BadInput(
            f"unknown method {name!r}{nearest(name, _REGISTRY)}",
            Code.UNKNOWN_NAME,
            name=name,
            accepted=list(names()),
            closest=closest(name, _REGISTRY),
        )
    return _REGISTRY[name]
