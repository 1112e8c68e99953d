"""Token pictures of a study's front: drawn once, stored in the study's folder."""

from __future__ import annotations

import logging
from pathlib import Path

from vitpareto.dashboards.token_picture import patches_png
from vitpareto.methods import BadInput
from vitpareto.search.compare.show import trace_images
from vitpareto.search.compare.trace_request import TraceRequest
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult

#: images of a picture, and how many members of a front have a picture
IMAGES, MAX_PICTURES = 3, 24

log = logging.getLogger("vitpareto")


def token_pictures(folder: StudyFolder, cache: Path) -> dict[int, Path]:
    """PNG files by trial: which patches of the first search images the front's recipes keep.

    Of a large front, evenly spaced members have a picture. If the study's model or images are no
    longer available, a warning is logged and the existing pictures are returned.

    Args:
        folder: the study.
        cache: folder of decoded images.
    """
    drawn: dict[int, Path] = {}
    for member in _members(folder):
        path = folder.picture(member.trial)
        if not path.exists():
            try:
                request = TraceRequest.of_trial(folder, member.trial)
                trace = trace_images(request, images=IMAGES, cache=cache)
            except BadInput as error:
                log.warning("token pictures cannot be drawn: %s", error)
                return drawn
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, patches_png(trace))
        drawn[member.trial] = path
    return drawn


def _members(folder: StudyFolder) -> list[TrialResult]:
    front = front_of(folder.measured(), objectives_named(folder.objectives))
    members = [r for r in front if not r.is_reference]
    if len(members) <= MAX_PICTURES:
        return members
    step = (len(members) - 1) / (MAX_PICTURES - 1)
    return [members[round(i * step)] for i in range(MAX_PICTURES)]
