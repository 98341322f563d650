"""What somebody says of answers, as requests word it, and as the store keeps it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictInt, model_validator

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.schema import MAX_ANSWERS, MAX_COMMENT, MAX_TEXT, Feedback, names_of, parse_feedback
from rlhf_ray.types import Message, Role

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Stars = Annotated[float, Field(strict=True, ge=1, le=5, allow_inf_nan=False)]


class Closed(BaseModel):
    """A shape that takes no field that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Turn(Closed):
    """One turn of a dialogue."""

    role: Role
    content: Text


class BroughtAnswer(Closed):
    """An answer that the service did not give, or does not keep any more."""

    text: Text
    sampler: Name = "external"
    """Who or what wrote it; statistics are kept by this name."""
    sampling: dict[str, JsonValue] | None = None
    """Temperature and the like, where they are known."""
    policy_version: Annotated[StrictInt, Field(ge=0)] | None = None


class Subject(Closed):
    """What a request is about: a kept completion's answers (`completion_id`), or such as it brings along
    (`prompt` or `messages`, and `completions`)."""

    completion_id: Name | None = None
    """The id of a chat completion or completion that this service gave."""
    prompt: Text | None = None
    """What was answered; stands for one turn of the user's."""
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=1_000)] | None = None
    """The dialogue that was answered, the user's turn last."""
    completions: Annotated[tuple[Text | BroughtAnswer, ...], Field(min_length=1, max_length=MAX_ANSWERS)] | None = None
    """The answers, as texts or with what is known of where they come from."""

    @model_validator(mode="after")
    def _is_one(self) -> "Subject":
        brought = (self.prompt, self.messages, self.completions)
        if self.completion_id is not None:
            if any(value is not None for value in brought):
                raise ValueError("completion_id stands for prompt and answers: leave prompt, messages, completions out")
        elif self.completions is None or (self.prompt is None) == (self.messages is None):
            raise ValueError("give a completion_id, or completions with either prompt or messages")
        return self


class Judgement(Closed):
    """What somebody thinks of one answer, or of several to one prompt: one thing or several at once."""

    index: Annotated[StrictInt, Field(ge=0)] | None = None
    """Which of several answers a rating or a thumb is about. A comment without it is about all of them."""
    rating: Stars | None = None
    """Of one answer, from 1 to 5."""
    aspect: Name = "overall"
    """What the rating or the thumb is about."""
    ratings: Annotated[dict[Name, Stars], Field(min_length=1, max_length=20)] | None = None
    """Of one answer by aspect: `{"helpfulness": 4, "honesty": 5}`."""
    thumb: Literal[0, 1] | StrictBool | None = None
    """Of one answer: 1 or true is up, 0 or false is down."""
    ranking: Annotated[tuple[StrictInt, ...], Field(min_length=2, max_length=MAX_ANSWERS)] | None = None
    """The place of each answer, 1 the best; ties share a place and use up the next: `[1, 2, 2, 4]`."""
    all_bad: Literal[True] | None = None
    """None of several answers will do; without a ranking they are equally bad."""
    comment: Annotated[str, Field(min_length=1, max_length=MAX_COMMENT)] | None = None
    """In one's own words, about one answer."""

    @model_validator(mode="after")
    def _says_something(self) -> "Judgement":
        if all(
            value is None for value in (self.rating, self.ratings, self.thumb, self.ranking, self.all_bad, self.comment)
        ):
            raise ValueError("nothing is said: give a rating, ratings, a thumb, a ranking, all_bad or a comment")
        if self.rating is not None and self.aspect in (self.ratings or {}):
            raise ValueError(f"{self.aspect} is rated twice: give it in rating or in ratings")
        return self

    def as_stored(self, order: tuple[int, ...]) -> "Judgement":
        """The same about answers that were shown in this order: places and index are those in store."""
        moved: dict[str, Any] = {}
        if self.index is not None and self.index < len(order):
            moved["index"] = order[self.index]
        if self.ranking is not None and len(self.ranking) == len(order):
            placed = dict(zip(order, self.ranking, strict=True))
            moved["ranking"] = tuple(placed[index] for index in range(len(order)))
        return self.model_copy(update=moved)


def shown(body: Subject, completion: Completion | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The prompt with its names, and the answers, as fields of `Feedback`."""
    if completion is not None:
        turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in completion.dialogue]
        answers = [completion.answer(index) for index in range(len(completion.answers))]
    else:
        assert body.completions is not None
        turns = [turn.model_dump() for turn in body.messages or (Turn(role="user", content=body.prompt or ""),)]
        answers = [
            (BroughtAnswer(text=answer) if isinstance(answer, str) else answer).model_dump()
            for answer in body.completions
        ]
    prompt_id, group = names_of([Message(turn["role"], turn["content"]) for turn in turns])
    return {"messages": turns, "prompt_id": prompt_id, "group": group}, answers


def feedback_of(
    said: Judgement,
    answers: list[dict[str, Any]],
    *,
    display_order: tuple[int, ...] | None,
    common: dict[str, Any],
) -> tuple[Feedback, ...]:
    """One piece of feedback a judgement, in the order rating, ratings, thumb, ranking, comment.

    `common` are the fields that all share. `FeedbackError` where what is said does not fit the answers.
    """
    several = {"answers": answers, "display_order": display_order}
    rows: list[dict[str, Any]] = []
    rated = {} if said.rating is None else {said.aspect: said.rating}
    for aspect, value in (rated | (said.ratings or {})).items():
        rows.append({"answers": _meant(said, answers), "rating": {"value": value, "aspect": aspect}})
    if said.thumb is not None:
        rating = {"value": int(said.thumb), "scale": "thumb", "aspect": said.aspect}
        rows.append({"answers": _meant(said, answers), "rating": rating})
    if said.ranking is not None or said.all_bad:
        if len(answers) == 1:
            raise FeedbackError("one answer cannot be ranked: give a rating or a thumb")
        ranks = said.ranking or (1,) * len(answers)
        rows.append(several | {"ranking": {"ranks": ranks, "all_bad": said.all_bad}})
    if said.comment is not None:
        about = several if said.index is None else {"answers": _meant(said, answers)}
        rows.append(about | {"comment": {"text": said.comment}})
    return tuple(parse_feedback(common | row) for row in rows)


def _meant(said: Judgement, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The one answer that a judgement of one answer is about."""
    if said.index is None and len(answers) > 1:
        raise FeedbackError(f"say which of the {len(answers)} answers is meant: give index, from 0")
    if said.index is not None and said.index >= len(answers):
        raise FeedbackError(f"index {said.index}: there are {len(answers)} answers, from 0")
    return [answers[said.index or 0]]
