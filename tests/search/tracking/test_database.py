"""The MLflow database of a store: created once as a whole, migrated without loss."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.logs import logged
from tests.refusals import refused
from vitpareto.search.errors import Code, UserError
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.database import ensure_database, schema_revision, store_uri
from vitpareto.search.tracking.mlflow_internals import schema_revisions


def write_old_database(store: Path) -> str:
    """A database with the schema of MLflow 2 and one experiment; returns its revision."""
    from alembic import command
    from mlflow.store.db.base_sql_model import Base  # noqa: F401
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base as Initial
    from sqlalchemy import create_engine

    url, revision = store_uri(store), "bd07f7e963c5"
    config = _get_alembic_config(url)
    # the first tables of MLflow, then every migration up to the revision
    engine = create_engine(url)
    Initial.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as connection:
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "VALUES (7, 'old', 'somewhere', 'active')"
        )
        connection.commit()
    return revision


@pytest.mark.slow
def test_two_processes_create_one_database(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.left").write_bytes(b"left by a killed process")
    program = (
        "import pathlib, sys, warnings; warnings.simplefilter('ignore');"
        "from vitpareto.search.tracking.client import open_client;"
        "from vitpareto.search.tracking.database import ensure_database, store_uri;"
        "store = pathlib.Path(sys.argv[1]); ensure_database(store);"
        "print(len(open_client(store_uri(store)).search_experiments()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out) == (0, "1\n"), err
    assert not list(tmp_path.glob(".mlflow.db*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::sqlalchemy.exc.SAWarning")
def test_an_older_database_is_migrated_and_backed_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    revision = write_old_database(tmp_path)
    before = (tmp_path / "mlflow.db").read_bytes()
    ensure_database(tmp_path)
    backup = tmp_path / f"mlflow.db.{revision}.bak"
    (warning,) = logged(caplog, "database")
    assert warning.args == ("mlflow.db", backup.name)
    assert schema_revision(backup) == revision and len(backup.read_bytes()) == len(before)
    assert schema_revision(tmp_path / "mlflow.db") == schema_revisions()[0]
    assert [p.name for p in tmp_path.glob(".mlflow.db.*")] == []
    found = open_client(store_uri(tmp_path)).get_experiment_by_name("old")
    assert found is not None and found.experiment_id == "7"
    caplog.clear()
    ensure_database(tmp_path)
    assert logged(caplog, "database") == []


def test_a_newer_database_is_refused_and_not_changed(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'fromthefuture'")
        connection.commit()
    with refused(Code.UNSUPPORTED, UserError, revision="fromthefuture"):
        ensure_database(store)
    assert schema_revision(store / "mlflow.db") == "fromthefuture"
    assert not list(store.glob("*.bak"))
