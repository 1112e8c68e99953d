"""`vitpareto sync`: makes an MLflow server equal to a study."""

from __future__ import annotations

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.locks import LockTimeout
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.connection import connect
from vitpareto.search.tracking.database import store_uri
from vitpareto.search.tracking.outbox import clear_outbox
from vitpareto.search.tracking.page import StudyPage
from vitpareto.search.tracking.reconcile import SyncReport, reconcile
from vitpareto.search.tracking.server_address import error_text, shown_uri, tracking_uri
from vitpareto.search.tracking.state import TrackingState, sender_lock

#: seconds to wait for a search that has just stopped sending: its last request must time out first
LOCK_TIMEOUT_S = 15.0


def sync(folder: StudyFolder, uri: str | None = None, page: StudyPage | None = None) -> SyncReport:
    """Make a server equal to the study, from nothing if necessary. A second call changes nothing.

    Args:
        folder: the study.
        uri: as for `tracking_uri`.
        page: artifacts and table of the study's run; None leaves those on the server unchanged.

    Raises:
        UserError: the server does not answer, or a search is sending to MLflow (code BUSY).
    """
    server = tracking_uri(folder, uri)
    try:
        with sender_lock(folder, LOCK_TIMEOUT_S):
            # no process sends now, and none would end a run that was left RUNNING
            ended = "" if folder.lock.is_held else _why_ended(folder)
            report = reconcile(connect(folder, server), folder, ended=ended, page=page)
            clear_outbox(folder, shown_uri(server))
            return report
    except LockTimeout:
        raise UserError(
            f"study {folder.name!r} is being sent to MLflow by its search; wait until it ends",
            Code.BUSY,
            study=folder.name,
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise _unavailable(folder, server, error) from error


def _why_ended(folder: StudyFolder) -> str:
    """Why the last search ended; empty if it was interrupted."""
    state, trials = TrackingState.read(folder), folder.trials.count()
    if state.trials == trials:
        return state.ended
    # a later search was not tracked, and has stored no reason
    wanted = folder.job().budget
    return f"{trials} trials measured" if wanted and trials >= wanted else ""


def _unavailable(folder: StudyFolder, server: str, error: Exception) -> UserError:
    message = f"MLflow at {shown_uri(server)} failed: {error_text(error)}"
    if server == store_uri(folder.folder.parent):
        message += "; the file can be rebuilt from the studies: move it away and run sync again"
    return UserError(message, Code.UNAVAILABLE, server=shown_uri(server))
