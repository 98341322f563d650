"""`rlhf reward`: a model of what people prefer, and why it says what it says."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_ray.cli.options import ConfigFile, Overrides, Run, load, print_json, run_until


class _TrainsUnlessToldOtherwise(TyperGroup):
    """What names no command is for `train`: `rlhf reward -c FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_TrainsUnlessToldOtherwise,
    help="A model of what people prefer: `rlhf reward -c FILE.yaml` trains it (train), `rlhf reward explain RUN` says "
    "why it is as it is.",
    no_args_is_help=False,
)


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Learn from judgements of run.from's policy too, its own feedback taken over."),
    ] = False,
) -> None:
    """Up to the reward model: base policy, feedback, and a model of what people prefer. The default.

    What is learnt from is `reward_model.feedback`: pairs, rankings, ratings, thumbs, comments, or all of them (joint).

    A policy that has learnt says what the reward model has not seen judged. `rlhf reward --refresh run.id=NEW
    run.from=runs/OLD` samples OLD's policy, has its answers judged, and learns from both (people's judgements: from
    what is in OLD's store and in its own by now).
    """
    more = ["run.take=feedback", "reward_model.refresh=true"] if refresh else []
    run_until(load(config, [*(overrides or []), *more]), "reward_model")


@app.command()
def explain(
    run: Run,
    worst: Annotated[int, typer.Option(min=0, help="Mistakes on held-out choices that are shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Which feedback moved a run's reward model, by annotator and kind, and its worst mistakes on held-out choices.

    For each annotator and kind: by how many nats the loss on held-out choices would rise without what they said; below
    0 it does harm. The run's report.html draws it, and shows the mistakes.
    """
    from rlhf_ray.training.report import write_report
    from rlhf_ray.training.reward.explain import explain as explained_by
    from rlhf_ray.training.reward.explain import table

    explained = explained_by(run, worst=worst, say=lambda line: typer.echo(line, err=True))
    report = write_report(run)
    if as_json:
        print_json(explained)
        return
    for line in table(explained):
        typer.echo(line)
    typer.echo(f"report: {report}")
