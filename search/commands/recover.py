"""`recover`: fine-tune the front's recipes on a Ray cluster, and show the recovered front."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from vitpareto.search.commands.hooks import Clusters, Presenter
from vitpareto.search.commands.inputs import find_study
from vitpareto.search.commands.options import Address, Cache, Store, job_option
from vitpareto.search.commands.progress_display import ProgressDisplay
from vitpareto.search.commands.terminal import log

if TYPE_CHECKING:
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.results import TrialResult


def add_to(app: typer.Typer, clusters: Clusters, presenter: Presenter) -> None:
    @app.command("recover")
    def recover_command(
        name: Annotated[str, typer.Argument(help="Name of the study")],
        epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning per trial")],
        trial: Annotated[
            list[int] | None,
            typer.Option(help="Number of a trial; may be repeated [the front's trials]"),
        ] = None,
        lr: Annotated[float | None, job_option("lr", "the job's")] = None,
        train_batch: Annotated[int | None, job_option("train_batch", "the job's")] = None,
        workers: Annotated[int | None, job_option("workers", "the job's")] = None,
        store: Store = None,
        cache: Cache = None,
        address: Address = None,
    ) -> None:
        """Fine-tune the front's recipes with the dense model as teacher: a second, recovered front.

        \b
        vitpareto recover deit-s --epochs 5
        vitpareto recover deit-s --epochs 5 --trial 12 --trial 40
        """
        from vitpareto.search.trials.recovery import Recovery

        folder = find_study(store, name)
        try:
            with contextlib.ExitStack() as stack:
                joined = stack.enter_context(clusters.join(address)) if address else None
                display = stack.enter_context(ProgressDisplay())
                recovery = Recovery.of(
                    folder, epochs=epochs, trials=trial or (), lr=lr, batch=train_batch,
                    workers=workers, cache=cache, decode=display.counter("decoding images"),
                    nodes=joined.nodes if joined else (),
                )  # fmt: skip
                log(f"{len(recovery.pending)} trials to recover")
                capacity = joined or stack.enter_context(clusters.local(workers))
                recovery.run(
                    cpus=capacity.cpus, gpus=capacity.gpus, on_result=_log_recovered, report=log
                )
        finally:  # also after an interruption: what was recovered until then
            if folder.recovery.results():
                _show(folder, presenter)


def _log_recovered(before: TrialResult, after: TrialResult) -> None:
    log(
        f"trial {after.trial} ({after.method}): top-1 {before.values['top1']:.2f} -> "
        f"{after.values['top1']:.2f} %, {after.seconds:.0f} s"
    )


def _show(folder: StudyFolder, presenter: Presenter) -> None:
    """Show both fronts and send them to MLflow."""
    from vitpareto.search.errors import UserError
    from vitpareto.search.tracking.sync import sync

    page = presenter.page(folder)
    presenter.show(folder, page)
    uri = folder.job().tracking_uri
    if uri != "none":
        try:
            sync(folder, uri, page)
        except UserError as error:  # the study is complete: `vitpareto sync` sends it later
            log(f"MLflow was not updated: {error}")
