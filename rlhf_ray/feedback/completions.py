"""Served answers that are kept for a while, so that feedback can name them by id.

They are data with an end, not a log: removed after the days that the service keeps them, by id, or by caller.
Feedback that names one carries the answer's text in its own row and outlives it.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from sqlalchemy import ColumnElement, Connection, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.schema import MAX_TEXT, Label, Moment, canonical_json, iso, now
from rlhf_ray.feedback.tables import completions
from rlhf_ray.types import Message


class Completion(BaseModel):
    """One served request: what was asked, the answers that were given, and what made them.

    Example: `Completion(id="chatcmpl-7", model="policy", policy_version=3, caller="key-1",
    messages=(Message("user", "Hi"),), answers=("Hello!",), sampling={"temperature": 0.7})`
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: Label
    created_at: Moment = Field(default_factory=now)
    model: Label
    policy_version: Annotated[int, Field(ge=0)]
    messages: tuple[Message, ...] | None = None
    """The dialogue that was answered; None for a plain prompt."""
    prompt: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    """The plain prompt that was continued; None for a dialogue."""
    answers: tuple[Annotated[str, Field(max_length=MAX_TEXT)], ...]
    """The text of each choice, by its index."""
    sampling: dict[str, JsonValue] | None = None
    caller: Label
    """The id of the key that asked."""

    @property
    def dialogue(self) -> tuple[Message, ...]:
        """What was answered, as turns: a plain prompt is the user's one turn."""
        return self.messages if self.messages is not None else (Message("user", self.prompt or ""),)

    def answer(self, index: int) -> dict[str, Any]:
        """The fields of an `Answer` for one choice; `FeedbackError` where there is none of that index."""
        if not 0 <= index < len(self.answers):
            raise FeedbackError(f"choice {index} of completion '{self.id}': there are {len(self.answers)}, from 0")
        return {
            "text": self.answers[index],
            "sampler": self.model,
            "sampling": self.sampling,
            "policy_version": self.policy_version,
            "completion_id": self.id,
        }


def keep(connection: Connection, kept: Sequence[Completion]) -> None:
    """Write them; one that is there already stays as it is."""
    rows = [
        {
            "id": completion.id,
            "caller": completion.caller,
            "created_at": iso(completion.created_at),
            "body": canonical_json(completion.model_dump(mode="json", exclude_none=True)),
        }
        for completion in kept
    ]
    if rows:
        new = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        connection.execute(new(completions).on_conflict_do_nothing(), rows)


def find(connection: Connection, id_: str) -> Completion | None:
    """The completion of that id, None where it never was or is gone."""
    body = connection.execute(select(completions.c.body).where(completions.c.id == id_)).scalar()
    return None if body is None else Completion.model_validate_json(body)


def purge(
    connection: Connection,
    *,
    ids: Iterable[str] | None = None,
    caller: str | None = None,
    before: datetime | None = None,
) -> int:
    """Remove what fits everything that is given, and something must be; how many went."""
    conditions: list[ColumnElement[bool]] = []
    if ids is not None:
        conditions.append(completions.c.id.in_(list(ids)))
    if caller is not None:
        conditions.append(completions.c.caller == caller)
    if before is not None:
        conditions.append(completions.c.created_at < iso(before))
    if not conditions:
        raise FeedbackError("purge of everything is not offered: name ids, a caller or a time")
    gone: int = connection.execute(delete(completions).where(*conditions)).rowcount
    return gone
