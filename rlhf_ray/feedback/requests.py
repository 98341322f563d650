"""Feedback as requests bring it: each is written once, however often it is sent.

A request's key and its rows are written in one transaction, so that a key stands exactly where its rows do.
Keys belong to their caller, and are kept for good: feedback is, too.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, tuple_

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.schema import Feedback, canonical_json
from rlhf_ray.feedback.tables import request_keys


class KeyReused(FeedbackError):
    """An idempotency key came again with another request."""


@dataclass(frozen=True, slots=True)
class RequestKey:
    """By which a repeated request is known.

    Example: `RequestKey("key-1", "a3f0", request_sha256(body))`
    """

    caller: str
    """The id of the API key that sent it: the same word from somebody else is another key."""
    key: str
    request_sha256: str


@dataclass(frozen=True, slots=True)
class Submission:
    """What one request brought: judgements that are written together or not at all."""

    items: tuple[Feedback, ...]
    answer: str
    """The body that the request is answered with, now and whenever it comes again."""
    key: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A durable submission's answer; `replayed` where the rows were there before."""

    answer: str
    replayed: bool = False


def request_sha256(body: Any) -> str:
    """Of a request's meaning: the order of its keys and its spaces do not count."""
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def known_answers(connection: Connection, keys: Sequence[RequestKey]) -> dict[tuple[str, str], tuple[str, str]]:
    """By (caller, key): the hash of the request that it came with, and the answer."""
    wanted = [(key.caller, key.key) for key in keys]
    columns = tuple_(request_keys.c.caller, request_keys.c.key)
    rows = connection.execute(select(request_keys).where(columns.in_(wanted))).all() if wanted else []
    return {(row.caller, row.key): (row.request_sha256, row.answer) for row in rows}


def remember(connection: Connection, submissions: Sequence[Submission]) -> None:
    """Write the keys of submissions that are written in this transaction."""
    rows = [
        {
            "caller": submission.key.caller,
            "key": submission.key.key,
            "request_sha256": submission.key.request_sha256,
            "answer": submission.answer,
        }
        for submission in submissions
        if submission.key
    ]
    if rows:
        connection.execute(insert(request_keys), rows)


def replay(key: RequestKey, known: tuple[str, str]) -> Receipt | KeyReused:
    """The first answer again, where the request is the same."""
    sha256, answer = known
    if sha256 == key.request_sha256:
        return Receipt(answer, replayed=True)
    return KeyReused("this Idempotency-Key came with another request before: use a new key for a new request")
