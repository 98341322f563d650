"""What all formats share: a judgement as a file tells it, and how it becomes feedback."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.formats.rows import BadRow
from rlhf_ray.feedback.schema import (
    MAX_TEXT,
    Answer,
    Comment,
    Feedback,
    Ranking,
    Rating,
    digest_of,
    is_unicode,
    names_of,
    parse_feedback,
)
from rlhf_ray.types import Message, Role

ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


class Unsayable(ValueError):
    """Why a format has no words for a piece of feedback, to be counted."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer in a file, and who gave it where the file says so."""

    text: str
    sampler: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """One judgement as a file tells it; names are given to it by `feedback_of`."""

    messages: tuple[Message, ...]
    answers: tuple[Said, ...]
    what: Rating | Ranking | Comment
    annotator: str | None = None
    """None where the file does not say."""
    group: str | None = None
    """What must not lie on both sides of a split; by default the dialogue's beginning."""
    display_order: tuple[int, ...] | None = None
    created_at: datetime | None = None


def feedback_of(judged: Judged, *, annotator: str, sampler: str, seen: "Seen") -> Feedback:
    """The judgement with names: of its prompt by what it says, its own by all that it says.

    `annotator` and `sampler` stand in where the file names none. `BadRow` where it cannot be kept.
    """
    prompt_id, group = names_of(judged.messages)
    answers = [Answer(text=said.text, sampler=said.sampler or sampler) for said in judged.answers]
    who = judged.annotator or annotator
    what = {type(judged.what).__name__.lower(): judged.what.model_dump(exclude_none=True)}
    told = [who, prompt_id, [[answer.sampler, answer.text] for answer in answers], what]
    row: dict[str, Any] = {
        "id": f"import-{seen.name(digest_of(told))}",
        "messages": judged.messages,
        "prompt_id": prompt_id,
        "group": judged.group or group,
        "answers": [answer.model_dump(exclude_none=True) for answer in answers],
        "annotator": who,
        "display_order": judged.display_order,
        **what,
    }
    if judged.created_at is not None:
        row["created_at"] = judged.created_at
    try:
        return parse_feedback(row)
    except FeedbackError as error:
        raise BadRow(str(error).removeprefix("feedback is refused: ")) from None


class Seen:
    """Tells the same judgement from one made twice: the second of a file is another, a file read again brings none.

    Remembers eight bytes a judgement.
    """

    def __init__(self) -> None:
        self._once = set[int]()
        self._more = dict[int, int]()

    def name(self, digest: str) -> str:
        """The digest with how often it came."""
        key = int(digest, 16)
        if key not in self._once:
            self._once.add(key)
            return f"{digest}-1"
        self._more[key] = self._more.get(key, 1) + 1
        return f"{digest}-{self._more[key]}"


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A text with words in it."""
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"no text under '{key}'")
    return usable(value, f"'{key}'")


def usable(text: str, name: str) -> str:
    """The text as it is, where it can be kept."""
    if not is_unicode(text):
        raise BadRow(f"{name} is not valid Unicode")
    if not text.strip():
        raise BadRow(f"empty {name}")
    if len(text) > MAX_TEXT:
        raise BadRow(f"{name} above {MAX_TEXT:,} characters")
    return text


def number_of(row: Mapping[str, Any], key: str) -> float | None:
    """A number, also one written as text; None where there is none."""
    value = row.get(key)
    if value is None or value in ("", "N/A"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"no number under '{key}'") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise BadRow(f"no number under '{key}'")
    return number


def name_of(row: Mapping[str, Any], key: str) -> str | None:
    """Somebody's name, or number; None where there is none."""
    value = row.get(key)
    return str(value)[:200] if isinstance(value, str | int) and str(value).strip() else None


def turns_of(turns: Any, name: str) -> tuple[Message, ...]:
    """A list of `{role, content}`; content in parts, as multimodal chats have it, has to be text alone."""
    if not isinstance(turns, list):
        raise BadRow(f"no list of turns under '{name}'")
    messages = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow("a turn without a known role")
        content = turn.get("content")
        if isinstance(content, list):
            content = _text_parts(content)
        if not isinstance(content, str):
            raise BadRow("a turn without text")
        if not is_unicode(content):
            raise BadRow("a turn is not valid Unicode")
        messages.append(Message(ROLES[role], content))
    return tuple(messages)


def prompt_of(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Turns as a prompt: none empty, the user's last, those of one speaker in a row made one."""
    if not turns or turns[-1].role != "user":
        raise BadRow("the prompt does not end with the user's turn")
    if any(not turn.content.strip() for turn in turns):
        raise BadRow("empty turn in the prompt")
    merged: list[Message] = []
    for turn in turns:  # chat templates expect speakers to alternate
        if merged and merged[-1].role == turn.role:
            turn = replace(turn, content=f"{merged.pop().content}\n\n{turn.content}")
        merged.append(turn)
    return tuple(merged)


def answer_of(turns: Sequence[Message], name: str) -> str:
    """The one assistant turn that an answer is."""
    if len(turns) != 1 or turns[0].role != "assistant":
        raise BadRow(f"'{name}' is not one assistant turn")
    return usable(turns[0].content, f"{name} answer")


def choice(
    messages: tuple[Message, ...], chosen: Said, rejected: Said, *, strength: float | None = None, **more: Any
) -> Judged:
    """One answer preferred to another, in an order that says nothing about which it was."""
    if chosen.text == rejected.text:
        raise BadRow("the two answers are the same")
    answers = tuple(sorted((chosen, rejected), key=lambda said: digest_of(said.text)))
    ranks = (1, 2) if answers[0] is chosen else (2, 1)
    return Judged(messages, answers, Ranking(ranks=ranks, strength=strength), **more)


def pairs_of(feedback: Feedback) -> list[tuple[str, str]]:
    """(better, worse) of every two answers that a ranking tells apart."""
    if feedback.ranking is None:
        raise Unsayable(f"a {feedback.kind} compares nothing")
    if not feedback.preferences:
        raise Unsayable("a ranking that prefers none")
    return [(better.text, worse.text) for better, worse in feedback.preferences]


def as_turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Messages as chat datasets write them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def as_text(feedback: Feedback) -> str:
    """The prompt where it is one turn of the user's."""
    if len(feedback.messages) != 1:
        raise Unsayable("a dialogue of several turns needs --conversational")
    return feedback.messages[0].content


def _text_parts(parts: list[Any]) -> str | None:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return None if None in texts else re.sub(r"\A\s+|\s+\Z", "", "\n".join(map(str, texts)))
