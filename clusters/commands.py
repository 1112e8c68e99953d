"""The commands of `clusters`: submit, jobs, logs, stop, and cluster local; and `RayClusters`, with
which a search starts or joins Ray.

May import all of `clusters` and `search`, and not `dashboards`. Modules are imported when a command
runs, so that `vitpareto --help` does not import Ray.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpareto.search.commands.options import Sets, job_option
from vitpareto.search.commands.terminal import console, log

if TYPE_CHECKING:
    from vitpareto.clusters.connect import ClusterCapacity
    from vitpareto.clusters.jobs import JobClient
    from vitpareto.search.study.job_request import JobRequest

HEAD = "http://127.0.0.1:8265"

JobAddress = Annotated[
    str,
    typer.Option(
        help="Dashboard of the Ray head", envvar="RAY_API_SERVER_ADDRESS", show_default=True
    ),
]
JobId = Annotated[str, typer.Argument(help="Id of the job, as `submit` prints it")]


class RayClusters:
    """Starts and joins Ray clusters (`search.commands.hooks.Clusters`)."""

    def local(self, workers: int | None) -> AbstractContextManager[ClusterCapacity]:
        from vitpareto.clusters.connect import local_cluster

        return local_cluster(workers)

    def join(self, address: str) -> AbstractContextManager[ClusterCapacity]:
        from vitpareto.clusters.connect import joined_cluster

        return joined_cluster(address)

    def store_inputs(self, job: JobRequest, package: Path, study: Path) -> JobRequest:
        from vitpareto.clusters.packing import store_inputs

        return store_inputs(job, package, study)


def add_to(app: typer.Typer) -> None:
    """Add this package's commands."""
    app.command("submit")(submit_command)
    app.command("jobs")(jobs_command)
    app.command("logs")(logs_command)
    app.command("stop")(stop_command)
    cluster = typer.Typer(
        name="cluster", help="Try a cluster on this machine.", no_args_is_help=True,
        rich_markup_mode=None,
    )  # fmt: skip
    cluster.callback()(_cluster)
    cluster.command("local")(local_command)
    app.add_typer(cluster)


def submit_command(
    job: Annotated[Path, typer.Argument(help="Job file (YAML), as for search")],
    address: JobAddress = HEAD,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the log until the job ends")
    ] = False,
    set_: Sets = None,
    name: Annotated[str | None, job_option("name")] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder that all nodes mount, or s3:// or gs:// address")
    ] = None,
) -> None:
    """Run a job on a Ray cluster: the job file, packed with what the workers need.

    \b
    vitpareto submit job.yaml --address http://head:8265 --store s3://bucket/studies --follow
    """
    from vitpareto.clusters.jobs import JobClient
    from vitpareto.search.study.job_files import read_job

    given = read_job(job, set_ or [], {"name": name, "store": store})
    head = JobClient(address)
    submitted = head.submit(given)
    typer.echo(submitted)
    if follow:
        _print_logs_until_end(head, submitted)
    else:
        log(f"log: vitpareto logs {submitted} --follow; stop: vitpareto stop {submitted}")


def _print_logs_until_end(head: JobClient, job: str) -> None:
    """Print a job's log until it ends. Exits with code 1 if the job did not succeed."""
    try:
        for text in head.stream_logs(job):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        log(f"{job} continues; stop: vitpareto stop {job}")
        raise typer.Exit(0) from None
    ended = head.find(job)
    if ended.status != "SUCCEEDED":
        log(f"{job}: {ended.status.lower()}: {ended.failure}")
        raise typer.Exit(1)


def jobs_command(address: JobAddress = HEAD) -> None:
    """List the searches that were submitted to a cluster, the latest first.

    \b
    vitpareto jobs --address http://head:8265
    """
    from rich.table import Table

    from vitpareto.clusters.jobs import JobClient

    jobs = JobClient(address).jobs()
    if not jobs:
        typer.echo(f"no search was submitted to {address} yet")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("job", "study", "started", "status", ""):
        table.add_column(column, overflow="fold")
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_ms / 1e3))
        table.add_row(job.id, job.study, started, job.status.lower(), job.failure)
    console().print(table)


def logs_command(
    job: JobId,
    address: JobAddress = HEAD,
    follow: Annotated[bool, typer.Option("--follow", help="Continue until the job ends")] = False,
) -> None:
    """Print the log of a submitted search.

    \b
    vitpareto logs deit-s-1a2b3c4d --follow --address http://head:8265
    """
    from vitpareto.clusters.jobs import JobClient

    head = JobClient(address)
    if follow:
        _print_logs_until_end(head, job)
    else:
        typer.echo(head.logs(job), nl=False)


def stop_command(job: JobId, address: JobAddress = HEAD) -> None:
    """Stop a submitted search; finished trials are kept, and submitting it again continues.

    \b
    vitpareto stop deit-s-1a2b3c4d --address http://head:8265
    """
    from vitpareto.clusters.jobs import JobClient

    before = JobClient(address).stop(job)
    if before.ended:
        typer.echo(f"{job} has ended already: {before.status.lower()}")
    else:
        typer.echo(f"{job} is stopping; submitting the same job again continues it")


def _cluster() -> None:
    """Makes `local` a subcommand although it is the only one."""


def local_command(
    nodes: Annotated[int, typer.Option(help="Number of nodes, including the head")] = 3,
    cpus: Annotated[int, typer.Option(help="CPUs per node")] = 1,
    port: Annotated[
        int, typer.Option(help="Port of the dashboard and of jobs; 0 for a free one")
    ] = 8265,
    resource: Annotated[
        str | None, typer.Option(help="Custom resource of node 1, to try --latency-on")
    ] = None,
) -> None:
    """Start a Ray cluster of several nodes on this machine, on loopback and with a token, until
    Ctrl-C.

    \b
    vitpareto cluster local --nodes 3
    """
    from vitpareto.clusters.local_nodes import local_nodes

    before = signal.getsignal(signal.SIGTERM)
    try:
        with local_nodes(nodes, cpus, port, resource) as cluster:
            # replaces Ray's handler, which drains the node for half a minute
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
            for i, process in enumerate(cluster.processes):
                log(f"node {i}{' (head)' if i == 0 else ''}: {cpus} CPUs, process {process}")
            typer.echo("in another terminal:")
            typer.echo(f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token}")
            typer.echo(f"  vitpareto submit job.yaml --address {cluster.dashboard}")
            typer.echo(f"  vitpareto search job.yaml --address {cluster.address}")
            typer.echo(f"dashboard: {cluster.dashboard}; Ctrl-C ends it")
            sys.stdout.flush()
            _wait(cluster)
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(cluster: Any) -> None:
    """Report nodes that end, until Ctrl-C."""
    reported: set[int] = set()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(0.5)
            for i in sorted({*cluster.ended()} - reported):
                reported.add(i)
                log(f"node {i} ended")
