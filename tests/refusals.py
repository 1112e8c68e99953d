"""Assert that input is refused: by the error's code and attributes, not by its wording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from vitpareto.methods import BadInput
from vitpareto.methods.engine.bad_input import Code


@contextlib.contextmanager
def refused(
    code: Code | str, kind: type[BadInput] = BadInput, **details: Any
) -> Iterator[pytest.ExceptionInfo[BadInput]]:
    """The block raises `kind` with this code; each of `details` is in the error's, and equal."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert error.code == Code(code), f"{error.code}: {error}"
    wrong = {k: error.details.get(k) for k, v in details.items() if error.details.get(k) != v}
    assert not wrong, f"expected {details}, got {error.details}: {error}"
    assert str(error).strip(), "an error needs a message"
