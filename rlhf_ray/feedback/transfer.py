"""Feedback out of files into a store and back, a row at a time: memory stays flat, and nothing goes by in silence.

A row that cannot be used stops an import before anything is written, with its line; or is skipped, counted and reported
where that was asked for. What a format has no words for is left out of an export and counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import ValidationError

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.formats import FORMATS, Format
from rlhf_ray.feedback.formats.judged import Judged, Seen, Unsayable, feedback_of
from rlhf_ray.feedback.formats.rows import BadRow, Row, Watch, read_rows, write_rows
from rlhf_ray.feedback.schema import Feedback, digest_of, explain

OnBadRow = Literal["error", "skip"]


@dataclass
class Found:
    """What a file held, as far as it is read."""

    rows: int = 0
    """With those that cannot be used."""
    judgements: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows by why they cannot be used."""

    def describe(self) -> str:
        """One line for a log: `2303 judgements; 9 of 2312 rows skipped (5 ..., 4 ...)`."""
        if not self.skipped:
            return f"{self.judgements} judgements; no row skipped"
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.skipped.most_common())
        return f"{self.judgements} judgements; {self.skipped.total()} of {self.rows} rows skipped ({reasons})"


@dataclass
class Written:
    """What an export came to."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Feedback by why the format has no words for it."""

    def describe(self) -> str:
        """One line for a log."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.left_out.most_common())
        left_out = f"{self.left_out.total()} judgements left out ({reasons})" if reasons else "nothing left out"
        return f"{self.rows} rows; {left_out}"


def read_feedback(
    path: Path,
    format: str,
    found: Found,
    *,
    on_bad_row: OnBadRow = "error",
    annotator: str | None = None,
    sampler: str | None = None,
    report: Path | None = None,
    watch: Watch = lambda _: None,
) -> Iterator[Feedback]:
    """A file's feedback in its order; what it held is counted in `found`.

    `annotator` and `sampler` stand in where the file names none (by default the format's name); `report` gets a line of
    JSON for each row skipped. Raises `DataError` where it is no such file, holds nothing of use, or a bad row is not to
    be skipped.
    """
    kind = readable(format)
    source = f"import-{format}"
    named = partial(feedback_of, annotator=annotator or source, sampler=sampler or source, seen=Seen())
    rows = read_rows(path, tabs=kind.tabs, watch=watch)
    reporting = None if report is None else _open(report)
    try:
        for row in rows if kind.gather is None else kind.gather(rows):
            found.rows += 1
            try:
                for item in _read(kind, row, named):
                    found.judgements += 1
                    yield item
            except BadRow as error:
                if on_bad_row == "error":
                    raise DataError(
                        f"{path}:{row.number}: {error}: mend or remove the row, or skip and count such rows "
                        "(--on-error skip; data.on_bad_row=skip in a run)"
                    ) from None
                found.skipped[str(error)] += 1
                if reporting:
                    reporting.write(json.dumps({"row": row.number, "problem": str(error)}) + "\n")
    finally:
        if reporting:
            counts = {"rows": found.rows, "judgements": found.judgements, "skipped": dict(found.skipped)}
            reporting.write(json.dumps(counts) + "\n")
            reporting.close()
    if not found.judgements:
        held = found.describe() if found.skipped else "it is empty"
        raise DataError(f"{path} holds no usable feedback in format '{format}' ({held}): is that its format?")


def export_feedback(
    path: Path, items: Iterable[Feedback], format: str, *, conversational: bool = False, watch: Watch = lambda _: None
) -> Written:
    """Writes feedback in a format; `watch` hears how many pieces are done. `DataError` where it cannot be done."""
    kind, written = writable(format), Written()
    write = kind.write
    assert write is not None, "a format that is only read"

    def rows() -> Iterator[dict[str, Any]]:
        once = set[str]()
        for number, item in enumerate(items, 1):
            watch(number)
            try:
                for row in write(item, conversational=conversational):
                    if kind.once:
                        digest = digest_of(row)
                        if digest in once:
                            continue
                        once.add(digest)
                    yield row
            except Unsayable as error:
                written.left_out[str(error)] += 1

    written.rows = write_rows(path, rows())
    return written


def readable(format: str) -> Format:
    """The format of that name; `DataError` where there is none that can be read."""
    return _known(format, [name for name, kind in FORMATS.items() if kind.read])


def writable(format: str) -> Format:
    """The same of those that can be written."""
    return _known(format, [name for name, kind in FORMATS.items() if kind.write])


def _known(format: str, names: list[str]) -> Format:
    if format not in names:
        raise DataError(f"no format '{format}' here; there are {', '.join(names)}")
    return FORMATS[format]


def _read(kind: Format, row: Row, named: Callable[[Judged], Feedback]) -> list[Feedback]:
    """All of a row's judgements, or none."""
    if row.problem is not None:
        raise BadRow(row.problem)
    assert kind.read is not None, "a format that is only written"
    try:
        found = kind.read(row.value)
    except ValidationError as error:  # a rating, a ranking or a comment that cannot be
        raise BadRow(explain(error)) from None
    return [named(item) if isinstance(item, Judged) else item for item in found]


def _open(report: Path) -> IO[str]:
    try:
        return report.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the report {report}: {error.strerror}") from None
