"""`rlhf plan`, `rlhf submit`, `rlhf jobs`: runs on a cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rlhf_ray.cli.options import ConfigFile, Overrides, load

if TYPE_CHECKING:
    from rlhf_ray.jobs import Jobs

app = typer.Typer()
jobs_app = typer.Typer(help="Runs on a cluster: list, look at, follow, stop.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")

Dashboard = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--address", help="The cluster's dashboard; by default http://127.0.0.1:8265.", metavar="http://..."),
]
ClusterFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--cluster", help="The cluster's own config, for what it may grow to.", metavar="FILE.yaml"),
]
Job = Annotated[str, typer.Argument(help="A job's id, as `rlhf submit` says it.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Stay until it is over, and exit as the run does.")]


@app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--address", help="A cluster: auto, HOST:PORT or http://DASHBOARD; else resources.address."),
    ] = None,
    cluster: ClusterFile = None,
) -> None:
    """Hold what the roles ask for against what the cluster has or may grow to; exit 2 with what is missing."""
    from rlhf_ray.plan import plan_run

    found = plan_run(load(config, [*(overrides or []), *_cluster_override(cluster)]), address=address)
    typer.echo(found)
    for lack in found.lacks:
        typer.echo(f"{'error' if found.certain else 'warning'}: {lack}", err=True)
    if found.lacks and found.certain:
        raise typer.Exit(2)


@app.command()
def submit(
    config: ConfigFile = None,
    overrides: Overrides = None,
    address: Dashboard = None,
    cluster: ClusterFile = None,
    follow: Follow = False,
    stop_within: Annotated[int, typer.Option(help="Seconds to save in when the job is stopped.", min=1)] = 120,
) -> None:
    """Run on a cluster as a Ray job, after a preflight. The same command again resumes the run."""
    from rlhf_ray import jobs
    from rlhf_ray.plan import require_room

    where, run_config = jobs.address_of(address), load(config, [*(overrides or []), *_cluster_override(cluster)])
    jobs.check_paths(run_config)
    client = jobs.connect(where)
    typer.echo(require_room(run_config, address=where))
    job = jobs.submit(run_config, client=client, stop_within_s=stop_within)
    typer.echo(f"job {job}: `rlhf jobs logs {job} --follow` shows it, `rlhf jobs stop {job}` saves and stops it")
    if follow:
        raise typer.Exit(_follow(job, client))


@jobs_app.command("list")
def jobs_list(address: Dashboard = None) -> None:
    """The cluster's jobs, the newest first."""
    from rlhf_ray import jobs

    for line in jobs.listing(jobs.connect(jobs.address_of(address))):
        typer.echo(line)


@jobs_app.command("status")
def jobs_status(job: Job, address: Dashboard = None) -> None:
    """How a job stands, in one line."""
    from rlhf_ray import jobs

    typer.echo(jobs.status(job, client=jobs.connect(jobs.address_of(address))))


@jobs_app.command("logs")
def jobs_logs(job: Job, address: Dashboard = None, follow: Follow = False) -> None:
    """What a job has printed so far, or as it comes."""
    from rlhf_ray import jobs

    client = jobs.connect(jobs.address_of(address))
    if follow:
        raise typer.Exit(_follow(job, client))
    typer.echo(client.get_job_logs(job), nl=False)


@jobs_app.command("stop")
def jobs_stop(job: Job, address: Dashboard = None) -> None:
    """Let a run finish its step, save and end (exit 143); submitting it again resumes it."""
    from rlhf_ray import jobs

    typer.echo(jobs.stop(job, client=jobs.connect(jobs.address_of(address))))


def _cluster_override(file: Path | None) -> list[str]:
    return [] if file is None else [f"resources.cluster={file}"]


def _follow(job: str, client: "Jobs") -> int:
    from rlhf_ray import jobs

    try:
        code = jobs.follow(job, client=client, show=lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\n{job} goes on; `rlhf jobs stop {job}` saves and stops it", err=True)
        return 130
    typer.echo(jobs.last_words(job, client=client), err=True)
    return code
