"""The command `vitpareto`: wires the commands of search, dashboards and clusters.

Each package contributes its own commands; the root passes to those of `search` what the packages
above it contribute: where a search runs, and how its study is shown.
"""

from __future__ import annotations

import importlib.metadata
import sys
import traceback
from typing import Annotated

import typer

from vitpareto.clusters import commands as clusters
from vitpareto.dashboards import commands as dashboards
from vitpareto.dashboards.commands.presenter import StudyPresenter
from vitpareto.search import commands as search
from vitpareto.search.commands.terminal import log

#: exit codes: an error in the program, an error that the user can correct, an interruption
FAILED, REFUSED, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="vitpareto",
    help="Find which pruning method, at which setting, gives a Vision Transformer the best "
    "accuracy at every compute budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    """`main` reads --debug, which may stand anywhere on the line."""
    if version:
        typer.echo(importlib.metadata.version("vitpareto"))
        raise typer.Exit


search.add_to(app, clusters.RayClusters(), StudyPresenter())
dashboards.add_to(app)
clusters.add_to(app)


def main() -> None:
    """Run the command and exit; an error is one message, with --debug a traceback."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        log("interrupted; finished trials are kept, and the same command continues")
        code = INTERRUPTED
    except Exception as error:
        code = _reported(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _reported(error: Exception, debug: bool) -> int:
    """Print an error; the exit code that it has."""
    if debug:
        traceback.print_exception(error)
        return FAILED
    if isinstance(error, typer.TyperException) and hasattr(error, "show"):
        error.show()  # an unknown command or option
        return REFUSED
    from vitpareto.methods import BadInput

    if isinstance(error, (BadInput, PermissionError)):
        log(f"error: {error}")
        return REFUSED
    log(f"error: {type(error).__name__}: {error} (--debug shows the traceback)")
    return FAILED


if __name__ == "__main__":
    main()
