"""`export` and `verify`: write a trial as a bundle, and check a bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitpareto.search.commands.inputs import find_study
from vitpareto.search.commands.options import Cache, Store, TrackingUri
from vitpareto.search.commands.terminal import log

if TYPE_CHECKING:
    from vitpareto.search.export.bundle import ExtraPrograms
    from vitpareto.search.export.verification import Verification
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.results import TrialResult

Out = Annotated[
    str, typer.Option(help="Folder to write, or s3:// or gs:// address; must not exist")
]
MaxGmacs = Annotated[
    float | None, typer.Option(help="Best top-1 with at most this many GMACs per image")
]
MaxLatency = Annotated[
    float | None, typer.Option(help="Best top-1 with at most this latency in ms")
]
MinTop1 = Annotated[
    float | None, typer.Option(help="Cheapest trial certified to reach this top-1 in percent")
]
Knee = Annotated[bool, typer.Option("--knee", help="The knee of the front")]
Recovered = Annotated[
    bool, typer.Option("--recovered", help="Choose from the recovered trials (see recover)")
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Add an int8 program, compared with the dense int8 model")
]
Aoti = Annotated[
    bool, typer.Option("--aoti", help="Add an AOTInductor package (needs a C++ compiler)")
]
StaticBatch = Annotated[
    int | None, typer.Option(help="Add ONNX with this fixed batch size, for trtexec")
]
Register = Annotated[
    bool, typer.Option("--register", help="Register it in MLflow as vitpareto-NAME")
]
Alias = Annotated[
    list[str] | None,
    typer.Option(help="champion, knee or fastest; may be repeated [those that apply]"),
]


def add_to(app: typer.Typer) -> None:
    app.command("export")(export_command)
    app.command("verify")(verify_command)


@dataclass(frozen=True)
class Selection:
    """Which trial is exported: within a budget, above an accuracy, the knee, or by number."""

    max_gmacs: float | None = None
    max_latency_ms: float | None = None
    min_top1: float | None = None
    knee: bool = False
    trial: int | None = None
    recovered: bool = False


@dataclass(frozen=True)
class Registration:
    """Where in MLflow's registry a bundle is registered, and under which aliases."""

    aliases: Sequence[str]
    uri: str | None


def export_command(
    name: Annotated[str, typer.Argument(help="Name of the study")],
    out: Out,
    max_gmacs: MaxGmacs = None,
    max_latency_ms: MaxLatency = None,
    min_top1: MinTop1 = None,
    knee: Knee = False,
    trial: Annotated[int | None, typer.Option(help="Number of the trial")] = None,
    recovered: Recovered = False,
    int8: Int8 = False,
    aoti: Aoti = False,
    static_batch: StaticBatch = None,
    into_registry: Register = False,
    alias: Alias = None,
    tracking_uri: TrackingUri = None,
    store: Store = None,
    cache: Cache = None,
) -> None:
    """Write a trial as a verified bundle: ONNX, torch.export, recipe, weights.

    \b
    vitpareto export deit-s --knee --register --out bundle/
    vitpareto export deit-s --max-gmacs 3.2 --out bundle/
    vitpareto export deit-s --recovered --trial 12 --out bundle/
    """
    from vitpareto.search.export.bundle import ExtraPrograms

    folder = find_study(store, name)
    selection = Selection(max_gmacs, max_latency_ms, min_top1, knee, trial, recovered)
    result = _select(folder, selection)
    registration = _registration(folder, result, recovered, into_registry, alias, tracking_uri)
    if max_latency_ms is not None:
        _log_target(folder, result, max_latency_ms)
    log(f"trial {result.trial} ({result.method}): exporting and verifying")
    _check_static_batch(static_batch)
    extra = ExtraPrograms(int8, aoti, static_batch)
    _export(folder, result, out, extra, registration, recovered, cache)


def verify_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that export wrote")],
) -> None:
    """Check a bundle's hashes and compare its programs with the measured model.

    \b
    vitpareto verify bundle/
    """
    from vitpareto.search.export.verification import verify

    print_verification(verify(bundle))


def print_verification(found: Verification) -> None:
    """Print a verification. Exits with code 1 if the bundle differs from the measured model."""
    typer.echo(found.table())
    if not found.verified:
        raise typer.Exit(1)


def _select(folder: StudyFolder, selection: Selection) -> TrialResult:
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError
    from vitpareto.search.export.trial_choice import choose_trial
    from vitpareto.search.study.certificates import measured
    from vitpareto.search.study.objectives import objectives_named

    results = measured(folder, selection.recovered)
    if selection.recovered and not results:
        raise UserError(
            f"study {folder.name} has no recovered trial: run vitpareto recover {folder.name}",
            Code.EMPTY,
            study=folder.name,
            name="recovered",
        )
    if selection.min_top1 is not None and not any(r.certified is not None for r in results):
        kind = "no recovered trial" if selection.recovered else "no trial"
        log(
            f"note: {kind} of {folder.name} is certified on held-out images; --min-top1 uses the "
            "search images, whose accuracy is optimistic for the trials that were chosen on them"
        )
    return choose_trial(
        results,
        objectives_named(folder.objectives),
        max_gmacs=selection.max_gmacs,
        max_latency_ms=selection.max_latency_ms,
        min_top1=selection.min_top1,
        knee=selection.knee,
        trial=selection.trial,
    )


def _registration(
    folder: StudyFolder, result: TrialResult, recovered: bool, into_registry: bool,
    alias: Sequence[str] | None, uri: str | None,
) -> Registration | None:  # fmt: skip
    """Where to register the bundle, if anywhere. Raises UserError before the bundle is written."""
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError
    from vitpareto.search.tracking.registry import check_aliases

    if alias and not into_registry:
        raise UserError(
            "--alias requires --register: an alias names a registered version",
            Code.MISSING,
            option="--register",
        )
    check_aliases(folder, result, alias or (), recovered)
    if not into_registry:
        return None
    return Registration(alias or (), uri or folder.job().tracking_uri)


def _log_target(folder: StudyFolder, result: TrialResult, max_latency_ms: float) -> None:
    """Log the target for which the latency holds."""
    timed = result.latency or folder.latencies.read().get(result.trial)
    if timed is not None:
        log(f"within {max_latency_ms:g} ms on the measured target: {timed.target}")


def _check_static_batch(static_batch: int | None) -> None:
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    if static_batch is not None and static_batch < 1:
        raise UserError(
            f"--static-batch must be at least 1 (got {static_batch})",
            Code.OUT_OF_RANGE,
            option="--static-batch",
            got=static_batch,
        )


def _export(
    folder: StudyFolder, result: TrialResult, out: str, extra: ExtraPrograms,
    registration: Registration | None, recovered: bool, cache: str | None,
) -> None:  # fmt: skip
    """Write the bundle to a folder or to object storage, and register it."""
    from vitpareto.search.export.bundle import export
    from vitpareto.search.files.filesystems import check_empty, is_remote, upload_folder

    with contextlib.ExitStack() as stack:
        bundle = Path(out)
        if is_remote(out):
            check_empty(out)
            bundle = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bundle"
        export(
            folder,
            result,
            bundle,
            cache=cache,
            extra=extra,
            log=typer.echo,
        )
        if is_remote(out):
            upload_folder(bundle, out)
        typer.echo(out)
        if registration is not None:
            _register(folder, result, bundle, registration, recovered)


def _register(
    folder: StudyFolder, result: TrialResult, bundle: Path, registration: Registration,
    recovered: bool,
) -> None:  # fmt: skip
    from vitpareto.search.tracking.registry import register

    version = register(
        folder, result, bundle, aliases=registration.aliases, recovered=recovered,
        uri=registration.uri,
    )  # fmt: skip
    names = ", ".join(version.aliases) or "no alias"
    typer.echo(f"registered: {version.name} version {version.version} ({names}) at {version.uri}")
    typer.echo(
        f"serve: MLFLOW_TRACKING_URI={version.uri} mlflow models serve -m {version.address} "
        "--env-manager local"
    )
