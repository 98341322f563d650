"""The shape of one piece of feedback: a rating, a ranking or a comment, with where it came from.

Everything here is checked when it is made, so what lies in a store can be trained on without looking again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import permutations
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictInt,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from rlhf_ray.errors import FeedbackError
from rlhf_ray.types import Message, Prompt

Kind = Literal["rating", "ranking", "comment"]
Scale = Literal["stars", "thumb", "points"]
NextBy = Literal["random", "newest", "disagreement"]
"""What people are asked next: anything; answers of the newest policy; what reward models disagree on most."""
MAX_ANSWERS = 16
MAX_TEXT = 100_000
MAX_COMMENT = 8_000


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty: leave it out or give one with words in it")
    return text


def is_unicode(text: str) -> bool:
    """False for half a character (a lone surrogate), which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


def new_id() -> str:
    """A name that nothing else has."""
    return uuid4().hex


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def iso(moment: datetime) -> str:
    """A moment in UTC as text that sorts as time does."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_not_blank)]
Label = Annotated[str, Field(max_length=200), AfterValidator(_not_blank)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Moment = Annotated[AwareDatetime, AfterValidator(_as_utc)]


class Record(BaseModel):
    """A shape that is checked when it is made, takes no field that it does not know, and stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Answer(Record):
    """One answer that was shown, and who sampled it and how."""

    text: Text
    sampler: Label
    """A name such as `base-policy`, `ppo` or `human`; statistics are kept by it."""
    sampling: dict[str, JsonValue] | None = None
    """Temperature, top-p, seed and the like; None where they are not known."""
    policy_version: Annotated[int, Field(ge=0)] | None = None
    """The published policy that made it, where one did."""
    completion_id: Label | None = None
    """The served completion that it was, where it was one."""

    @field_validator("sampling")
    @classmethod
    def _storable(cls, sampling: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            canonical_json(sampling).encode()
        except ValueError:
            raise ValueError("sampling holds a number or a text that JSON cannot carry: leave it out") from None
        return sampling


class Rating(Record):
    """A number for one answer, the more the better: 1 to 5 (`stars`), a thumb, 0 or 1, or `points` on another scale."""

    value: Number
    scale: Scale = "stars"
    aspect: Label = "overall"
    """What was rated; `overall` unless the annotator was asked about something narrower."""
    low: Number | None = None
    """The least that could be given, in points; None where there is no least."""
    high: Number | None = None
    """The most."""

    @model_validator(mode="after")
    def _possible(self) -> "Rating":
        if self.scale == "thumb" and self.value not in (0, 1):
            raise ValueError(f"a thumb is 0 (down) or 1 (up), got {self.value:g}")
        if self.scale == "stars" and not 1 <= self.value <= 5:
            raise ValueError(f"a rating lies between 1 and 5, got {self.value:g}")
        if self.scale != "points" and (self.low, self.high) != (None, None):
            raise ValueError(f"low and high belong to points: {self.scale} have their own")
        low, high = self.low, self.high
        if (low is not None and self.value < low) or (high is not None and self.value > high):
            raise ValueError(f"a rating between {low} and {high}, got {self.value:g}")
        return self


class Ranking(Record):
    """Answers in order of preference: `ranks[i]` is the place of `answers[i]`, 1 the best.

    Ties share a place and use up the next ones, as in sport: `(1, 2, 2, 4)`.
    """

    ranks: tuple[StrictInt, ...]
    strength: Annotated[Number, Field(ge=0)] | None = None
    """How much better the first of two is, on the annotator's own scale; None where nobody said."""
    all_bad: Literal[True] | None = None
    """True where the annotator said that none of them will do."""

    @model_validator(mode="after")
    def _is_a_ranking(self) -> "Ranking":
        check_ranks(self.ranks)
        return self


class Comment(Record):
    """What the annotator wrote, in their words."""

    text: Annotated[str, Field(max_length=MAX_COMMENT), AfterValidator(_not_blank)]


class Feedback(Record):
    """One judgement by one annotator: exactly one of rating (of one answer), ranking (of two or more) or comment.

    Example: `Feedback(messages=(Message("user", "Hi"),), prompt_id="p1", group="p1", annotator="ann-3",
    answers=(Answer(text="Hello!", sampler="base-policy"),), rating=Rating(value=4))`
    """

    id: Id = Field(default_factory=new_id)
    """Unique in a store. Who may have to send twice gives their own: the same judgement is then kept once."""
    messages: tuple[Message, ...]
    """The dialogue that was answered, oldest turn first, the user's last."""
    prompt_id: Label
    group: Label
    """Feedback of one group never lies on both sides of a split."""
    answers: tuple[Answer, ...]
    """1 to 16."""
    rating: Rating | None = None
    ranking: Ranking | None = None
    comment: Comment | None = None
    annotator: Label
    display_order: tuple[StrictInt, ...] | None = None
    """Indices into `answers` in the order in which the annotator saw them; None where nobody noted it."""
    seconds: Annotated[Number, Field(ge=0)] | None = None
    """From when the answers were shown to when the judgement was made; None where nobody noted it."""
    created_at: Moment = Field(default_factory=now)
    """UTC."""

    @property
    def prompt(self) -> Prompt:
        """The dialogue with its name and group, as the other parts pass it on."""
        return Prompt(self.prompt_id, self.messages, self.group)

    @property
    def kind(self) -> Kind:
        """Which of the three it is."""
        return "rating" if self.rating else "ranking" if self.ranking else "comment"

    @property
    def preferences(self) -> list[tuple[Answer, Answer]]:
        """(better, worse) of every two answers that a ranking tells apart: k(k-1)/2 of k answers without ties.

        None where two say the same, whatever their ranks: nothing can be learnt from them.
        """
        placed = zip(self.answers, self.ranking.ranks, strict=True) if self.ranking else ()
        return [
            (better, worse)
            for (better, high), (worse, low) in permutations(placed, 2)
            if high < low and better.text != worse.text
        ]

    @field_serializer("created_at")
    def _iso(self, moment: datetime) -> str:
        return iso(moment)

    @model_validator(mode="after")
    def _one_judgement(self) -> "Feedback":
        given = [kind for kind in ("rating", "ranking", "comment") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of rating, ranking or comment, got {', '.join(given) or 'none'}")
        shown = len(self.answers)
        if not 1 <= shown <= MAX_ANSWERS:
            raise ValueError(f"{shown} answers: give 1 to {MAX_ANSWERS}")
        if self.rating and shown != 1:
            raise ValueError(f"a rating judges one answer, got {shown}: send one rating an answer, or a ranking")
        if self.ranking and len(self.ranking.ranks) != shown:
            raise ValueError(f"{len(self.ranking.ranks)} ranks for {shown} answers: give one rank an answer")
        return self

    @model_validator(mode="after")
    def _shown_as_said(self) -> "Feedback":
        check_dialogue(self.messages)
        if self.display_order is not None and sorted(self.display_order) != list(range(len(self.answers))):
            raise ValueError(
                f"display_order {list(self.display_order)} has to name each of {len(self.answers)} answers once, from 0"
            )
        return self


def check_dialogue(messages: Sequence[Message]) -> None:
    """`ValueError` for what nobody can have answered."""
    if not messages or any(not message.content.strip() for message in messages):
        raise ValueError("the prompt, or a turn of it, is empty: leave it out")
    if not all(is_unicode(message.content) for message in messages):
        raise ValueError("a turn of the prompt is not valid Unicode: mend its encoding")
    if messages[-1].role != "user":
        raise ValueError(f"the prompt ends with the {messages[-1].role}'s turn: it has to end with the user's")


def check_ranks(ranks: tuple[int, ...]) -> None:
    """`ValueError` for places that no order has."""
    if len(ranks) < 2:
        raise ValueError(f"{len(ranks)} ranks: a ranking takes at least two answers")
    wanted = competition_ranks([-float(rank) for rank in ranks])
    if ranks != wanted:
        raise ValueError(f"ranks {list(ranks)} leave places out: this order is written {list(wanted)}")


def competition_ranks(scores: list[float]) -> tuple[int, ...]:
    """Ranks from scores, the highest first, ties sharing a place: `[3, 9, 9] -> (3, 1, 1)`."""
    place: dict[float, int] = {}
    for position, score in enumerate(sorted(scores, reverse=True), start=1):
        place.setdefault(score, position)
    return tuple(place[score] for score in scores)


def names_of(messages: Sequence[Message]) -> tuple[str, str]:
    """The names of a prompt and of its group, by what it says: equal dialogues are one prompt, those that the user
    began alike one group. What the system says first, all may share.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    opening = next((turn for turn in turns if turn["role"] == "user"), None)
    return digest_of(turns), digest_of([opening] if opening else turns[:1])


def digest_of(value: Any) -> str:
    """A short name of a JSON value: 64 bits of its SHA-256."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def canonical_json(value: Any) -> str:
    """The one way of writing a value as JSON: keys sorted, no spaces, UTF-8 kept. Hashes are over this text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def to_json(feedback: Feedback) -> str:
    """Feedback as canonical JSON, fields without a value left out."""
    return canonical_json(feedback.model_dump(exclude_none=True))


def parse_feedback(row: Mapping[str, Any] | str) -> Feedback:
    """Feedback from a mapping or from JSON text; `FeedbackError` with the field at fault in one line."""
    try:
        if isinstance(row, str):
            return Feedback.model_validate_json(row)
        return Feedback.model_validate(row)
    except ValidationError as error:
        raise FeedbackError(f"feedback is refused: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """What is wrong, field by field, in one line and without people's words."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        # Numbers are shown, people's words are not: error messages end up in logs.
        got = f", got {item['input']!r}" if isinstance(item["input"], int | float) else ""
        problems.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(problems)
