"""The command `vitpareto`: a thin composition root above methods, search, clusters and dashboards.

Parses, calls, prints. Anything worth testing without a terminal lives in the packages. They are
imported inside the commands, so that `vitpareto --help` does not wait for torch and Ray.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitpareto.clusters.jobs import Head
    from vitpareto.methods import Recipe
    from vitpareto.search.export.verification import Verification
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.front_table import FrontRow
    from vitpareto.search.study.results import TrialResult
    from vitpareto.search.tracking.page import StudyPage
    from vitpareto.search.trials.run import Prepared
    from vitpareto.search.trials.searcher import Tally

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

#: enough for a front with a knee on the embedded model
DEMO_TRIALS = 60

Store = Annotated[str | None, typer.Option(help="Folder of studies [./studies or VITPARETO_STORE]")]
Cache = Annotated[str | None, typer.Option(help="Decoded images [the user's cache folder]")]
Model = Annotated[
    str | None, typer.Option(help="timm name, hf-hub:…, local-dir:…, or digits [digits]")
]
DataOption = Annotated[
    str | None,
    typer.Option(help="Image folder; cifar10, fashionmnist, imagenette [:DIR]; digits [digits]"),
]
Weights = Annotated[str | None, typer.Option(help="Weights for the model: .safetensors or .pth")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [float32]")]
Batch = Annotated[int | None, typer.Option(help="Images per forward [64]")]
Images = Annotated[int | None, typer.Option(help="Use only so many of the search images")]
Seed = Annotated[int | None, typer.Option(help="Of splits, order and sampler [0]")]
LatencyBatch = Annotated[int | None, typer.Option(help="Batch at which latency is timed [1]")]
LatencyRuntime = Annotated[
    str | None, typer.Option(help="eager, compiled, cudagraph or onnxruntime [eager]")
]
Trained = Annotated[
    Path | None, typer.Option(help="The weights that the recipe names: .safetensors or .pth")
]

Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a Ray head, or auto on its nodes [a Ray of this machine]"),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow server; store: SQLite there; none [MLFLOW_TRACKING_URI, or store]"),
]


@app.callback(invoke_without_command=True)
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    """Read by `main`, which takes --debug anywhere on the line."""
    if version:
        typer.echo(importlib.metadata.version("vitpareto"))
        raise typer.Exit


@app.command("search")
def search_command(
    job: Annotated[Path | None, typer.Argument(help="Job file (YAML); options override it")] = None,
    name: Annotated[str | None, typer.Option(help="An existing study is continued")] = None,
    model: Model = None,
    data: DataOption = None,
    weights: Weights = None,
    trials: Annotated[int | None, typer.Option(help="Trials in all, dense included [100]")] = None,
    time: Annotated[str | None, typer.Option(help="90s, 30m, 2h: begin nothing after it")] = None,
    patience: Annotated[
        int | None, typer.Option(help="End when so many trials brought the front nothing")
    ] = None,
    race: Annotated[
        str | None, typer.Option(help="off: measure every trial on all images [on]")
    ] = None,
    race_error: Annotated[
        float | None, typer.Option(help="Chance, a study, that racing loses of the front [0.05]")
    ] = None,
    certify: Annotated[
        str | None, typer.Option(help="front: measure it on held-out images; off [front]")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="rajni,tome,… [all but those that lack epochs of training]")
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(help="top1,gmacs[,params_m|latency_ms|peak_mb] [top1,gmacs]")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, nsga2 or random [tpe]")] = None,
    seed: Seed = None,
    workers: Annotated[int | None, typer.Option(help="Trials at a time [as fit]")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch: Batch = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="0.25: four share a GPU [1]")] = None,
    images: Images = None,
    min_gmacs: Annotated[float | None, typer.Option(help="Budget window, GMACs an image")] = None,
    max_gmacs: Annotated[float | None, typer.Option(help="Budget window, GMACs an image")] = None,
    latency: Annotated[str | None, typer.Option(help="front: time the front; off [front]")] = None,
    latency_batch: LatencyBatch = None,
    latency_runtime: LatencyRuntime = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Limit of each trial, at that batch in that runtime")
    ] = None,
    train_epochs: Annotated[
        int | None, typer.Option(help="Of each trial whose method is trained [0: left out]")
    ] = None,
    prepare_epochs: Annotated[
        int | None, typer.Option(help="Of TNT's and NViT's training, once a study [0: left out]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Of all training [1e-4]")] = None,
    train_batch: Annotated[int | None, typer.Option(help="Images a training step [128]")] = None,
    profile: Annotated[
        str | None, typer.Option(help="NViT's targets in time: a table of `vitpareto profile`")
    ] = None,
    snap: Annotated[
        str | None, typer.Option(help="steps: as many tokens as cost the same in --profile [off]")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for any job key, e.g. trials=400")
    ] = None,
    tracking_uri: TrackingUri = None,
    storage: Annotated[
        str | None, typer.Option(help="Database for Optuna's trials [the study's folder]")
    ] = None,
    latency_on: Annotated[
        str | None, typer.Option(help="accelerator:H200, or a node's resource [where trials run]")
    ] = None,
    store: Store = None,
    cache: Cache = None,
    address: Address = None,
    packed: Annotated[bool, typer.Option("--packed", hidden=True)] = False,
) -> None:
    """Search the accuracy-vs-cost front of a model, or continue a search.

    \b
    vitpareto search --model deit_small_patch16_224 --data /imagenet/val --trials 200 --name deit-s
    vitpareto search job.yaml --set trials=400 --set space.topk.keep_rate=[0.5,0.9]
    vitpareto search --name deit-s --trials 400
    """
    options = {k: v for k, v in locals().items() if v is not None}
    for apart in ("job", "set_", "address", "packed"):
        options.pop(apart, None)
    _search(job, set_ or [], options, address, packed)


@app.command("demo")
def demo_command(
    store: Store = None,
    cache: Cache = None,
    trials: Annotated[int, typer.Option(help="Trials in all, dense included")] = DEMO_TRIALS,
) -> None:
    """A real search on the embedded model and images: the front, and its knee as a verified bundle
    (where it has none, its most accurate trial).

    \b
    vitpareto demo
    """
    from vitpareto.search.export.bundle import export, knee_trial
    from vitpareto.search.export.verification import verify
    from vitpareto.search.study.front import front_of
    from vitpareto.search.study.objectives import objectives_named

    given = {"name": "demo", "trials": trials, "store": store, "cache": cache, "latency_batch": 32,
             # its digits stand on whole patches, which no smaller input keeps
             "fixed": {"structure": "none"}, "tracking_uri": "store"}  # fmt: skip
    _search(None, [], {k: v for k, v in given.items() if v is not None})
    folder = _find(store, "demo")
    measured, objectives = folder.measured(), folder.job()["objectives"]
    chosen, what = knee_trial(measured, objectives), "the knee"
    where = f" --store {store}" if store else ""
    if chosen is None:
        front = front_of(measured, objectives_named(objectives))  # the cheapest first
        pruned = [r for r in front if not r.is_reference]
        chosen, what = (pruned or front)[-1], "the most accurate"
        kept = where + (f" --cache {cache}" if cache else "")
        typer.echo(
            f"the front has no knee yet; its most accurate is trial {chosen.trial}. More trials "
            f"may give one: vitpareto demo --trials {max(DEMO_TRIALS, 2 * len(measured))}{kept}"
        )
    # named after its trial: a later one is another bundle, and this one is only verified again
    bundle = folder.folder / f"bundle-{chosen.trial:06d}"
    if not bundle.exists():
        _say(f"trial {chosen.trial}, {what}: exporting it to {bundle}")
        export(folder, chosen, bundle, cache=cache)
    _verified(verify(bundle))
    typer.echo(f"{what}, to deploy: {bundle}/README.md")
    typer.echo(f"the study in MLflow: vitpareto ui demo{where}")


def _search(
    job: Path | None,
    sets: list[str],
    options: dict[str, Any],
    address: str | None = None,
    packed: bool = False,
) -> None:
    """packed: the job was submitted, and its files lie beside it (`clusters.jobs.pack`)."""
    from vitpareto.clusters.connect import joined_cluster, local_cluster
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.job import SearchConfig
    from vitpareto.search.study.job_files import read_job
    from vitpareto.search.tracking.tracker import Tracker
    from vitpareto.search.trials import run
    from vitpareto.search.trials.ray_metrics import Metrics
    from vitpareto.search.trials.tune import TrialResources

    given = read_job(job, sets, options)
    config = SearchConfig.of(given)
    folder = StudyFolder.open(config.store, config.name)
    if packed and job is not None:
        from vitpareto.clusters.jobs import settle

        given = settle(given, job.parent, folder.folder)
        config = SearchConfig.of(given)
    if folder.exists:
        # what is not asked for anew stays as the study was started
        before = {k: v for k, v in folder.job().items() if k not in ("store", "cache")}
        config = SearchConfig.of({**before, **given})
    begin = time.monotonic()
    _say(f"study {config.name}: {config.model} on {config.data}, {config.until}")
    with contextlib.ExitStack() as stack:
        room = None
        if address is not None:
            room = stack.enter_context(joined_cluster(address))
            _say(f"nodes: {'; '.join(map(str, room.nodes))}")
        prepared = run.prepare(config, decode=_decoding, nodes=room.nodes if room else ())
        _say(
            f"images: {', '.join(f'{v} {k}' for k, v in prepared.data.sizes.items())}; "
            f"{len(prepared.data.classes)} classes; methods: {', '.join(prepared.space.methods)}"
        )
        for why, names in _by_reason(prepared.left_out).items():
            _say(f"left out: {', '.join(names)} ({why})")
        if room is None:  # what is wrong with the job is said before a Ray is started
            room = stack.enter_context(local_cluster(config.workers))
        progress = Progress()
        hooks: list[run.Hook] = [progress.hear]
        tracker = None
        if config.tracking_uri != "none":
            tracker = stack.enter_context(Tracker(folder, config.tracking_uri, notify=_say))
            hooks.append(tracker.on_result)
        crew = TrialResources.of(config, prepared.device, room.cpus, room.gpus, room.nodes)
        owed = (lambda: tracker.pending) if tracker is not None else (lambda: 0)
        hooks.append(Metrics(config.name, crew.workers, owed).hear)
        # like Ctrl-C, as a batch system ends a job: Ray's own answer is to abort
        handler = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        stack.callback(signal.signal, signal.SIGTERM, handler)
        folder, tally = run.search(prepared, cpus=room.cpus, gpus=room.gpus, hooks=hooks, say=_say)
        progress.close()
        seconds = time.monotonic() - begin
        page = _page(folder, config.cache)
        _print_end(prepared, folder, page, tally, progress, seconds)
        if tracker is not None:
            tracker.finish(page, ended=tally.ended)
        folder.publish()
    if not tally.ended:
        raise typer.Exit(130)  # interrupted: a script must be able to tell


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """The methods left out, together where they are for one reason."""
    out: dict[str, list[str]] = {}
    for name, why in left_out.items():
        out.setdefault(why, []).append(name)
    return out


def _print_end(
    prepared: Prepared,
    folder: StudyFolder,
    page: StudyPage,
    tally: Tally,
    progress: Progress,
    seconds: float,
) -> None:
    """What came of a search; SearchFailed where nothing did."""
    from vitpareto.search.trials.preparations import preparation_summary

    for split in ("search", "calibration"):
        if corrupt := prepared.data.split(split).corrupt:
            shown = ", ".join(corrupt[:5]) + (" …" if len(corrupt) > 5 else "")
            _say(f"left out of {split}: {len(corrupt)} unreadable images: {shown}")
    results = folder.measured()
    if not any(r.state == "finished" for r in results):
        reason = next((r.reason for r in results if r.reason), "no trial finished")
        raise SearchFailed(f"study {folder.name} measured nothing: {reason}")
    _say(
        f"{tally.ended or 'stopped before the end; the same command continues'}; "
        f"{tally.failed} failed, {tally.duplicates} proposals already known, "
        f"{tally.outside} outside the window; {seconds:.0f} s, "
        f"{60 * progress.heard / max(progress.seconds, 1e-9):.0f} trials per minute"
    )
    for line in preparation_summary(folder, results):
        _say(line)
    _say_drawn(page)
    _print_fronts(folder, page.table)


def _say_drawn(page: StudyPage) -> None:
    for name, path in page.artifacts.items():
        if "/" not in name:
            _say(f"{'explorer' if path.suffix == '.html' else 'plot'}: {path}")


def _page(folder: StudyFolder, cache: str | None = None) -> StudyPage:
    """What MLflow shows of a study beside its runs: explorer, pictures and the front's table."""
    from vitpareto.search.study.front_table import study_front_rows
    from vitpareto.search.tracking.page import StudyPage

    results = folder.measured()
    if not any(r.state == "finished" for r in results):
        return StudyPage({}, [])
    explorer, tokens = _explore(folder, folder.folder / "explorer.html", cache)
    return StudyPage(
        {explorer.name: explorer, **{path.name: path for path in _draw(folder)},
         **{f"tokens/{path.name}": path for path in tokens.values()}},
        study_front_rows(folder),
    )  # fmt: skip


def _explore(folder: StudyFolder, path: Path, cache: str | None) -> tuple[Path, Mapping[int, Path]]:
    """The explorer, written to `path`, and the token pictures that are in it."""
    from vitpareto.dashboards.explorer_page import token_pictures, write_explorer
    from vitpareto.search.files.cache import default_cache

    where = cache or folder.job().get("cache")
    tokens = token_pictures(folder, Path(where) if where else default_cache())
    return write_explorer([folder], path, {folder.name: tokens}), tokens


def _draw(folder: StudyFolder) -> list[Path]:
    """The end-of-study pictures, in the study's folder."""
    return [_draw_front(folder, folder.folder / f"front.{suffix}") for suffix in ("png", "svg")]


def _draw_front(folder: StudyFolder, path: Path) -> Path:
    from vitpareto.dashboards.plot import plot_front
    from vitpareto.search.study.certificates import measured

    return plot_front(
        measured(folder),
        objectives=tuple(folder.job()["objectives"][:2]),
        title=_title(folder),
        path=path,
        recovered=measured(folder, recovered=True),
    )


def _title(folder: StudyFolder) -> str:
    job = folder.job()
    return f"{folder.name}: {job['model']} on {job['data']}"


def _print_fronts(
    folder: StudyFolder, rows: Sequence[FrontRow], max_gmacs: float | None = None
) -> None:
    """The verdict, the front's tables, and the recovered one's."""
    typer.echo(_verdict(folder, max_gmacs))
    for recovered in (False, True):
        some = [r for r in rows if r.recovered == recovered]
        if some:
            _print_front(folder, some)


def _verdict(folder: StudyFolder, max_gmacs: float | None = None) -> str:
    from vitpareto.search.study.certificates import measured
    from vitpareto.search.study.verdict import verdict

    said = verdict(measured(folder), folder.job()["objectives"], max_gmacs)
    return "No pruned model has been measured in full yet" if said is None else str(said)


def _print_front(folder: StudyFolder, rows: Sequence[FrontRow]) -> None:
    from vitpareto.dashboards.tables import damage_table, front_table
    from vitpareto.search.study.certificates import measured, order_note, why_not
    from vitpareto.search.study.front import front_of
    from vitpareto.search.study.objectives import objectives_named

    notes, recovered = ["* knee"] if any(r.knee for r in rows) else [], rows[0].recovered
    if images := next((r.certified_images for r in rows if r.certified_images), None):
        notes.append(f"{images} held-out images; 95 %, all: holds for all certified trials at once")
    if target := next((r.latency_target for r in rows if r.latency_target), None):
        notes.append(f"ms: {target['device']}, {target['dtype']}, batch {target['batch']}")
    kind, recovery = "front", folder.recovery()
    if recovered and recovery is not None:
        kind = "recovered front"
        notes.append(f"epochs {recovery['epochs']}, {recovery['distill']} distillation")
    title = f"{kind} of {_title(folder)}" + (f" ({'; '.join(notes)})" if notes else "")
    console = _console()
    console.print(front_table(rows, title))
    if (splits := {r.flips_of for r in rows if r.flips_of}) == {"held-out"}:
        title = f"against the dense model, on {images} held-out images"
    else:
        title = f"against the dense model, on {' or '.join(sorted(splits))} images"
    if (damage := damage_table(rows, title)) is not None:
        console.print()
        console.print(damage)
    axes = objectives_named(folder.job()["objectives"])
    front = front_of(measured(folder, recovered), axes)
    for note in (order_note(front), "" if recovered else why_not(folder, front)):
        if note:
            typer.echo(note)


class SearchFailed(Exception):
    """The search ran and has nothing to show; told without a traceback."""


class Progress:
    """Lines on how a search stands: rewritten in place on a terminal, every 10 s in a log."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.seconds = 0.0  # from the first trial handed out to the last result
        self.first = 0.0
        self.last = 0.0
        self.heard = 0
        self.terminal = sys.stderr.isatty()

    def hear(self, result: TrialResult | None, tally: Tally) -> None:
        """A hook of the searcher: a result became durable, or a trial was handed out."""
        if self.begin is None:
            self.begin = time.monotonic()
        if result is not None:
            self.heard += 1
            self.seconds = time.monotonic() - self.begin
            self.first = self.first or self.seconds
        due = time.monotonic() - self.last >= (0.2 if self.terminal else 10)
        if due or (tally.ended and result is None):
            self.last = time.monotonic()
            self._line(self.text(tally))

    def text(self, tally: Tally) -> str:
        done = tally.done
        of = "" if tally.wanted is None else f"/{tally.wanted}"
        said = (
            f"{done}{of} done, {tally.raced_out} of them stopped early, {tally.running} running, "
            f"{tally.failed} failed; "
            f"front {len(tally.front)} trials, hypervolume {tally.hypervolume:.4g}"
        )
        if self.heard > 1 and tally.wanted is not None and done < tally.wanted:
            # from the second result on: the first waits for workers to start
            left = round((tally.wanted - done) * (self.seconds - self.first) / (self.heard - 1))
            said += f"; about {left // 60} min {left % 60} s left"
        return said

    def _line(self, text: str) -> None:
        if self.terminal:
            sys.stderr.write(f"\r\x1b[2K{text}")
        else:
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.terminal and self.last:
            sys.stderr.write("\n")


def _decoding(done: int, total: int) -> None:
    """Progress of decoding: the terminal's line, or every tenth in a log."""
    if sys.stderr.isatty():
        end = "" if done < total else "\n"
        sys.stderr.write(f"\r\x1b[2Kdecoding images: {done}/{total}{end}")
        sys.stderr.flush()
    elif done == total:
        _say(f"decoded {total} images")


@app.command("front")
def front_command(
    name: Annotated[str, typer.Argument(help="The study")],
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, one member a line")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it: FILE.png or FILE.svg")] = None,
    max_gmacs: Annotated[
        float | None,
        typer.Option(help="EarlyStopping the methods at this budget [the knee's cost]"),
    ] = None,
    store: Store = None,
) -> None:
    """What pruning gains, and the non-dominated trials of a study, cheapest first; the recovered
    ones too (see recover).

    \b
    vitpareto front deit-s
    vitpareto front deit-s --max-gmacs 3.2
    vitpareto front deit-s --csv > front.csv
    vitpareto front deit-s --plot front.svg
    """
    from vitpareto.dashboards.csv_json import csv_text, json_lines
    from vitpareto.search.errors import UserError
    from vitpareto.search.study.front_table import study_front_rows

    folder = _find(store, name)
    if max_gmacs is not None and not 0 < max_gmacs < math.inf:
        raise UserError(f"--max-gmacs is {max_gmacs}: accepted is a number above 0")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--plot is {str(plot)!r}: accepted is FILE.png or FILE.svg")
    rows = study_front_rows(folder)
    if plot is not None:
        _say(f"plot: {_draw_front(folder, plot)}")
    if not rows:
        _say(f"study {name} has no finished trial yet")
    elif as_csv or as_json:
        _say(_verdict(folder, max_gmacs))
        typer.echo(csv_text(rows) if as_csv else json_lines(rows), nl=False)
    else:
        _print_fronts(folder, rows, max_gmacs)


@app.command("report")
def report_command(
    name: Annotated[str, typer.Argument(help="The study")],
    out: Annotated[
        Path | None, typer.Option(help="FILE.html [the study's folder, explorer.html]")
    ] = None,
    store: Store = None,
    cache: Cache = None,
) -> None:
    """The study as one page to explore: front, trials, recipes side by side, what they keep of
    images. One HTML file that needs nothing else, offline.

    \b
    vitpareto report deit-s --out deit-s.html
    """
    from vitpareto.search.errors import UserError

    folder = _find(store, name)
    path = _page_path(out or folder.folder / "explorer.html")
    if not any(r.state == "finished" for r in folder.measured()):
        raise UserError(f"study {name} has no trial that was measured in full yet")
    typer.echo(_verdict(folder))
    typer.echo(f"explorer: {_explore(folder, path, cache)[0]}")


@app.command("compare")
def compare_command(
    names: Annotated[list[str], typer.Argument(help="Studies, two or more", metavar="STUDY…")],
    out: Annotated[Path, typer.Option(help="FILE.html")] = Path("compare.html"),
    store: Store = None,
) -> None:
    """Fronts of several studies, one over the other, on one page like report's.

    \b
    vitpareto compare deit-s deit-s-trained --out compare.html
    """
    from vitpareto.dashboards.explorer_page import write_explorer
    from vitpareto.dashboards.tables import studies_table
    from vitpareto.search.errors import UserError

    path, folders = _page_path(out), [_find(store, name) for name in dict.fromkeys(names)]
    if len(folders) < 2:
        raise UserError(f"{' '.join(names)}: accepted are two studies or more")
    for folder in folders:
        if not any(r.state == "finished" for r in folder.measured()):
            raise UserError(f"study {folder.name} has no trial that was measured in full yet")
    _console().print(studies_table(folders))
    typer.echo(f"explorer: {write_explorer(folders, path)}")


def _page_path(path: Path) -> Path:
    from vitpareto.search.errors import UserError

    if path.suffix.lower() != ".html":
        raise UserError(f"--out is {str(path)!r}: accepted is FILE.html")
    if not path.parent.is_dir():
        raise UserError(f"--out is {str(path)!r}: there is no folder {path.parent}")
    return path


@app.command("trials")
def trials_command(
    name: Annotated[str, typer.Argument(help="The study")],
    as_json: Annotated[bool, typer.Option("--json", help="One object a line")] = False,
    store: Store = None,
) -> None:
    """Every trial of a study: finished, raced_out, failed (with the reason) and running.

    \b
    vitpareto trials deit-s --json
    """
    from vitpareto.dashboards.csv_json import json_lines
    from vitpareto.dashboards.tables import trial_table
    from vitpareto.search.study.trial_table import trial_rows
    from vitpareto.search.trials.searcher import running_trials

    folder = _find(store, name)
    results = sorted([*folder.measured(), *running_trials(folder)], key=lambda r: r.trial)
    if as_json:
        typer.echo(json_lines(trial_rows(results)), nl=False)
    else:
        _console().print(trial_table(results, f"{len(results)} trials of {_title(folder)}"))


@app.command("measure")
def measure_command(
    recipe: Annotated[Path | None, typer.Option(help="Recipe file (YAML)")] = None,
    study: Annotated[str | None, typer.Option(help="Instead of --recipe: a study's trial")] = None,
    trial: Annotated[int | None, typer.Option(help="Its number, with --study")] = None,
    trained: Trained = None,
    model: Model = None,
    data: DataOption = None,
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
    batch: Batch = None,
    images: Images = None,
    seed: Seed = None,
    latency_batch: LatencyBatch = None,
    latency_runtime: LatencyRuntime = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object")] = False,
    store: Store = None,
    cache: Cache = None,
) -> None:
    """Measure one recipe, or a study's trial once more, beside the dense model, without a search.

    \b
    vitpareto measure --model deit_small_patch16_224 --data /imagenet/val --recipe recipe.yaml
    vitpareto measure --study deit-s --trial 12
    """
    from vitpareto.methods import Recipe
    from vitpareto.search.study.job import SearchConfig
    from vitpareto.search.trials import run

    given = {k: v for k, v in locals().items() if v is not None}
    keys = ("model", "data", "weights", "device", "dtype", "batch", "images", "seed",
            "latency_batch", "latency_runtime", "cache")  # fmt: skip
    asked, job, state = _measured(recipe, study, trial, trained, store)
    config = SearchConfig.of({**{k: v for k, v in job.items() if k in keys},
                              **{k: given[k] for k in keys if k in given}})  # fmt: skip
    result, dense, timed = run.measure(config, asked, decode=_decoding, trained=state)
    shown = {
        "recipe": result.resolved,
        **{k: round(v, 6) for k, v in result.values.items()},
        "top1_low": result.top1_low,
        "top1_high": result.top1_high,
        "images": result.images,
        "dense_top1": dense.values["top1"],
        "dense_gmacs": dense.values["gmacs"],
        "latency_ms": timed.p50_ms,
        "latency_p95_ms": timed.p95_ms,
        "dense_latency_ms": timed.dense_p50_ms,
        "speedup": timed.speedup,
        "speedup_low": timed.speedup_low,
        "speedup_high": timed.speedup_high,
        "latency_target": timed.target,
    }
    if as_json:
        typer.echo(json.dumps(shown))
        return
    v, d = result.values, dense.values
    target = ", ".join(f"{k} {t}" for k, t in timed.target.items())
    rows = (
        ("recipe", str(Recipe.from_dict(result.resolved))),
        ("top-1", f"{v['top1']:.2f} % ({result.top1_low:.2f}–{result.top1_high:.2f}, "
                  f"{result.images} images); dense {d['top1']:.2f} %"),
        ("top-5", f"{v['top5']:.2f} %; dense {d['top5']:.2f} %"),
        ("GMACs", f"{v['gmacs']:.4g} ({v['gmacs'] / d['gmacs']:.1%} of dense {d['gmacs']:.4g})"),
        ("parameters", f"{v['params_m']:.4g} M"),
        ("peak memory", f"{v['peak_mb']:.4g} MB at batch {config.batch}; "
                        f"dense {d['peak_mb']:.4g}"),
        ("latency", f"p50 {timed.p50_ms:.3g} ms, p95 {timed.p95_ms:.3g}; "
                    f"dense {timed.dense_p50_ms:.3g} ({target})"),
        ("speed-up", f"{timed.speedup:.2f} ({timed.speedup_low:.2f}–{timed.speedup_high:.2f})"),
    )  # fmt: skip
    for label, text in rows:
        typer.echo(f"{label:<12} {text}")


def _measured(
    recipe: Path | None, study: str | None, trial: int | None, trained: Path | None,
    store: str | None,
) -> tuple[Recipe, dict[str, Any], Mapping[str, Any] | None]:  # fmt: skip
    """What `measure` is to measure: the recipe, the job keys that go with it, and its weights."""
    from vitpareto.search.compare.show import Asked
    from vitpareto.search.errors import UserError

    if (recipe is None) == (study is None) or (study is None) != (trial is None):
        raise UserError(
            "what is to be measured? Give --recipe FILE, or --study NAME with --trial N"
        )
    if recipe is not None:
        return _recipe(recipe), {}, _trained(trained)
    assert study is not None and trial is not None
    if trained is not None:
        raise UserError("--trained goes with --recipe: a study has its trials' weights")
    folder = _find(store, study)
    asked = Asked.of_trial(folder, trial)
    return asked.recipe, {**folder.job(), "weights": str(folder.weights)}, asked.trained


def _trained(path: Path | None) -> Mapping[str, Any] | None:
    from vitpareto.search.models.weight_files import read_weights_file

    return None if path is None else read_weights_file(path).state


@app.command("show")
def show_command(
    files: Annotated[list[Path] | None, typer.Argument(help="More images", metavar="FILE")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe file (YAML)")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file, any number [the data's first]")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Instead of --recipe: a study's trial")] = None,
    trial: Annotated[int | None, typer.Option(help="Its number, with --study")] = None,
    trained: Trained = None,
    model: Model = None,
    weights: Weights = None,
    data: DataOption = None,
    images: Annotated[int | None, typer.Option(help="So many of the data's images [4]")] = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option(help="The picture to write: FILE.png")] = Path("show.png"),
    as_json: Annotated[bool, typer.Option("--json", help="One object an image")] = False,
    store: Store = None,
    cache: Cache = None,
) -> None:
    """Draw which patches a recipe keeps, merges or drops, stage by stage, image by image.

    \b
    vitpareto show --recipe recipe.yaml --model deit_small_patch16_224 --image cat.jpg dog.jpg
    vitpareto show --study deit-s --trial 12 --out patches.png
    """
    from vitpareto.dashboards.csv_json import json_lines
    from vitpareto.dashboards.patches import check_path, draw_patches, patch_rows, summary
    from vitpareto.search.compare.show import Asked, look
    from vitpareto.search.errors import UserError
    from vitpareto.search.files.cache import default_cache

    check_path(out)
    if (recipe is None) == (study is None) or (study is None) != (trial is None):
        raise UserError("what is to be shown? Give --recipe FILE, or --study NAME with --trial N")
    if recipe is not None:
        own = Path(weights) if weights else None
        asked = Asked(
            _recipe(recipe), model or "digits", own, data, seed or 0, trained=_trained(trained)
        )
    elif study is not None and trial is not None:
        if model or weights or data or trained or seed is not None:
            raise UserError(
                "--model, --weights, --data, --trained and --seed are the study's: leave them out"
            )
        asked = Asked.of_trial(_find(store, study), trial)
    seen = look(
        asked,
        [*(image or []), *(files or [])],
        images=images,
        cache=Path(cache) if cache else default_cache(),
        progress=_decoding,
    )
    for note in seen.notes:
        _say(f"note: {note}")
    _say(f"picture: {draw_patches(seen, out)}")
    if as_json:
        typer.echo(json_lines(patch_rows(seen)), nl=False)
        return
    for each in seen.images:
        typer.echo(summary(each))


@app.command("table")
def table_command(
    models: Annotated[str, typer.Option(help="timm names, or digits: a,b,…")] = "digits",
    methods: Annotated[str | None, typer.Option(help="tram,topk,… [all]")] = None,
    rates: Annotated[str, typer.Option(help="Fractions kept at each prune layer")] = "0.75,0.5",
    batch: Annotated[int, typer.Option(help="Images per forward")] = 64,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    rounds: Annotated[int, typer.Option(help="Of paired timing; 0: closed forms alone")] = 30,
    check: Annotated[bool, typer.Option("--check", help="Count with fvcore too")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, one row a line")] = False,
) -> None:
    """GMACs, parameters, FPS and memory of methods side by side, without data or weights.

    \b
    vitpareto table --models vit_small_patch16_224,vit_base_patch16_224 --methods tram,topk,tome
    vitpareto table --models deit_small_patch16_224 --rates 0.7 --rounds 0
    """
    from vitpareto import methods as registry
    from vitpareto.dashboards.comparisons import cost_notes, cost_records, cost_tables
    from vitpareto.dashboards.csv_json import csv_text, json_lines
    from vitpareto.search.compare.cost_table import Bench, cost_rows
    from vitpareto.search.trials.run import resolve_device

    bench = Bench(batch, resolve_device(device or "auto"), dtype, rounds, check, _say)
    chosen = registry.names() if methods is None else _words(methods)
    rows = list(cost_rows(_words(models), chosen, _numbers(rates, "--rates"), bench))
    if as_csv:
        typer.echo(csv_text(cost_records(rows)), nl=False)
    elif as_json:
        typer.echo(json_lines(cost_records(rows)), nl=False)
    else:
        _show([*cost_tables(rows)], cost_notes(rows))


@app.command("reproduce")
def reproduce_command(
    data: Annotated[str | None, typer.Option(help="ImageNet-1k's validation folder")] = None,
    models: Annotated[str | None, typer.Option(help="Rows of these: a,b,… [all]")] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(help="TIMM_TAG.safetensors or .pth here [timm downloads]")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    batch: Annotated[int, typer.Option(help="Images per forward")] = 64,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, one row a line")] = False,
    cache: Cache = None,
) -> None:
    """Published figures beside ours: GFLOPs always, untrained top-1 where data and weights are.

    \b
    vitpareto reproduce
    vitpareto reproduce --data /imagenet/val --models vit_small_patch16_224
    """
    from vitpareto.dashboards import comparisons
    from vitpareto.dashboards.csv_json import csv_text, json_lines
    from vitpareto.search.compare import published
    from vitpareto.search.compare.reproduction import Place, reproduce, select
    from vitpareto.search.files.cache import default_cache
    from vitpareto.search.trials.run import resolve_device

    rows = select(published.rows(), _words(models or ""))
    place = None
    if data is None:
        _say("top-1 is measured with --data FOLDER, ImageNet-1k's validation images")
    else:
        place = Place(
            data, Path(cache) if cache else default_cache(), weights_dir,
            resolve_device(device or "auto"), dtype, batch, _decoding, _seeing,
        )  # fmt: skip
    found = []
    for one in reproduce(rows, place):
        found.append(one)
        if one.accuracy is not None:  # at once: the rest may take hours
            _say(f"{one.row.timm_tag} {one.row.label}: {one.accuracy.top1:.3f} %")
    found.sort(key=lambda one: rows.index(one.row))
    if as_csv:
        typer.echo(csv_text(comparisons.figure_records(found)), nl=False)
    elif as_json:
        typer.echo(json_lines(comparisons.figure_records(found)), nl=False)
    else:
        tables = [comparisons.figures_table(found), comparisons.accuracy_table(found)]
        _show(tables, comparisons.figure_notes(found))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, option: str) -> list[float]:
    from vitpareto.search.errors import UserError

    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise UserError(f"{option} is {text!r}: accepted are numbers, as in 0.75,0.5") from None


def _show(tables: list[Any], notes: list[str]) -> None:
    console = _console()
    console.width = max(console.width, 160)  # a narrow terminal folds lines: no number is cut
    for table in tables:
        console.print(table)
        console.print()
    for note in notes:
        typer.echo(note)


def _seeing(what: str, done: int, total: int) -> None:
    """Progress of an evaluation, on a terminal."""
    if sys.stderr.isatty():
        end = "" if done < total else "\n"
        sys.stderr.write(f"\r\x1b[2K{what}: {done}/{total} images{end}")
        sys.stderr.flush()


@app.command("export")
def export_command(
    name: Annotated[str, typer.Argument(help="The study")],
    out: Annotated[str, typer.Option(help="Folder to write, or s3://…, gs://…; must not exist")],
    max_gmacs: Annotated[float | None, typer.Option(help="Best top-1 within it")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Best top-1 within it")] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Cheapest certified to reach it, %")
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The front's knee")] = False,
    trial: Annotated[int | None, typer.Option(help="This trial")] = None,
    recovered: Annotated[
        bool, typer.Option("--recovered", help="Of the recovered trials (see recover)")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="And in int8, measured beside the dense model in int8")
    ] = False,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="And as an AOTInductor package (needs a C++ compiler)")
    ] = False,
    static_batch: Annotated[
        int | None, typer.Option(help="And as ONNX of this batch alone, with trtexec's line")
    ] = None,
    into_registry: Annotated[
        bool, typer.Option("--register", help="And into MLflow's registry: vitpareto-NAME")
    ] = False,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="champion, knee or fastest, any number [those that it is]"),
    ] = None,
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
    from vitpareto.search.errors import UserError
    from vitpareto.search.export.bundle import choose_trial, export
    from vitpareto.search.files.filesystems import check_empty, is_remote, upload_folder
    from vitpareto.search.study.certificates import measured
    from vitpareto.search.study.objectives import objectives_named
    from vitpareto.search.tracking.registry import check_aliases, register

    folder = _find(store, name)
    results = measured(folder, recovered)
    if recovered and not results:
        raise UserError(f"study {name} has no recovered trial: vitpareto recover {name} makes them")
    if min_top1 is not None and not any(r.certified is not None for r in results):
        _say(
            f"note: {'no recovered trial' if recovered else 'no trial'} of {name} is certified on "
            "held-out images; --min-top1 looks at the search images, which flatter what they chose"
        )
    result = choose_trial(
        results,
        objectives_named(folder.job()["objectives"]),
        max_gmacs=max_gmacs,
        max_latency_ms=max_latency_ms,
        min_top1=min_top1,
        knee=knee,
        trial=trial,
    )
    if alias and not into_registry:
        raise UserError("--alias names a registered version: give --register too")
    check_aliases(folder, result, alias or (), recovered)
    if max_latency_ms is not None:
        timed = result.timed or folder.latencies().get(result.trial)
        if timed is not None:  # a latency holds for its target alone
            where = ", ".join(f"{k} {v}" for k, v in timed.target.items())
            _say(f"within {max_latency_ms:g} ms on the target that was measured: {where}")
    _say(f"trial {result.trial} ({result.method}): exporting and verifying")
    if static_batch is not None and static_batch < 1:
        raise UserError(f"--static-batch is {static_batch}: accepted is 1 or more")
    with contextlib.ExitStack() as stack:
        place = Path(out)
        if is_remote(out):
            check_empty(out)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bundle"
        export(
            folder, result, place, cache=cache, int8=int8, aoti=aoti, static=static_batch,
            say=typer.echo,
        )  # fmt: skip
        if is_remote(out):
            upload_folder(place, out)
        typer.echo(out)
        if not into_registry:
            return
        version = register(
            folder, result, place, aliases=alias or (), recovered=recovered,
            uri=tracking_uri or folder.job().get("tracking_uri"),
        )  # fmt: skip
        names = ", ".join(version.aliases) or "no alias"
        typer.echo(
            f"registered: {version.name} version {version.version} ({names}) at {version.uri}"
        )
        typer.echo(
            f"serve: MLFLOW_TRACKING_URI={version.uri} mlflow models serve -m {version.address} "
            "--env-manager local"
        )


@app.command("recover")
def recover_command(
    name: Annotated[str, typer.Argument(help="The study")],
    epochs: Annotated[int, typer.Option(help="Of fine-tuning, each")],
    trial: Annotated[
        list[int] | None, typer.Option(help="This trial, any number of times [the front's]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="[as the study's job, or 1e-4]")] = None,
    train_batch: Annotated[int | None, typer.Option(help="Images a step [128]")] = None,
    workers: Annotated[int | None, typer.Option(help="Trainings at a time [as fit]")] = None,
    store: Store = None,
    cache: Cache = None,
    address: Address = None,
) -> None:
    """Fine-tune the front's recipes, the dense model as their teacher: a second, recovered front.

    \b
    vitpareto recover deit-s --epochs 5
    vitpareto recover deit-s --epochs 5 --trial 12 --trial 40
    """
    from vitpareto.clusters.connect import joined_cluster, local_cluster
    from vitpareto.search.trials.recovery import Recovery

    folder = _find(store, name)

    def heard(before: TrialResult, after: TrialResult) -> None:
        _say(
            f"trial {after.trial} ({after.method}): top-1 {before.values['top1']:.2f} -> "
            f"{after.values['top1']:.2f} %, {after.seconds:.0f} s"
        )

    try:
        with contextlib.ExitStack() as stack:
            joined = stack.enter_context(joined_cluster(address)) if address else None
            recovery = Recovery.of(
                folder, epochs=epochs, trials=trial or (), lr=lr, batch=train_batch,
                workers=workers, cache=cache, decode=_decoding,
                nodes=joined.nodes if joined else (),
            )  # fmt: skip
            _say(f"{len(recovery.todo)} trials to recover")
            room = joined or stack.enter_context(local_cluster(workers))
            recovery.run(cpus=room.cpus, gpus=room.gpus, heard=heard, say=_say)
    finally:
        if folder.recovered():
            _tell_recovered(folder)


def _tell_recovered(folder: StudyFolder) -> None:
    """Both fronts on the terminal, the picture drawn anew, MLflow told."""
    from vitpareto.search.errors import UserError
    from vitpareto.search.tracking.sync import sync

    page = _page(folder)
    _say_drawn(page)
    _print_fronts(folder, page.table)
    uri = folder.job().get("tracking_uri")
    if uri != "none":
        try:
            sync(folder, uri, page)
        except UserError as error:  # the study has it all: `vitpareto sync` sends it later
            _say(f"MLflow was not told: {error}")


@app.command("profile")
def profile_command(
    out: Annotated[Path, typer.Option(help="The table to write: FILE.json")],
    model: Model = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    batch: Annotated[int, typer.Option(help="Images per forward, as --latency-batch")] = 1,
    points: Annotated[int, typer.Option(help="On each axis")] = 3,
    rounds: Annotated[int, typer.Option(help="Calls a point, of which the median counts")] = 20,
) -> None:
    """Measure a latency table of a model's blocks on this device, for NViT (search --profile).

    \b
    vitpareto profile --model deit_base_distilled_patch16_224 --device cuda --batch 256 --out h.json
    """
    from vitpareto.methods.engine.parameters import nearest
    from vitpareto.search.errors import UserError
    from vitpareto.search.measure.accuracy import DTYPES
    from vitpareto.search.measure.latency_table import measure_profile
    from vitpareto.search.models.loading import fresh_model
    from vitpareto.search.trials.run import resolve_device

    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}{nearest(dtype, DTYPES)}")
    if batch < 1:
        raise UserError(f"--batch is {batch}: accepted is 1 or more")
    name = model or "digits"
    table = measure_profile(
        fresh_model(name),
        name,
        batch=batch,
        device=resolve_device(device or "auto"),
        dtype=DTYPES[dtype],
        points=points,
        rounds=rounds,
        progress=_timing,
    )
    table.save(out)
    entries = sum(grid.ms.size for grid in (table.attention, table.mlp, table.rest))
    target = ", ".join(f"{k} {v}" for k, v in table.target.items())
    _say(f"{entries} latencies of {name} on {target}")
    typer.echo(str(out))


def _timing(done: int, total: int) -> None:
    """Progress of a profile, on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2Ktiming blocks: {done}/{total}" + ("" if done < total else "\n"))
        sys.stderr.flush()


@app.command("verify")
def verify_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that export wrote")],
) -> None:
    """Check a bundle's hashes and compare its programs with the measured model.

    \b
    vitpareto verify bundle/
    """
    from vitpareto.search.export.verification import verify

    _verified(verify(bundle))


def _verified(found: Verification) -> None:
    """Print what was found; a non-zero exit where the bundle is not the measured model."""
    typer.echo(found.table())
    if not found.verified:
        raise typer.Exit(1)


@app.command("bench")
def bench_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that export wrote")],
    runtimes: Annotated[
        str, typer.Option(help="onnxruntime, torch.export, torch.compile: a,b,…")
    ] = "onnxruntime,torch.export",
    batches: Annotated[str, typer.Option(help="Images a call: a,b,…")] = "1,32",
    rounds: Annotated[int, typer.Option(help="Of paired timing")] = 30,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One object a line")] = False,
) -> None:
    """Time a bundle's programs in turn with the dense model's, exported the same way, here.

    \b
    vitpareto bench bundle/
    vitpareto bench bundle/ --runtimes onnxruntime --batches 1,8,64
    """
    from vitpareto.dashboards.bench_table import bench_rows, bench_table
    from vitpareto.dashboards.csv_json import json_lines
    from vitpareto.search.export.benchmark import bench
    from vitpareto.search.trials.run import resolve_device

    sizes = [int(n) for n in _numbers(batches, "--batches")]
    found = bench(
        bundle, runtimes=_words(runtimes), batches=sizes, device=resolve_device(device),
        rounds=rounds,
    )  # fmt: skip
    if as_json:
        typer.echo(json_lines(bench_rows(found)), nl=False)
    else:
        _show([bench_table(found, str(bundle))], [])


@app.command("sync")
def sync_command(
    name: Annotated[str, typer.Argument(help="The study")],
    tracking_uri: TrackingUri = None,
    store: Store = None,
) -> None:
    """Make MLflow equal to a study, from nothing if need be; the study is the truth.

    \b
    vitpareto sync deit-s --tracking-uri http://127.0.0.1:5000
    """
    from vitpareto.search.tracking.sync import sync

    folder = _find(store, name)
    uri = tracking_uri or folder.job().get("tracking_uri")
    report = sync(folder, "store" if uri == "none" else uri, _page(folder))
    typer.echo(
        f"{report.created} runs created, {report.updated} updated, {report.closed} closed, "
        f"{report.removed} removed, {report.unchanged} unchanged"
    )
    for trial, reason in report.refused.items():
        _say(f"refused: {'the study' if trial is None else f'trial {trial}'}: {reason}")
    if report.refused:
        raise typer.Exit(1)


@app.command("ui")
def ui_command(
    name: Annotated[str | None, typer.Argument(help="Open at this study")] = None,
    port: Annotated[int | None, typer.Option(help="[a free one]")] = None,
    store: Store = None,
) -> None:
    """Serve MLflow on the store, on loopback, until Ctrl-C; prints the addresses of the study's
    front and of its page.

    \b
    vitpareto ui deit-s
    """
    from vitpareto.dashboards.mlflow_server import serve

    place = Path(store or os.environ.get("VITPARETO_STORE") or "studies")
    if name is not None:
        _find(store, name)
    for sent in (signal.SIGTERM, signal.SIGHUP):  # the server must end with us
        signal.signal(sent, lambda number, _: sys.exit(128 + number))
    with serve(place, name, port=port) as served:
        if name is not None:
            typer.echo(f"front: {served.view}")
            typer.echo(f"explorer: {served.explorer}")
            typer.echo(f"study: {served.page}")
        else:
            typer.echo(served.url)
        sys.stdout.flush()
        signal.pause()


JobAddress = Annotated[
    str,
    typer.Option(help="The head's dashboard", envvar="RAY_API_SERVER_ADDRESS", show_default=True),
]
HEAD = "http://127.0.0.1:8265"


@app.command("submit")
def submit_command(
    job: Annotated[Path, typer.Argument(help="Job file (YAML), as `search` takes it")],
    address: JobAddress = HEAD,
    follow: Annotated[bool, typer.Option("--follow", help="Show the log until it ends")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for any job key, e.g. trials=400")
    ] = None,
    name: Annotated[str | None, typer.Option(help="An existing study is continued")] = None,
    store: Annotated[
        str | None, typer.Option(help="A folder that all nodes mount, or s3://…, gs://…")
    ] = None,
) -> None:
    """Run a job on a Ray cluster: the same job file, packed with what the workers need.

    \b
    vitpareto submit job.yaml --address http://head:8265 --store s3://bucket/studies --follow
    """
    from vitpareto.clusters.jobs import Head
    from vitpareto.search.study.job_files import read_job

    given = read_job(job, set_ or [], {"name": name, "store": store})
    head = Head(address)
    made = head.submit(given)
    typer.echo(made)
    if not follow:
        _say(f"its log: vitpareto logs {made} --follow; to end it: vitpareto stop {made}")
        return
    _follow(head, made)


def _follow(head: Head, job: str) -> None:
    """A job's log until it ends; its own exit: 0 where it succeeded."""
    from vitpareto.clusters.jobs import described

    try:
        for text in head.follow(job):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        _say(f"{job} goes on; to end it: vitpareto stop {job}")
        raise typer.Exit(0) from None
    ended = head.find(job)
    if ended.status != "SUCCEEDED":
        _say(f"{job}: {ended.status.lower()}: {described(ended)}")
        raise typer.Exit(1)


@app.command("jobs")
def jobs_command(address: JobAddress = HEAD) -> None:
    """The searches that were submitted to a cluster, the latest first.

    \b
    vitpareto jobs --address http://head:8265
    """
    from rich.table import Table

    from vitpareto.clusters.jobs import Head, described

    found = Head(address).jobs()
    if not found:
        typer.echo(f"no search was submitted to {address} yet")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("job", "study", "begun", "status", ""):
        table.add_column(column, overflow="fold")
    for one in found:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.begun_ms / 1e3))
        table.add_row(one.id, one.study, begun, one.status.lower(), described(one))
    _console().print(table)


@app.command("logs")
def logs_command(
    job: Annotated[str, typer.Argument(help="As `submit` printed it")],
    address: JobAddress = HEAD,
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends")] = False,
) -> None:
    """What a submitted search has said.

    \b
    vitpareto logs deit-s-1a2b3c4d --follow --address http://head:8265
    """
    from vitpareto.clusters.jobs import Head

    head = Head(address)
    if follow:
        _follow(head, job)
    else:
        typer.echo(head.logs(job), nl=False)


@app.command("stop")
def stop_command(
    job: Annotated[str, typer.Argument(help="As `submit` printed it")],
    address: JobAddress = HEAD,
) -> None:
    """End a submitted search; what is finished is kept, and submitting it again continues.

    \b
    vitpareto stop deit-s-1a2b3c4d --address http://head:8265
    """
    from vitpareto.clusters.jobs import Head

    before = Head(address).stop(job)
    if before.over:
        typer.echo(f"{job} was over already: {before.status.lower()}")
    else:
        typer.echo(f"{job} is being stopped; submitting the same job again continues it")


cluster_app = typer.Typer(
    name="cluster", help="Try a cluster's run on this machine.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip
app.add_typer(cluster_app)


@cluster_app.callback()
def cluster_common() -> None:
    """Keeps `local` a word of its own while it is the only one."""


@cluster_app.command("local")
def cluster_local_command(
    nodes: Annotated[int, typer.Option(help="The head included")] = 3,
    cpus: Annotated[int, typer.Option(help="Of each node")] = 1,
    port: Annotated[int, typer.Option(help="Of the dashboard and of jobs; 0: a free one")] = 8265,
    resource: Annotated[
        str | None, typer.Option(help="One that node 1 alone has, to try --latency-on with")
    ] = None,
) -> None:
    """A Ray cluster of several nodes on this machine, on loopback and with a token, until Ctrl-C.

    \b
    vitpareto cluster local --nodes 3
    """
    from vitpareto.clusters.local_nodes import several_nodes

    ends = signal.getsignal(signal.SIGTERM)
    try:
        with several_nodes(nodes, cpus, port, resource) as there:
            # after Ray, which sets its own: it drains for half a minute
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
            for i, process in enumerate(there.processes):
                _say(f"node {i}{' (head)' if i == 0 else ''}: {cpus} CPUs, process {process}")
            typer.echo("in another terminal:")
            typer.echo(f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={there.token}")
            typer.echo(f"  vitpareto submit job.yaml --address {there.dashboard}")
            typer.echo(f"  vitpareto search job.yaml --address {there.address}")
            typer.echo(f"the dashboard: {there.dashboard}; Ctrl-C ends it all")
            sys.stdout.flush()
            told: set[int] = set()
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(0.5)
                    for i in sorted({*there.ended()} - told):
                        told.add(i)
                        _say(f"node {i} ended")
    finally:
        signal.signal(signal.SIGTERM, ends)


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="One method in full")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line")] = False,
) -> None:
    """What there is: every method with its parameters, presets and paper.

    \b
    vitpareto methods
    vitpareto methods tome
    """
    from vitpareto import methods
    from vitpareto.search.training.preparation_cache import epochs_key

    for each in (name,) if name else methods.names():
        m = methods.get(each)
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "name": m.name,
                        "summary": m.summary,
                        "kind": m.kind,
                        "site": m.site,
                        "training": m.training,
                        "control": m.control,
                        "paper": m.paper.title if m.paper else None,
                        "url": m.paper.url if m.paper else None,
                        "parameters": {p.name: p.accepts for p in m.parameters},
                        "searched": {p.name: p.accepts for p in m.space},
                        "searched_with": epochs_key(m.name),
                        "presets": {p.name: p.choices for p in m.presets},
                    }
                )
            )
            continue
        kind = "control" if m.control else m.kind
        typer.echo(f"{m.name}: {m.summary} [{kind}, {m.site}, training: {m.training}]")
        if m.paper is not None:
            typer.echo(f"  paper       {m.paper.title}; {m.paper.authors} {m.paper.url}".rstrip())
        for label, declared in (("parameter", m.parameters), ("searched", m.space)):
            for p in declared:
                typer.echo(f"  {label:<11} {p.name}: {p.accepts}{f' ({p.doc})' if p.doc else ''}")
        if (key := epochs_key(m.name)) is not None:
            typer.echo(f"  searched    only with --{key.replace('_', '-')} above 0: it is trained")
        for preset in m.presets:
            choices = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                                for k, v in preset.choices.items())  # fmt: skip
            typer.echo(f"  preset      {preset.name}: {choices}")


@app.command("finetune")
def finetune_command(
    model: Model = None,
    data: DataOption = None,
    recipe: Annotated[Path | None, typer.Option(help="Train this recipe (YAML) [dense]")] = None,
    weights: Weights = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Fresh weights")] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Model to follow; dense: --model before training; none [dense for a recipe]"
        ),
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights for the teacher")] = None,
    distill: Annotated[str, typer.Option(help="soft or hard, where there is a teacher")] = "soft",
    epochs: Annotated[int, typer.Option(help="Of the training images")] = 5,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate [1e-4; from scratch 1e-3]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images a step")] = 128,
    mixup: Annotated[float, typer.Option(help="timm's alpha; 0: none")] = 0.0,
    smoothing: Annotated[float, typer.Option(help="Of the labels")] = 0.1,
    augment: Annotated[
        str, typer.Option(help="auto, none, shift, shift-flip, crop or crop-flip")
    ] = "auto",
    seed: Seed = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder; an interrupted one is continued")] = Path(
        "trained"
    ),
    cache: Cache = None,
) -> None:
    """Train a model, or a recipe on it, and keep the weights: what a search can start from.

    \b
    vitpareto finetune --model vit_small_patch16_224 --data cifar10 --epochs 5 --out vit-s
    vitpareto finetune --model deit_small_patch16_224 --data /imagenet --recipe recipe.yaml
    vitpareto finetune --model deit_small_patch16_224 --data /imagenet --from-scratch --epochs 300
    """
    from vitpareto.methods import Recipe
    from vitpareto.search.files.cache import default_cache
    from vitpareto.search.training.finetune import Job, finetune
    from vitpareto.search.training.settings import Settings
    from vitpareto.search.trials.run import resolve_device

    settings = Settings(
        epochs=epochs,
        lr=lr if lr is not None else (1e-3 if from_scratch else 1e-4),
        batch=batch,
        smoothing=smoothing,
        mixup=mixup,
        augment=augment,
        seed=seed or 0,
        distill=distill,
        # nothing is fresher than the rest then
        parts_scale=1.0 if from_scratch else Settings.parts_scale,
    )
    job = Job(
        model or "digits",
        data or "digits",
        out,
        settings,
        Path(cache) if cache else default_cache(),
        resolve_device(device or "auto"),
        _recipe(recipe) if recipe is not None else Recipe(),
        Path(weights) if weights else None,
        from_scratch,
        teacher,
        teacher_weights,
    )
    begin = time.monotonic()
    trained = finetune(
        job,
        say=_say,
        decode=_decoding,
        progress=lambda one: _say(
            f"{one}; {epochs - one.index - 1} to go, {time.monotonic() - begin:.0f} s"
        ),
    )
    typer.echo(f"{trained.recipe}: before {trained.before}")
    typer.echo(f"{trained.recipe}: after  {trained.after}")
    typer.echo(f"weights: {out / 'model.safetensors'}")
    typer.echo(trained.next_step(job.model, job.weights, job.data, recipe))


@app.command("train-demo")
def train_demo_command(
    out: Annotated[Path, typer.Option(help="Where to write the weights")] = Path(
        "digits_vit.safetensors"
    ),
    epochs: Annotated[int | None, typer.Option(help="[as the shipped weights]")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and order")] = 0,
) -> None:
    """Train the embedded model from scratch, as the shipped weights were.

    \b
    vitpareto train-demo --out digits_vit.safetensors
    """
    from vitpareto.search.data import embedded

    options = {} if epochs is None else {"epochs": epochs}
    report = embedded.train(out, seed=seed, progress=lambda line: _say(str(line)), **options)
    typer.echo(json.dumps(report))


def _recipe(path: Path) -> Recipe:
    from vitpareto.methods import Recipe
    from vitpareto.search.errors import UserError

    try:
        return Recipe.from_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe file {path} cannot be read: it is not UTF-8 text") from error


def _find(store: str | None, name: str) -> StudyFolder:
    from vitpareto.search.study.folder import StudyFolder

    return StudyFolder.find(store or os.environ.get("VITPARETO_STORE") or "studies", name)


def _console() -> Any:
    from rich.console import Console

    # a log or a pipe has no width: wide enough that no recipe is cut
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Entry point: one message and a non-zero exit where a user can mend it; --debug: traceback."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped; what is finished is kept, the same command continues")
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
            sys.exit(1)
        if isinstance(error, typer.TyperException) and hasattr(error, "show"):
            error.show()  # a word of the command line itself
            sys.exit(2)
        from vitpareto.methods import BadInput

        if isinstance(error, (BadInput, SearchFailed, PermissionError)):
            _say(f"error: {error}")
            sys.exit(2)
        _say(f"error: {type(error).__name__}: {error} (--debug shows where)")
        sys.exit(1)


if __name__ == "__main__":
    main()
