"""`methods`: list the pruning methods with their parameters, presets and papers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpareto.search.commands.options import AsJson
from vitpareto.search.study.job_keys import KEYS

if TYPE_CHECKING:
    from vitpareto.methods import Method


def add_to(app: typer.Typer) -> None:
    app.command("methods")(methods_command)


def methods_command(
    name: Annotated[str | None, typer.Argument(help="Name of one method [all]")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods with their parameters, presets and papers.

    \b
    vitpareto methods
    vitpareto methods tome
    """
    from vitpareto import methods

    for method in (name,) if name else methods.names():
        found = methods.get(method)
        typer.echo(json.dumps(_record(found)) if as_json else _text(found))


def _record(method: Method) -> dict[str, Any]:
    from vitpareto.search.training.preparation_cache import epochs_key

    return {
        "name": method.name,
        "summary": method.summary,
        "kind": method.kind,
        "site": method.site,
        "training": method.training,
        "control": method.control,
        "paper": method.paper.title if method.paper else None,
        "url": method.paper.url if method.paper else None,
        "parameters": {p.name: p.accepts for p in method.parameters},
        "searched": {p.name: p.accepts for p in method.space},
        "searched_with": epochs_key(method.name),
        "presets": {p.name: p.choices for p in method.presets},
    }


def _text(method: Method) -> str:
    from vitpareto.search.training.preparation_cache import epochs_key

    kind = "control" if method.control else method.kind
    lines = [
        f"{method.name}: {method.summary} [{kind}, {method.site}, training: {method.training}]"
    ]
    if (paper := method.paper) is not None:
        lines.append(f"  paper       {paper.title}; {paper.authors} {paper.url}".rstrip())
    for label, declared in (("parameter", method.parameters), ("searched", method.space)):
        for p in declared:
            doc = f" ({p.doc})" if p.doc else ""
            lines.append(f"  {label:<11} {p.name}: {p.accepts_rounded}{doc}")
    if (key := epochs_key(method.name)) is not None:
        lines.append(f"  searched    only with {KEYS[key].option} of at least 1")
    for preset in method.presets:
        choices = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                            for k, v in preset.choices.items())  # fmt: skip
        lines.append(f"  preset      {preset.name}: {choices}")
    return "\n".join(lines)
