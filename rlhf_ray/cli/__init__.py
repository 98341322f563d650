"""`rlhf`: the door. Imports happen inside commands, so that `rlhf --help` answers at once."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from rlhf_ray import __version__
from rlhf_ray.cli import cluster, feedback, reward, service
from rlhf_ray.cli.options import ConfigFile, Overrides, Run, load, print_json, run_until

app = typer.Typer(
    name="rlhf",
    help="People's feedback on a language model's answers, turned into a better model.\n\n"
    "Start with `rlhf demo`. Every training command takes -c FILE.yaml and dotted overrides such as "
    "ppo.kl.coef=0.05; the same command on the same run folder resumes.\n\n"
    "Exit codes: 0 done, 2 configuration or input, 3 no valid checkpoint, 4 diverged, "
    "5 infrastructure (resumable), 130 interrupted, 143 terminated (both resumable).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at a configuration before it runs.", no_args_is_help=True)
app.add_typer(service.app)
app.add_typer(cluster.app)
app.add_typer(config_app, name="config")
app.add_typer(feedback.app, name="feedback")
app.add_typer(reward.app, name="reward")


@app.command()
def demo(
    overrides: Overrides = None,
    serve: Annotated[bool, typer.Option(help="Serve the result for a moment, ask it once and rate its answer.")] = True,
) -> None:
    """The whole loop on an invented world in minutes: base policy, feedback, reward model, PPO, report; then served."""
    run = run_until(load(None, ["run.id=demo", *(overrides or [])]), "ppo")
    if serve:
        from rlhf_ray.serving.visit import visit

        typer.echo("== service")
        visit(run, say=typer.echo)


@app.command()
def run(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """All stages: base policy, feedback, reward model, PPO, evaluation, report. Resumes where it stopped."""
    run_until(load(config, overrides), "ppo")


@app.command()
def sft(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """The base policy alone: trained on text, then on demonstrations."""
    run_until(load(config, overrides), "base_policy")


@app.command()
def ppo(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """PPO from a base policy and a reward model: this run's, those of `run.from`, or given folders."""
    run_until(load(config, overrides), "ppo")


@app.command(name="eval")
def evaluate(
    run: Run,
    against: Annotated[
        Path | None, typer.Option(help="Another run or a policy folder: both answer anew, and who wins is counted.")
    ] = None,
    base: Annotated[bool, typer.Option("--against-base", help="The same against the run's own base policy.")] = False,
    judge: Annotated[Path | None, typer.Option(help="Reward model that scores both; by default the run's.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers of each to each held-out prompt.")] = 4,
    sheet: Annotated[
        Path | None, typer.Option(help="Also writes a new CSV file in which people say which answer is better.")
    ] = None,
) -> None:
    """What a run's policy is worth on held-out prompts: as its summary.json says it, or beside another policy.

    Beside another: win rate (by gold where the recipe has one, else by the judge) with its 95% interval over prompts,
    the same at equal lengths, scores, and how varied the answers are; "before" is the other one, "after" the run's. The
    same command gives the same figures. People's own word on it: fill in a --sheet, then `rlhf feedback import` and
    `rlhf feedback wins`.
    """
    if against is not None or base:
        from rlhf_ray.training.versus import versus

        say = partial(typer.echo, err=True)
        found = versus(run, against, judge=judge, samples=samples, say=say, sheet=sheet)
        print_json(found)
        return
    from rlhf_ray.errors import InputError
    from rlhf_ray.training.run_folder import existing_run

    if sheet is not None:
        raise InputError("--sheet sets two policies beside each other: say which with --against or --against-base")
    folder, _ = existing_run(run)
    summary = folder.read_json("summary.json")
    if summary is None:
        raise InputError(f"{run} has not finished yet; run its command again to go on")
    print_json(summary)


@app.command()
def scale(run: Run, generators: Annotated[int, typer.Argument(min=1, help="Engines that are wanted.")]) -> None:
    """Give a run more or fewer engines while it goes on, from its next step; newcomers get the weights first."""
    from rlhf_ray.training.run_folder import existing_run

    existing_run(run)[0].want_generators(generators)
    typer.echo(f"{run}: {generators} generators from its next step on")


@app.command()
def profile(
    run: Run,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Settings that the steps are tried with: dotted.key=value"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many are watched, after one or two that warm up.")] = 4,
) -> None:
    """Who works when, who waits: a few steps more of a run's loop, thrown away afterwards.

    Prints each role's share of the time, leaves trace.json in the run's folder (open it at https://ui.perfetto.dev) and
    draws the same in its report. The run's policy, checkpoints and metrics stay as they are.
    """
    from rlhf_ray.training.profile import profile as watch
    from rlhf_ray.training.profile import table

    for line in table(watch(run, settings or [], steps=steps, say=typer.echo)):
        typer.echo(line)
    typer.echo(f"{run / 'trace.json'} for https://ui.perfetto.dev; {run / 'report.html'}")


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html anew from the files in its folder."""
    from rlhf_ray.training.report import write_report

    typer.echo(write_report(run))


@app.command()
def doctor() -> None:
    """Check this machine: Python, torch, vLLM, Ray, memory, disk."""
    from rlhf_ray.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        typer.echo(finding)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(2)


@config_app.command("show")
def config_show(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML."""
    from rlhf_ray.config import dump_config

    typer.echo(dump_config(load(config, overrides)), nl=False)


@config_app.command("validate")
def config_validate(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Exit 0 if the configuration is one, 2 with the key at fault if not."""
    load(config, overrides)
    typer.echo("valid")


@config_app.command("schema")
def config_schema() -> None:
    """Print every key with its type, default and meaning, as JSON schema."""
    from rlhf_ray.config import Config

    print_json(Config.model_json_schema(by_alias=True))


@config_app.command("reference")
def config_reference(
    service: Annotated[bool, typer.Option("--service", help="Those of `rlhf serve` instead of a run's.")] = False,
) -> None:
    """Print every key with what it takes, its default and meaning, as Markdown."""
    from rlhf_ray.config import Config
    from rlhf_ray.config.reference import reference
    from rlhf_ray.serving.settings import ServiceConfig

    typer.echo(reference(ServiceConfig if service else Config), nl=False)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """People's feedback on a language model's answers, turned into a better model."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """The console script: runs a command and turns our errors into one line and an exit code."""
    from rlhf_ray.errors import InputError, RunFailed

    try:
        app()
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except RunFailed as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
