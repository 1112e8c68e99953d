"""The MLflow experiment of a study: found, restored or created, with its saved views."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitpareto.search.tracking.mlflow_internals import EXPERIMENT_TAGS, view_tags
from vitpareto.search.tracking.run_contents import experiment_name
from vitpareto.search.tracking.views import saved_views

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def open_experiment(
    client: MlflowClient, study: str, artifacts: str | None = None, *, own_database: bool = False
) -> str:
    """The id of a study's experiment, which is created if it does not exist.

    Args:
        client: a client of the server.
        study: name of the study.
        artifacts: address of the folder for a new experiment's artifacts; None lets the server
            choose.
        own_database: whether the server is the database of the study's own store. An experiment
            in it whose artifacts lie elsewhere was copied with the store: its runs would write to
            the original, so it is renamed and deleted (MLflow can restore it), and a new one is
            created.
    """
    name = experiment_name(study)
    found = client.get_experiment_by_name(name)
    if found is None:
        created: str = client.create_experiment(
            name, artifact_location=artifacts, tags=EXPERIMENT_TAGS
        )
        return created
    experiment = str(found.experiment_id)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(experiment)
    if not own_database or artifacts is None or found.artifact_location.startswith(artifacts):
        return experiment
    client.rename_experiment(experiment, f"{name} of {found.artifact_location} ({experiment})")
    client.delete_experiment(experiment)
    return open_experiment(client, study, artifacts, own_database=own_database)


def put_views(client: MlflowClient, experiment: str, objectives: Sequence[str]) -> None:
    """Add the saved views that the experiment does not have."""
    tags = client.get_experiment(experiment).tags
    missing = view_tags(saved_views(objectives), tags, int(1e3 * time.time()))
    for key, value in missing.items():
        client.set_experiment_tag(experiment, key, value)
