"""What the MLflow run of a study contains: parameters, versions, state and a note in Markdown.

Reads the study and calls no server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from vitpareto.search.study.certificates import order_note, why_not
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import OBJECTIVES, Objective, objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.verdict import verdict
from vitpareto.search.tracking.run_contents import MAX_PARAM_CHARS, RunSpec, fit_note


def study_run(
    folder: StudyFolder,
    results: Sequence[TrialResult],
    *,
    status: str,
    reason: str,
    note: str = "",
) -> RunSpec:
    """The run of the study, which is the parent of its trials' runs.

    Args:
        folder: the study.
        results: its results, with their certificates.
        status: MLflow's run state.
        reason: why the search ended; empty if it runs or was interrupted.
        note: description in Markdown. If empty, `study_note` writes it.
    """
    front = front_of(results, objectives_named(folder.objectives))
    if not note:
        note = study_note(folder, front, "" if status == "RUNNING" else _verdict(folder, results))
    tags = {
        "study": folder.name,
        "state": {"FINISHED": "finished", "RUNNING": "running"}.get(status, "stopped"),
        "reason": reason,
        "front": str(len(front)),
        "mlflow.note.content": fit_note(note),
        **_version_tags(results),
    }
    now = int(1e3 * time.time())
    return RunSpec(
        trial=None,
        name=folder.name,
        status=status,
        params=_params(folder),
        tags=tags,
        begin_ms=min((r.begun_ms for r in results), default=now),
        end_ms=max((r.ended_ms for r in results), default=now),
    )


def _params(folder: StudyFolder) -> dict[str, str]:
    """What the results of the study depend on."""
    params = {
        k: (v if isinstance(v, str) else json.dumps(v))[:MAX_PARAM_CHARS]
        for k, v in folder.identity.read().items()
        if v is not None and v != {}
    }
    job = folder.job()
    for key in ("model", "data"):
        if value := job.text(key):
            params.setdefault(key, value)
    return params


def _version_tags(results: Sequence[TrialResult]) -> dict[str, str]:
    known = (r.provenance.versions for r in results)
    versions = next((v for v in known if v is not None), {})
    return {f"version.{name}": str(version) for name, version in versions.items()}


def _verdict(folder: StudyFolder, results: Sequence[TrialResult]) -> str:
    found = verdict(results, folder.objectives)
    return "" if found is None else str(found)


def study_note(folder: StudyFolder, front: Sequence[TrialResult], verdict: str = "") -> str:
    """Markdown with the verdict, the front in the given order, and the commands to export from it.

    Args:
        folder: the study.
        front: members of the front.
        verdict: the verdict's sentence; empty while the search runs or if there is none.
    """
    name = folder.name
    remarks = [order_note(front), why_not(folder, front) if verdict else ""]
    summary = f"**{name}**: {len(front)} trials on the front"
    summary += " (filter runs by `tags.pareto = 'true'`)." if front else " so far."
    lines = [f"**{verdict}**", ""] if verdict else []
    lines += [summary, "", *_front_table(folder, front), ""]
    for remark in filter(None, remarks):
        lines += [f"{remark[0].upper()}{remark[1:]}.", ""]
    lines.append(
        f"Export: `vitpareto export {name} --knee --out bundle/`, or `--trial N`, "
        f"`--max-gmacs G`. `vitpareto sync {name}` rebuilds this page."
    )
    return "\n".join(lines)


def _front_table(folder: StudyFolder, front: Sequence[TrialResult]) -> list[str]:
    """A Markdown table. Only objectives, top1, gmacs and latency: the runs have the rest."""
    if not front:
        return []
    names = {*folder.objectives, "top1", "gmacs", "latency_ms"}
    columns = [
        o for o in OBJECTIVES.values() if o.name in names and any(o.name in r.values for r in front)
    ]
    certified = any(r.certified is not None for r in front)
    header = ["trial", *(f"{o.name} ({o.unit})" for o in columns)]
    header += ["held-out top1 (joint 95 % interval)"] if certified else []
    header.append("recipe")
    rows = [_front_cells(result, columns, certified) for result in front]
    return [
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def _front_cells(result: TrialResult, columns: Sequence[Objective], certified: bool) -> list[str]:
    cells = [str(result.trial)]
    cells += [f"{result.values[o.name]:.4g}" if o.name in result.values else "" for o in columns]
    if certified:
        held_out = result.certified
        cells.append(
            ""
            if held_out is None
            else f"{held_out.top1:.4g} ({held_out.low:.4g}–{held_out.high:.4g})"
        )
    cells.append(str(result.recipe).replace("|", "\\|"))
    return cells
