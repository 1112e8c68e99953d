"""Check the address of a database for Optuna's trials, without Optuna."""

from __future__ import annotations

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError


def check_url(url: str) -> None:
    """Raise UserError for an address that is not valid or contains a password."""
    # imported here: it takes 0.2 s, and few jobs name a database
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        read = make_url(url)
    except ArgumentError:
        raise UserError(
            "job.storage must be the address of a database, for example "
            f"postgresql+psycopg://USER@HOST:5432/DATABASE (got {url!r})",
            Code.WRONG_TYPE,
            key="storage",
            got=url,
        ) from None
    if read.password is not None:
        raise UserError(
            "job.storage must not contain a password, because job.yaml stores it (got "
            f"{read.render_as_string(hide_password=True)!r}): set PGPASSFILE or PGPASSWORD",
            Code.SECRET,
            key="storage",
        )
