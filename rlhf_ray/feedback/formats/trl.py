"""TRL's dataset types: preference (its prompt explicit or implicit), unpaired, prompt-only and prompt-completion, each
as plain text or as turns of a chat.
"""

from collections.abc import Mapping
from typing import Any

from rlhf_ray.feedback.formats.judged import (
    Judged,
    Said,
    Unsayable,
    answer_of,
    as_text,
    as_turns,
    choice,
    pairs_of,
    prompt_of,
    text_of,
    turns_of,
    usable,
)
from rlhf_ray.feedback.formats.rows import BadRow
from rlhf_ray.feedback.schema import Feedback, Rating
from rlhf_ray.types import Message

LIKED, DISLIKED = 3, 3
"""Stars above and below that count as a thumb."""


def read_preference(row: Mapping[str, Any]) -> list[Judged]:
    """`{prompt, chosen, rejected}`, or `{chosen, rejected}` that begin alike."""
    if "prompt" not in row:
        return [_implicit(row)]
    messages = _prompt(row)
    chosen, rejected = (Said(_answer(row, key)) for key in ("chosen", "rejected"))
    return [choice(messages, chosen, rejected)]


def read_unpaired(row: Mapping[str, Any]) -> list[Judged]:
    """`{prompt, completion, label}`: a thumb up or down."""
    label = row.get("label")
    if not isinstance(label, bool):
        raise BadRow("no true or false under 'label'")
    return [Judged(_prompt(row), (Said(_answer(row, "completion")),), Rating(value=float(label), scale="thumb"))]


def write_preference(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """A row for every two answers that are told apart."""
    prompt = _prompt_row(feedback, conversational)
    answers = [
        (_answer_row(good, conversational), _answer_row(bad, conversational)) for good, bad in pairs_of(feedback)
    ]
    return [{"prompt": prompt, "chosen": good, "rejected": bad} for good, bad in answers]


def write_implicit(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """The same with the prompt at the beginning of both."""
    return [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in write_preference(feedback, conversational=conversational)
    ]


def write_unpaired(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """Thumbs, and stars that are plainly one of them: 4 and 5, or 1 and 2."""
    row = _completion_row(feedback, conversational)
    rating = feedback.rating
    if rating is None or rating.scale == "points":
        raise Unsayable("neither a thumb nor stars")
    if rating.scale == "stars" and DISLIKED <= rating.value <= LIKED:
        raise Unsayable("three stars are neither up nor down")
    return [row | {"label": rating.value > LIKED if rating.scale == "stars" else bool(rating.value)}]


def write_prompt(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """The prompt alone."""
    return [{"prompt": _prompt_row(feedback, conversational)}]


def write_completion(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """The answer that was liked best: first in its ranking and no other with it, a thumb up, four stars or more."""
    prompt = _prompt_row(feedback, conversational)
    if feedback.ranking is not None:
        best = [answer for answer, rank in zip(feedback.answers, feedback.ranking.ranks, strict=True) if rank == 1]
        if len(best) > 1 or feedback.ranking.all_bad:
            raise Unsayable("no answer that was liked best")
        return [{"prompt": prompt, "completion": _answer_row(best[0].text, conversational)}]
    row = write_unpaired(feedback, conversational=conversational)[0]
    if not row.pop("label"):
        raise Unsayable("an answer that was not liked")
    return [row]


def _implicit(row: Mapping[str, Any]) -> Judged:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list):
        said = turns_of(chosen, "chosen"), turns_of(rejected, "rejected")
        if not all(said) or said[0][:-1] != said[1][:-1]:
            raise BadRow("the two dialogues differ before the last answer")
        answers = [answer_of(turns[-1:], name) for turns, name in zip(said, ("chosen", "rejected"), strict=True)]
        return choice(prompt_of(said[0][:-1]), *map(Said, answers))
    texts = text_of(row, "chosen"), text_of(row, "rejected")
    alike = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    prompt = texts[0][:alike]
    if prompt.endswith(" "):  # it belongs to the answers
        prompt = prompt[:-1]
    answers = [
        usable(text[len(prompt) :], f"{name} answer") for text, name in zip(texts, ("chosen", "rejected"), strict=True)
    ]
    return choice(prompt_of((Message("user", prompt),)), *map(Said, answers))


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    prompt = row.get("prompt")
    return prompt_of(
        turns_of(prompt, "prompt") if isinstance(prompt, list) else (Message("user", text_of(row, "prompt")),)
    )


def _answer(row: Mapping[str, Any], key: str) -> str:
    answer = row.get(key)
    if isinstance(answer, list):
        return answer_of(turns_of(answer, key), key)
    if not isinstance(answer, str):
        raise BadRow(f"no text under '{key}'")
    return usable(answer, f"{key} answer")


def _prompt_row(feedback: Feedback, conversational: bool) -> Any:
    return as_turns(feedback.messages) if conversational else as_text(feedback)


def _answer_row(text: str, conversational: bool) -> Any:
    return [{"role": "assistant", "content": text}] if conversational else text


def _completion_row(feedback: Feedback, conversational: bool) -> dict[str, Any]:
    if len(feedback.answers) != 1:
        raise Unsayable("not about one answer")
    answer = _answer_row(feedback.answers[0].text, conversational)
    return {"prompt": _prompt_row(feedback, conversational), "completion": answer}
