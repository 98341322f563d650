"""`rlhf`: the door. Imports happen inside commands, so that `rlhf --help` answers at once."""

import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from rlhf_ray import __version__
from rlhf_ray.cli import cluster, service
from rlhf_ray.cli.options import ConfigFile, Overrides, Run, load

if TYPE_CHECKING:
    from rlhf_ray.config import Config
    from rlhf_ray.training.stages import Stage

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
feedback_app = typer.Typer(help="People's judgements: import, look at, freeze.", no_args_is_help=True)
app.add_typer(service.app)
app.add_typer(cluster.app)
app.add_typer(config_app, name="config")
app.add_typer(feedback_app, name="feedback")

Store = Annotated[str, typer.Option("--store", help="Database: sqlite:///path/feedback.db, or its path.")]


class Format(StrEnum):
    """How a file of human choices is written."""

    HH = "hh"
    PAIRS = "pairs"
    SHEET = "sheet"


class By(StrEnum):
    """What feedback is counted by."""

    SAMPLER = "sampler"
    ANNOTATOR = "annotator"


@app.command()
def demo(
    overrides: Overrides = None,
    serve: Annotated[bool, typer.Option(help="Serve the result for a moment, ask it once and rate its answer.")] = True,
) -> None:
    """The whole loop on an invented world in minutes: base policy, feedback, reward model, PPO, report; then served."""
    run = _run(load(None, ["run.id=demo", *(overrides or [])]), "ppo")
    if serve:
        from rlhf_ray.serving.visit import visit

        typer.echo("== service")
        visit(run, say=typer.echo)


@app.command()
def run(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """All stages: base policy, feedback, reward model, PPO, evaluation, report. Resumes where it stopped."""
    _run(load(config, overrides), "ppo")


@app.command()
def sft(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """The base policy alone: trained on text, then on demonstrations."""
    _run(load(config, overrides), "base_policy")


@app.command()
def reward(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Up to the reward model: base policy, feedback, and a model of what people prefer."""
    _run(load(config, overrides), "reward_model")


@app.command()
def ppo(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """PPO from a base policy and a reward model: this run's, those of `run.from`, or given folders."""
    _run(load(config, overrides), "ppo")


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
        _print_json(found)
        return
    from rlhf_ray.errors import InputError
    from rlhf_ray.training.run_folder import existing_run

    if sheet is not None:
        raise InputError("--sheet sets two policies beside each other: say which with --against or --against-base")
    folder, _ = existing_run(run)
    summary = folder.read_json("summary.json")
    if summary is None:
        raise InputError(f"{run} has not finished yet; run its command again to go on")
    _print_json(summary)


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

    _print_json(Config.model_json_schema(by_alias=True))


@config_app.command("reference")
def config_reference(
    service: Annotated[bool, typer.Option("--service", help="Those of `rlhf serve` instead of a run's.")] = False,
) -> None:
    """Print every key with what it takes, its default and meaning, as Markdown."""
    from rlhf_ray.config import Config
    from rlhf_ray.config.reference import reference
    from rlhf_ray.serving.settings import ServiceConfig

    typer.echo(reference(ServiceConfig if service else Config), nl=False)


@feedback_app.command("import")
def feedback_import(
    file: Annotated[Path, typer.Argument(help="JSON Lines, plain or gzip; or a filled-in sheet of `rlhf eval`.")],
    store: Store,
    format: Annotated[Format, typer.Option("--format", help="How its rows are written.")] = Format.HH,
    skip_bad_rows: Annotated[bool, typer.Option(help="Skip and count rows that cannot be used.")] = False,
    annotator: Annotated[str | None, typer.Option(help="Who judged; a sheet does not say it.")] = None,
) -> None:
    """Write human choices from a file into a store, each as a ranking of two."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.feedback.formats import import_pairs, read_pairs
    from rlhf_ray.feedback.sheets import read_sheet
    from rlhf_ray.feedback.store import FeedbackStore

    write: Callable[[FeedbackStore], list[str]]
    if format is Format.SHEET:
        if annotator is None:
            raise InputError("a sheet does not say who filled it in: give --annotator")
        judged = read_sheet(file, annotator=annotator)
        held, write = f"{len(judged)} judgements", lambda opened: opened.add(judged)
    else:
        kind: Literal["hh", "pairs"] = "hh" if format is Format.HH else "pairs"
        pairs = read_pairs(file, kind, "skip" if skip_bad_rows else "error")
        who, source = annotator or f"import-{kind}", f"import-{kind}"
        held = pairs.describe()
        write = partial(import_pairs, pairs=pairs.pairs, annotator=who, sampler=source)
    with FeedbackStore(store) as opened:
        before = opened.count()
        write(opened)
        typer.echo(f"{held}; {opened.count() - before} rows are new in {store}")


@feedback_app.command("stats")
def feedback_stats(
    store: Store,
    by: Annotated[Optional[By], typer.Option("--by", help="Only these tallies.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How much feedback a store holds: by kind, by who sampled the answers, by annotator."""
    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store, read_only=True) as opened:
        stats = opened.stats()
    tallies = {
        key: [{key: tally.name, "n": tally.n, "mean": tally.mean} for tally in getattr(stats, f"by_{key}")]
        for key in By
        if by in (None, key)
    }
    if as_json:
        _print_json(
            {"rows": stats.rows, "by_kind": stats.by_kind, **{f"by_{key}": rows for key, rows in tallies.items()}}
        )
        return
    kinds = ", ".join(f"{n} {kind}s" for kind, n in stats.by_kind.items()) or "nothing"
    typer.echo(f"{stats.rows} rows: {kinds}")
    for key, rows in tallies.items():
        typer.echo(f"{key:<24}{'n':>8}  mean rating")
        for row in rows:
            mean = "-" if row["mean"] is None else f"{row['mean']:.2f}"
            typer.echo(f"  {row[key]:<22}{row['n']:>8}  {mean:>11}")


@feedback_app.command("wins")
def feedback_wins(store: Store, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Whose answers people prefer: every two samplers, or served versions, that somebody compared.

    The rate is the mean over prompts of how often the first was preferred, a tie counting half, with its 95% interval.
    """
    from dataclasses import asdict

    from rlhf_ray.feedback.store import FeedbackStore
    from rlhf_ray.feedback.wins import wins

    with FeedbackStore(store, read_only=True) as opened:
        duels = wins(opened.iter())
    if as_json:
        _print_json([asdict(duel) for duel in duels])
        return
    if not duels:
        typer.echo(f"{store}: nobody compared two samplers' answers to one prompt yet")
    for duel in duels:
        low, high = duel.ci95
        typer.echo(
            f"{duel.name} against {duel.other}: preferred in {duel.rate:.1%} [{low:.1%}, {high:.1%}] of "
            f"{duel.judgements} judgements of {duel.prompts} prompts"
        )


@feedback_app.command("snapshot")
def feedback_snapshot(
    store: Store,
    name: Annotated[Optional[str], typer.Option(help="Its name; by default one is made.")] = None,  # noqa: UP045
) -> None:
    """Freeze what a store holds now: the set that a training run reads, with its hash."""
    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store) as opened:
        snapshot = opened.freeze(name)
    typer.echo(f"{snapshot.id}  {snapshot.rows} rows  sha256 {snapshot.sha256}")


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


def _run(config: "Config", until: "Stage") -> Path:
    if config.resources.address is not None:
        from rlhf_ray.plan import require_room

        typer.echo(require_room(config))
    typer.echo("loading torch and transformers")  # seconds in which nothing else would be seen
    from rlhf_ray.training.stages import run_stages

    return run_stages(config, until=until, say=lambda line: typer.echo(line))


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))
