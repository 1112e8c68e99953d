"""`search` and `demo`: run a study on a Ray cluster and show what it finds."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpareto.search.commands.export import print_verification
from vitpareto.search.commands.hooks import Capacity, Clusters, Presenter
from vitpareto.search.commands.inputs import find_study
from vitpareto.search.commands.options import Address, Cache, Sets, Store, given, with_job_options
from vitpareto.search.commands.progress_display import ProgressDisplay, SearchProgress
from vitpareto.search.commands.terminal import log
from vitpareto.search.study.job_keys import KEYS

if TYPE_CHECKING:
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.job import SearchConfig
    from vitpareto.search.study.job_request import JobRequest
    from vitpareto.search.study.progress import ProgressHook, StudyProgress
    from vitpareto.search.study.results import TrialResult
    from vitpareto.search.tracking.page import StudyPage
    from vitpareto.search.trials.job_check import CheckedJob

#: enough for a front with a knee on the embedded model
DEMO_TRIALS = 60


def add_to(app: typer.Typer, clusters: Clusters, presenter: Presenter) -> None:
    runner = SearchRunner(clusters, presenter)

    @app.command("search")
    @with_job_options(*KEYS)
    def search_command(
        job: Annotated[
            Path | None, typer.Argument(help="Job file (YAML); options override it")
        ] = None,
        set_: Sets = None,
        address: Address = None,
        packed: Annotated[bool, typer.Option("--packed", hidden=True)] = False,
        **options: Any,
    ) -> None:
        """Search the front of accuracy and cost of a model, or continue a search.

        \b
        vitpareto search --model deit_small_patch16_224 --data /imagenet/val --name deit-s
        vitpareto search job.yaml --set trials=400 --set space.topk.keep_rate=[0.5,0.9]
        vitpareto search --name deit-s --trials 400
        """
        from vitpareto.search.study.job_files import read_job

        package = job.parent if packed and job is not None else None
        runner.run(read_job(job, set_ or [], options), address, package)

    @app.command("demo")
    def demo_command(
        store: Store = None,
        cache: Cache = None,
        trials: Annotated[
            int, typer.Option(help="Trials in total, including the dense model")
        ] = DEMO_TRIALS,
    ) -> None:
        """Search on the embedded model and images, and export the knee of the front (the most
        accurate trial where the front has no knee) as a verified bundle.

        \b
        vitpareto demo
        """
        from vitpareto.search.study.job_request import JobRequest

        job = {"name": "demo", "trials": trials, "store": store, "cache": cache,
               "latency_batch": 32, "tracking_uri": "store",
               # the digits fill whole patches, which a smaller input does not keep
               "fixed": {"structure": "none"}}  # fmt: skip
        runner.run(JobRequest(given(job)))
        _export_demo(find_study(store, "demo"), store, cache)


class SearchRunner:
    """Runs studies on `clusters` and shows them with `presenter`."""

    def __init__(self, clusters: Clusters, presenter: Presenter) -> None:
        self._clusters, self._presenter = clusters, presenter

    def run(
        self, given: JobRequest, address: str | None = None, package: Path | None = None
    ) -> None:
        """Run or continue the study of a job, and print its front.

        Args:
            given: keys of the job. An existing study keeps its values of all other keys.
            address: of the Ray cluster to join; None for a Ray on this machine.
            package: the folder of a submitted job, with the files that the job names.

        Raises:
            UserError: the job is wrong, or nothing was measured.
            typer.Exit: the search was interrupted (code 130).
        """
        from vitpareto.search.trials.job_check import check_job
        from vitpareto.search.trials.run_study import run_study

        config = self._config(given, package)
        begin = time.monotonic()
        log(f"study {config.name}: {config.model} on {config.data}, {config.until}")
        with contextlib.ExitStack() as stack:
            capacity: Capacity | None = None
            if address is not None:
                capacity = stack.enter_context(self._clusters.join(address))
                log(f"nodes: {'; '.join(map(str, capacity.nodes))}")
            display = stack.enter_context(ProgressDisplay())
            prepared = check_job(
                config,
                decode=display.counter("decoding images"),
                nodes=capacity.nodes if capacity else (),
            )
            _log_prepared(prepared)
            if capacity is None:  # errors in the job are reported before Ray starts
                capacity = stack.enter_context(self._clusters.local(config.workers))
            progress = SearchProgress(display)
            hooks, finish = _hooks(stack, prepared, capacity)
            stack.enter_context(_terminated_as_interrupted())
            outcome = run_study(
                prepared, cpus=capacity.cpus, gpus=capacity.gpus,
                hooks=[progress.on_result, *hooks], report=log,
            )  # fmt: skip
            folder, state = outcome.folder, outcome.progress
            display.close()
            page = self._presenter.page(folder, config.cache)
            _log_end(prepared, folder, state, progress, time.monotonic() - begin)
            self._presenter.show(folder, page)
            finish(page, state)
            folder.publish()
        if not state.ended:
            raise typer.Exit(130)  # interrupted: scripts can tell

    def _config(self, given: JobRequest, package: Path | None) -> SearchConfig:
        from vitpareto.search.study.folder import StudyFolder

        config = given.config()
        folder = StudyFolder.open(config.store, config.name)
        if package is not None:
            given = self._clusters.store_inputs(given, package, folder.folder)
            config = given.config()
        if folder.exists:
            # keys that are not given stay as the study was started
            config = folder.job().without("store", "cache").updated(given).config()
        return config


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which batch systems end a job, stops like Ctrl-C; Ray would abort."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hooks(
    stack: contextlib.ExitStack, prepared: CheckedJob, capacity: Capacity
) -> tuple[list[ProgressHook], Callable[[StudyPage, StudyProgress], None]]:
    """Hooks for MLflow and for Ray's metrics, and a function that sends the study to MLflow."""
    from vitpareto.search.tracking.tracker import Tracker
    from vitpareto.search.trials.ray_metrics import Metrics
    from vitpareto.search.trials.resources import TrialResources

    config = prepared.config
    hooks: list[ProgressHook] = []
    tracker: Tracker | None = None
    if config.tracking_uri != "none":
        tracker = Tracker(prepared.folder, config.tracking_uri, notify=log)
        stack.enter_context(tracker)
        hooks.append(tracker.on_result)
    resources = TrialResources.of(
        config, prepared.device, capacity.cpus, capacity.gpus, capacity.nodes
    )
    pending = (lambda: tracker.pending) if tracker is not None else (lambda: 0)
    hooks.append(Metrics(config.name, resources.workers, pending).on_result)

    def finish(page: StudyPage, state: StudyProgress) -> None:
        if tracker is not None:
            tracker.finish(page, ended=state.ended)

    return hooks, finish


def _log_prepared(prepared: CheckedJob) -> None:
    log(
        f"images: {', '.join(f'{v} {k}' for k, v in prepared.data.sizes.items())}; "
        f"{len(prepared.data.classes)} classes; methods: {', '.join(prepared.space.methods)}"
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in prepared.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        log(f"left out: {', '.join(names)} ({reason})")


def _log_end(
    prepared: CheckedJob,
    folder: StudyFolder,
    state: StudyProgress,
    progress: SearchProgress,
    seconds: float,
) -> None:
    """Log how the search ended. Raises UserError if nothing was measured."""
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError
    from vitpareto.search.trials.preparations import preparation_summary

    for split in ("search", "calibration"):
        if corrupt := prepared.data.split(split).corrupt:
            shown = ", ".join(corrupt[:5]) + (" …" if len(corrupt) > 5 else "")
            log(f"left out of {split}: {len(corrupt)} unreadable images: {shown}")
    results = folder.measured()
    if not any(r.state == "finished" for r in results):
        reason = next((r.reason for r in results if r.reason), "no trial finished")
        raise UserError(
            f"study {folder.name} measured nothing: {reason}", Code.EMPTY, study=folder.name
        )
    log(
        f"{state.ended or 'interrupted; the same command continues'}; "
        f"{state.failed} failed, {state.duplicates} duplicate proposals, "
        f"{state.outside} outside the window; {seconds:.0f} s, "
        f"{progress.per_minute:.0f} trials per minute"
    )
    for line in preparation_summary(folder, results):
        log(line)


def _export_demo(folder: StudyFolder, store: str | None, cache: str | None) -> None:
    """Export the knee, or the most accurate trial, of the demo's study and verify it."""
    from vitpareto.search.export.bundle import export
    from vitpareto.search.export.verification import verify

    chosen, kind = _demo_choice(folder)
    where = f" --store {store}" if store else ""
    if kind != "knee":
        options = where + (f" --cache {cache}" if cache else "")
        more = max(DEMO_TRIALS, 2 * len(folder.measured()))
        typer.echo(
            f"the front has no knee; its most accurate trial is trial {chosen.trial}. More trials "
            f"may give one: vitpareto demo --trials {more}{options}"
        )
    # named after the trial: a bundle that exists is only verified again
    bundle = folder.folder / f"bundle-{chosen.trial:06d}"
    if not bundle.exists():
        log(f"trial {chosen.trial}, the {kind}: exporting it to {bundle}")
        export(folder, chosen, bundle, cache=cache)
    print_verification(verify(bundle))
    typer.echo(f"the {kind}, to deploy: {bundle}/README.md")
    typer.echo(f"the study in MLflow: vitpareto ui demo{where}")


def _demo_choice(folder: StudyFolder) -> tuple[TrialResult, str]:
    from vitpareto.search.export.trial_choice import knee_trial
    from vitpareto.search.study.front import front_of
    from vitpareto.search.study.objectives import objectives_named

    measured, objectives = folder.measured(), folder.objectives
    knee = knee_trial(measured, objectives)
    if knee is not None:
        return knee, "knee"
    front = front_of(measured, objectives_named(objectives))  # the cheapest first
    pruned = [r for r in front if not r.is_reference]
    return (pruned or front)[-1], "most accurate"
