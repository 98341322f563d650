"""`rlhf feedback ask`: things to judge, from a file into the labelling queue."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from rlhf_ray.cli.options import print_json

if TYPE_CHECKING:
    from rlhf_ray.serving.labelling import NewTask

AT_ONCE, AT_ONCE_BYTES = 500, 500_000
"""Tasks of a request, which a service takes up to 1,000 of, and up to 1 MiB."""


def ask(
    file: Annotated[
        Path, typer.Argument(help="JSON Lines: prompt or messages, completions, and what else a task has.")
    ],
    store: Annotated[Optional[str], typer.Option(help="Database of feedback that no service writes.")] = None,  # noqa: UP045
    service: Annotated[Optional[str], typer.Option(help="A running service: http://host:8000.")] = None,  # noqa: UP045
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="RLHF_KEY", help="A trainer's key for the service.", show_envvar=True),
    ] = None,
    overlap: Annotated[int, typer.Option(min=1, help="How many people judge each, where the file does not say.")] = 1,
    repeat: Annotated[
        float, typer.Option(min=0, max=1, help="Share of tasks that are put twice, to see who says the same again.")
    ] = 0.0,
    ensemble: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            help="A run's folder with a reward model; several, or one with members: what they disagree on goes first."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Ask people to judge what is in a file. The same file again adds what is not there yet.

    A line: {"prompt": "...", "completions": ["...", {"text": "...", "sampler": "ppo"}], "overlap": 2}, as POST
    /v1/tasks takes it. With --ensemble each gets a priority, by which a service with labelling.next=disagreement asks.
    """
    from rlhf_ray.client import Client
    from rlhf_ray.errors import InputError
    from rlhf_ray.feedback.store import FeedbackStore
    from rlhf_ray.feedback.tasks import add_tasks
    from rlhf_ray.serving.labelling import task_of

    if (store is None) == (service is None):
        raise InputError("say where to: give --store, or --service")
    wanted = list(_read(file, overlap=overlap))
    if ensemble:
        wanted = _by_disagreement(wanted, ensemble)
    wanted += _repeated(wanted, repeat)
    if store is not None:
        with FeedbackStore(store) as opened:
            new, place = add_tasks(opened, [task_of(one, opened.completion) for one in wanted]), opened.name
    else:
        assert service is not None
        with Client(service, key) as client:
            new, place = sum(client.add_tasks(some).new for some in _requests(wanted)), service
    if as_json:
        print_json({"tasks": len(wanted), "new": new})
    else:
        typer.echo(f"{len(wanted)} tasks; {new} are new in {place}")


def _requests(wanted: Sequence["NewTask"]) -> Iterator[list[dict[str, Any]]]:
    """As many to a request as it may hold."""
    some: list[dict[str, Any]] = []
    size = 0
    for task in wanted:
        body = task.model_dump(mode="json", exclude_none=True)
        length = len(task.model_dump_json())
        if some and (len(some) == AT_ONCE or size + length > AT_ONCE_BYTES):
            yield some
            some, size = [], 0
        some.append(body)
        size += length
    if some:
        yield some


def _read(file: Path, *, overlap: int) -> Iterator["NewTask"]:
    """Each named after what it says, so that the same file again adds nothing."""
    from pydantic import ValidationError

    from rlhf_ray.errors import DataError
    from rlhf_ray.feedback.formats.rows import read_rows
    from rlhf_ray.feedback.schema import digest_of, explain
    from rlhf_ray.serving.labelling import NewTask

    for row in read_rows(file):
        if row.problem:
            raise DataError(f"{file}, line {row.number}: {row.problem}")
        try:
            yield NewTask.model_validate({"id": f"t-{digest_of(row.value)}", "overlap": overlap, **row.value})
        except ValidationError as error:
            raise DataError(f"{file}, line {row.number}: {explain(error)}") from None


def _by_disagreement(wanted: Sequence["NewTask"], folders: Sequence[Path]) -> list["NewTask"]:
    import torch

    from rlhf_ray.algo.disagreement import preference_disagreement
    from rlhf_ray.errors import InputError
    from rlhf_ray.models.files import members_of
    from rlhf_ray.models.reward import load_reward_model
    from rlhf_ray.serving.labelling import exchanges_of
    from rlhf_ray.training.run_folder import existing_run

    members = [path for folder in folders for path in members_of(existing_run(folder)[0].reward_model)]
    if len(members) < 2:
        raise InputError(
            "one reward model cannot disagree: give --ensemble twice or more, or a run with several members"
        )

    if any(task.completion_id for task in wanted):
        raise InputError("--ensemble scores texts: bring prompt and completions instead of completion_id")
    compared = [task for task in wanted if len(task.completions or ()) > 1]
    exchanges = [exchange for task in compared for exchange in exchanges_of(task)]
    scores = torch.tensor([load_reward_model(path).score(exchanges) for path in members])
    priority: dict[int, float] = {}
    start = 0
    for task in compared:
        end = start + len(task.completions or ())
        priority[id(task)] = preference_disagreement(scores[:, start:end])
        start = end
    return [task.model_copy(update={"priority": priority.get(id(task))}) for task in wanted]


def _repeated(wanted: Sequence["NewTask"], share: float) -> list["NewTask"]:
    """Spread over the file, the same ones each time; an annotator sees the id, which must not say so."""
    from rlhf_ray.feedback.schema import digest_of

    count = round(share * len(wanted))
    chosen = [wanted[index * len(wanted) // count] for index in range(count)]
    return [task.model_copy(update={"id": f"t-{digest_of([task.id])}"}) for task in chosen]
