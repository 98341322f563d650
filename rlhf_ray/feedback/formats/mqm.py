"""Translators' error marks: MQM (multidimensional quality metrics) as the WMT publishes it, a table with tabs.

A row is an error that a rater marked in one version of a segment, or says that there was none. A version's penalty is
the sum of its errors' weights (Freitag et al. 2021, arXiv:2104.14478, section 3); it becomes a rating in points, minus
the penalty, and each error a comment. Marks around an error lie in the text itself, in rows with an error alone: they
are taken out, or a model would learn to read them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

from rlhf_ray.feedback.formats.judged import Judged, Said, name_of, prompt_of, text_of
from rlhf_ray.feedback.formats.rows import BadRow, Row
from rlhf_ray.feedback.schema import Comment, Rating
from rlhf_ray.types import Message

MARK = re.compile(r"</?v>")
MARKED = re.compile(r"<v>(.*?)</v>", re.DOTALL)
VERSION = ("system", "doc", "seg_id", "rater")
"""What the rows of one version share."""
MAJOR, NON_TRANSLATION, MINOR, PUNCTUATION = 5.0, 25.0, 1.0, 0.1
NO_ERROR = "no-error"


def gather(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of each version as one, numbered by its first; they follow each other in the file."""

    def version(row: Row) -> tuple[Any, ...]:
        return tuple(row.value.get(key) for key in VERSION) if row.problem is None else (row.number,)

    for _, group in groupby(rows, key=version):
        marks = list(group)
        first = marks[0]
        yield first if first.problem else Row(first.number, {"marks": [mark.value for mark in marks]})


def read_mqm(row: Mapping[str, Any]) -> list[Judged]:
    """A rating of the version, and a comment for each error."""
    marks: list[dict[str, Any]] = row["marks"]
    first = marks[0]
    source, target = (MARK.sub("", text_of(first, key)) for key in ("source", "target"))
    if any(
        MARK.sub("", str(mark.get(key))) != text
        for mark in marks
        for key, text in (("source", source), ("target", target))
    ):
        raise BadRow("the rows of one version differ in their texts")
    about = (Said(target, name_of(first, "system")),)
    messages = prompt_of((Message("user", source),))
    judged = partial(Judged, messages, about, annotator=name_of(first, "rater"), group=name_of(first, "doc"))
    penalty = sum(weight_of(mark) for mark in marks)
    rating = Rating(value=-penalty if penalty else 0.0, scale="points", high=0.0)
    errors = [mark for mark in marks if str(mark.get("severity")).lower() != NO_ERROR]
    return [judged(rating), *(judged(Comment(text=remark_of(mark))) for mark in errors)]


def weight_of(mark: Mapping[str, Any]) -> float:
    """What an error takes away."""
    severity, category = str(mark.get("severity")).lower(), str(mark.get("category")).lower()
    match severity:
        case "major":
            return NON_TRANSLATION if category.startswith("non-translation") else MAJOR
        case "minor":
            return PUNCTUATION if category == "fluency/punctuation" else MINOR
        case "no-error" | "neutral":
            return 0.0
    raise BadRow("an error of no known severity")


def remark_of(mark: Mapping[str, Any]) -> str:
    """An error in words: how bad, what kind, where, and what the rater wrote."""
    spans = MARKED.findall(str(mark.get("target"))) or MARKED.findall(str(mark.get("source")))
    where = f": {spans[0].strip()}" if spans and spans[0].strip() else ""
    note = str(mark.get("comment") or "").strip()
    return f"{mark.get('severity')} {mark.get('category')}{where}" + (f" ({note})" if note else "")
