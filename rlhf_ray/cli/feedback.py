"""`rlhf feedback`: people's judgements into a store and out of it, what it holds, who wins, and a frozen set of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rlhf_ray.cli.ask import ask
from rlhf_ray.cli.options import print_json

if TYPE_CHECKING:
    from rlhf_ray.feedback.store import FeedbackStore

app = typer.Typer(help="People's judgements: import, export, look at, freeze.", no_args_is_help=True)

Store = Annotated[str, typer.Option("--store", help="Database: sqlite:///path/feedback.db, or its path.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
SHEET = "sheet"


class By(StrEnum):
    """What feedback is counted by."""

    SAMPLER = "sampler"
    ANNOTATOR = "annotator"


class OnError(StrEnum):
    """What becomes of a row that cannot be used."""

    STOP = "stop"
    SKIP = "skip"


app.command()(ask)


@app.command("formats")
def formats() -> None:
    """The formats that `import` reads and `export` writes."""
    from rlhf_ray.feedback.formats import FORMATS

    typer.echo(f"{'format':<20}{'import':<8}{'export':<8}")
    for name, kind in FORMATS.items():
        can = ["yes" if able else "-" for able in (kind.read, kind.write)]
        typer.echo(f"{name:<20}{can[0]:<8}{can[1]:<8}{kind.about}")
    typer.echo(f"{SHEET:<20}{'yes':<8}{'-':<8}a filled-in sheet of `rlhf eval`")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON Lines, plain or gzip, Parquet, or a table with tabs.")],
    store: Store,
    format: Annotated[
        str, typer.Option("--format", help="How its rows are written: see `rlhf feedback formats`.")
    ] = "hh",
    on_error: Annotated[
        OnError, typer.Option(help="Stop before anything is written, or skip and count.")
    ] = OnError.STOP,
    report: Annotated[Optional[Path], typer.Option(help="A file for the rows skipped, a line each.")] = None,  # noqa: UP045
    annotator: Annotated[Optional[str], typer.Option(help="Who judged, where the file does not say.")] = None,  # noqa: UP045
    sampler: Annotated[Optional[str], typer.Option(help="Who answered, where the file does not say.")] = None,  # noqa: UP045
) -> None:
    """Write human judgements from a file into a store: all of it, or nothing. The same file again adds nothing."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.feedback.sheets import read_sheet
    from rlhf_ray.feedback.store import FeedbackStore
    from rlhf_ray.feedback.transfer import Found, read_feedback

    if format == SHEET:
        if annotator is None:
            raise InputError("a sheet does not say who filled it in: give --annotator")
        judged = read_sheet(file, annotator=annotator)
        with FeedbackStore(store) as opened:
            new = opened.add_all(judged)
        typer.echo(f"{len(judged)} judgements; {new} are new in {opened.name}")
        return
    if report is not None and on_error is OnError.STOP:
        raise InputError("--report is about rows skipped: give --on-error skip, too")
    found = Found()
    size = file.stat().st_size if file.is_file() else 0
    with _progress("importing", size) as watch, FeedbackStore(store) as opened:
        items = read_feedback(
            file,
            format,
            found,
            on_bad_row="skip" if on_error is OnError.SKIP else "error",
            annotator=annotator,
            sampler=sampler,
            report=report,
            watch=watch,
        )
        new = opened.add_all(items)
    typer.echo(f"{found.describe()}; {new} are new in {opened.name}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="To be made: .jsonl, .jsonl.gz or .parquet.")],
    store: Store,
    format: Annotated[
        str, typer.Option("--format", help="How rows are written: see `rlhf feedback formats`.")
    ] = "feedback",
    snapshot: Annotated[Optional[str], typer.Option(help="A frozen set; by default all of now.")] = None,  # noqa: UP045
    conversational: Annotated[bool, typer.Option(help="Prompts and answers as turns of a chat.")] = False,
) -> None:
    """Write a store's feedback, less what is excluded, for other programs.

    What a format has no words for is left out and counted.
    """
    from rlhf_ray.feedback.store import FeedbackStore
    from rlhf_ray.feedback.transfer import export_feedback, writable

    writable(format)  # before the store is opened
    with FeedbackStore(store, read_only=True) as opened:
        items = opened.counted() if snapshot is None else opened.read(snapshot)
        with _progress("exporting", opened.count()) as watch:
            written = export_feedback(file, items, format, conversational=conversational, watch=watch)
    typer.echo(f"{file}: {written.describe()}")


@app.command()
def stats(
    store: Store,
    by: Annotated[Optional[By], typer.Option("--by", help="Only these tallies.")] = None,  # noqa: UP045
    as_json: AsJson = False,
    html: Annotated[Optional[Path], typer.Option(help="Draw it into this page, with how far people agree.")] = None,  # noqa: UP045
) -> None:
    """How much feedback a store holds, less what is excluded: by kind, by who sampled the answers, by annotator."""
    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store, read_only=True) as opened:
        found = opened.stats()
        left_out = opened.count() - found.rows
        if html is not None:
            _draw(opened, html)
    tallies = {
        key: [{key: tally.name, "n": tally.n, "mean": tally.mean} for tally in getattr(found, f"by_{key}")]
        for key in By
        if by in (None, key)
    }
    if as_json:
        counts = {"rows": found.rows, "excluded": left_out, "by_kind": found.by_kind, "scale": found.scale}
        print_json({**counts, **{f"by_{key}": rows for key, rows in tallies.items()}})
        return
    kinds = ", ".join(f"{n} {kind}s" for kind, n in found.by_kind.items()) or "nothing"
    typer.echo(f"{found.rows} rows: {kinds}" + (f"; {left_out} more are excluded" if left_out else ""))
    for key, rows in tallies.items():
        typer.echo(f"{key:<24}{'n':>8}  mean rating" + (f" ({found.scale})" if found.scale else ""))
        for row in rows:
            mean = "-" if row["mean"] is None else f"{row['mean']:.2f}"
            typer.echo(f"  {row[key]:<22}{row['n']:>8}  {mean:>11}")


@app.command()
def wins(store: Store, as_json: AsJson = False) -> None:
    """Whose answers people prefer: every two samplers, or served versions, that somebody compared.

    The rate is the mean over prompts of how often the first was preferred, a tie counting half, with its 95% interval.
    """
    from dataclasses import asdict

    from rlhf_ray.feedback.store import FeedbackStore
    from rlhf_ray.feedback.wins import wins as wins_of

    with FeedbackStore(store, read_only=True) as opened:
        duels = wins_of(opened.counted())
    if as_json:
        print_json([asdict(duel) for duel in duels])
        return
    if not duels:
        typer.echo(f"{opened.name}: nobody compared two samplers' answers to one prompt yet")
    for duel in duels:
        low, high = duel.ci95
        typer.echo(
            f"{duel.name} against {duel.other}: preferred in {duel.rate:.1%} [{low:.1%}, {high:.1%}] of "
            f"{duel.judgements} judgements of {duel.prompts} prompts"
        )


@app.command()
def quality(store: Store, as_json: AsJson = False) -> None:
    """How far people agree, and what is known of each annotator, from nothing but what they said of the same things.

    Accuracy is how often somebody's choice is what is so, by all that was said (Dawid and Skene); bias and correlation
    are of their ratings with how good answers are. Nobody is left out by this: see `rlhf feedback exclude`.
    """
    from dataclasses import asdict

    from rlhf_ray.feedback.quality import quality_of
    from rlhf_ray.feedback.store import FeedbackStore
    from rlhf_ray.feedback.tasks import gold_marks

    with FeedbackStore(store, read_only=True) as opened:
        found, excluded = quality_of(opened.counted(of_all=True)), opened.excluded()
        gold = gold_marks(opened)
    if as_json:
        print_json({**asdict(found), "excluded": sorted(excluded.annotators), "gold": gold})
        return
    if not found.agreement:
        typer.echo("nothing was judged by two people: agreement and accuracy need things that several judge")
    for kind in found.agreement:
        alpha = (
            "nothing varies"
            if kind.alpha is None or kind.ci95 is None
            else (f"Krippendorff's alpha {kind.alpha:.3f} [{kind.ci95[0]:.3f}, {kind.ci95[1]:.3f}]")
        )
        typer.echo(f"{kind.what}: {alpha}, {kind.level}, {kind.things} things")
    typer.echo(
        f"{'annotator':<24}{'n':>7}{'choices':>9}{'accuracy':>10}{'ratings':>9}{'bias':>7}{'corr.':>7}{'first':>7}"
        f"{'again':>7}{'gold':>8}{'s':>6}"
    )
    for person in found.people:
        figures = [
            (person.judgements, 7, "d"), (person.choices, 9, "d"), (person.accuracy, 10, ".3f"),
            (person.ratings, 9, "d"), (person.bias, 7, "+.2f"), (person.correlation, 7, ".2f"),
            (person.first, 7, ".2f"), (person.consistent, 7, ".2f"), (_of(gold.get(person.name)), 8, ""),
            (person.seconds, 6, ".0f"),
        ]  # fmt: skip
        cells = "".join(f"{'-' if value is None else format(value, form):>{width}}" for value, width, form in figures)
        remarks = [*person.remarks, *(["excluded"] if person.name in excluded.annotators else [])]
        typer.echo(f"{person.name:<24}{cells}  {'; '.join(remarks)}".rstrip())


@app.command()
def exclude(
    store: Store,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the flag.")],
    annotator: Annotated[Optional[list[str]], typer.Option(help="All of somebody's; may be repeated.")] = None,  # noqa: UP045
    id: Annotated[Optional[list[str]], typer.Option("--id", help="One judgement; may be repeated.")] = None,  # noqa: UP045
    back: Annotated[bool, typer.Option("--back", help="Take it back.")] = False,
) -> None:
    """Leave somebody's judgements, or some of them, out of snapshots from now on. Nothing is removed.

    `rlhf feedback snapshot --of NAME` then freezes the rows of an earlier snapshot less those.
    """
    from rlhf_ray.errors import InputError
    from rlhf_ray.feedback.store import FeedbackStore

    if bool(annotator) == bool(id):
        raise InputError("say what to leave out: give --annotator, or --id")
    with FeedbackStore(store) as opened:
        flag = partial(opened.flag, out=not back, reason=reason, by="command line")
        rows = flag("annotator", annotator) if annotator else flag("feedback", id or [])
    typer.echo(f"{rows} rows are {'back in' if back else 'left out of'} snapshots of {opened.name} from now on")


@app.command()
def erase(
    store: Store,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept, without the name or the text.")],
    annotator: Annotated[Optional[str], typer.Option(help="All that this one judged.")] = None,  # noqa: UP045
    text: Annotated[Optional[str], typer.Option(help="All in which these words are, to the letter.")] = None,  # noqa: UP045
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only counted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove feedback for good: an annotator's, or whatever holds a text; kept answers and tasks that hold it, too.

    The snapshots that held some are named; they cannot be read afterwards, what is left of them can be frozen anew.
    """
    from dataclasses import asdict

    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store) as opened:
        erased = opened.erase(annotator=annotator, text=text, reason=reason, by="command line", dry_run=not yes)
    if as_json:
        print_json({**asdict(erased), "done": yes})
        return
    typer.echo(
        f"{'gone' if yes else 'would go'}: {erased.feedback} judgements, {erased.completions} kept answers, "
        f"{erased.tasks} tasks, {erased.steps} notes of who was shown what"
    )
    typer.echo(f"snapshots that held some: {', '.join(erased.snapshots) or 'none'}")
    if not yes:
        typer.echo("nothing was done: give --yes to do it; it cannot be taken back")


@app.command()
def snapshot(
    store: Store,
    name: Annotated[Optional[str], typer.Option(help="Its name; by default one is made.")] = None,  # noqa: UP045
    of: Annotated[Optional[str], typer.Option(help="Only rows of this earlier snapshot.")] = None,  # noqa: UP045
    cap: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="The largest share that one annotator may have: 0.1; of who judged more, some are drawn."),
    ] = None,
) -> None:
    """Freeze what a store holds now, less what is excluded: the set that a training run reads, with its hash."""
    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store) as opened:
        frozen = opened.freeze(name, of=of, cap=cap)
    typer.echo(f"{frozen.id}  {frozen.rows} rows  sha256 {frozen.sha256}")


def _draw(store: "FeedbackStore", page: Path) -> None:
    from rlhf_ray.feedback.quality import quality_of
    from rlhf_ray.feedback.summary import summarise
    from rlhf_ray.feedback.tasks import gold_marks
    from rlhf_ray.training.feedback_page import Times, feedback_page

    times = Times()
    stats = summarise(times.watching(store.counted()))
    quality = quality_of(store.counted(of_all=True))
    page.write_text(
        feedback_page(Path(store.name).name, stats, quality, times, gold=gold_marks(store)), encoding="utf-8"
    )
    typer.echo(f"drawn in {page}", err=True)


def _of(marks: tuple[int, int] | None) -> str | None:
    """How many of how many tasks whose answer is known came out right."""
    return f"{marks[0]}/{marks[1]}" if marks else None


@contextmanager
def _progress(doing: str, length: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, to which is told how much is done; elsewhere nothing."""
    if not sys.stderr.isatty() or not length:
        yield lambda _: None
        return
    done = 0
    with typer.progressbar(length=length, label=doing, file=sys.stderr) as bar:

        def watch(now: int) -> None:
            nonlocal done
            bar.update(now - done)
            done = now

        yield watch
        bar.update(length - done)
