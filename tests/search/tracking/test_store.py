"""A store's own MLflow database: one of an older MLflow is migrated, and nothing of it is lost."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path

import pytest

from vitpareto.search.errors import UserError
from vitpareto.search.tracking.client import (
    _revision,
    _revisions,
    ensure_database,
    open_client,
    store_uri,
)


def older(store: Path) -> str:
    """A database as an MLflow of some schemas ago made it, with an experiment in it."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from sqlalchemy import create_engine

    url = store_uri(store)
    then = "bd07f7e963c5"  # of MLflow 2
    config = _get_alembic_config(url)
    # as MLflow begins: its first tables, and every migration from there
    from mlflow.store.db.base_sql_model import Base  # noqa: F401
    from mlflow.store.tracking.dbmodels.initial_models import Base as Initial

    engine = create_engine(url)
    Initial.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, then)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as connection:
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "VALUES (7, 'of old', 'somewhere', 'active')"
        )
        connection.commit()
    return then


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::sqlalchemy.exc.SAWarning")
def test_an_older_database_is_migrated_and_kept_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    then = older(tmp_path)
    before = (tmp_path / "mlflow.db").read_bytes()
    with caplog.at_level(logging.WARNING, "vitpareto"):
        ensure_database(tmp_path)
    backup = tmp_path / f"mlflow.db.{then}.bak"
    assert "has been migrated" in caplog.text and backup.name in caplog.text
    assert _revision(backup) == then and len(backup.read_bytes()) == len(before)
    assert _revision(tmp_path / "mlflow.db") == _revisions()[0]
    assert [p.name for p in tmp_path.glob(".mlflow.db.*")] == []
    found = open_client(store_uri(tmp_path)).get_experiment_by_name("of old")
    assert found is not None and found.experiment_id == "7"
    caplog.clear()
    ensure_database(tmp_path)
    assert caplog.text == ""


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    ensure_database(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'fromthefuture'")
        connection.commit()
    with pytest.raises(UserError, match="written by a newer MLflow .*fromthefuture"):
        ensure_database(tmp_path)
    assert _revision(tmp_path / "mlflow.db") == "fromthefuture"
    assert not list(tmp_path.glob("*.bak"))
