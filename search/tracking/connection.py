"""Opens the runs of a study on a server."""

from __future__ import annotations

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.database import artifact_folder, ensure_database, store_uri
from vitpareto.search.tracking.experiment import open_experiment
from vitpareto.search.tracking.state import TrackingState
from vitpareto.search.tracking.study_runs import StudyRuns

#: how the addresses of servers begin, which choose the location of artifacts themselves
_SERVERS = ("http://", "https://", "databricks")


def connect(folder: StudyFolder, uri: str) -> StudyRuns:
    """The study's runs on the server at `uri`, whose experiment is created if it does not exist.

    Raises:
        UserError: as `ensure_database`.
        Exception: whatever MLflow raises.
    """
    store, study_id = folder.folder.parent, TrackingState.read(folder).id
    own_database = uri == store_uri(store)
    if own_database:
        ensure_database(store)
    artifacts = None if uri.startswith(_SERVERS) else artifact_folder(store).as_uri()
    client = open_client(uri)
    experiment = open_experiment(client, folder.name, artifacts, own_database=own_database)
    return StudyRuns(client, experiment, study_id)
