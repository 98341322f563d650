"""A small client for people's programs: send feedback, read it back, ask for rewards.

    with Client("http://127.0.0.1:8000", key="rlhf_...") as client:
        client.rate("chatcmpl-8c1f", 4)
        for item in client.feedback():
            print(item.kind, item.annotator)

What the service refuses for the moment, and what gets lost on the way, is sent again until a deadline; each piece of
feedback has a key of its own, so that it is kept once however often it is sent. For answers use any OpenAI client.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn
from uuid import uuid4

import httpx

from rlhf_ray.errors import InfrastructureError, InputError
from rlhf_ray.feedback.schema import Feedback, Kind, parse_feedback

AGAIN = frozenset({408, 429, 502, 503, 504})
"""Statuses that are worth another try. 409 is one, too, while the first try of a key is under way."""
IN_FLIGHT = "idempotency_key_in_flight"
LONGEST_WAIT_S = 8.0

Turns = Sequence[Mapping[str, str]]


class Refused(InputError):
    """The service said no, and would again. `str` of it is the service's own words."""

    def __init__(self, message: str, *, status: int, type: str, param: str | None, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        """The field at fault, where one is."""
        self.code = code


class NotAllowed(Refused):
    """The key is missing, unknown, revoked (401), or its role may not do this (403)."""


class NotFound(Refused):
    """No such completion or feedback."""


class KeyReused(Refused):
    """The idempotency key came with another request before (422)."""


class Unavailable(InfrastructureError):
    """The service did not do it before the deadline; feedback may be sent again under the same idempotency key."""


KINDS: dict[int, type[Refused]] = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 422: KeyReused}


@dataclass(frozen=True, slots=True)
class Added:
    """Feedback that is on the service's disk."""

    ids: tuple[str, ...]
    """One a judgement."""
    replayed: bool
    """It was there before: an earlier try had arrived."""

    @property
    def id(self) -> str:
        """Of the first judgement."""
        return self.ids[0]


@dataclass(frozen=True, slots=True)
class Rewards:
    """A reward for each answer, and which reward model gave them."""

    rewards: tuple[float, ...]
    model: str
    version: int


class Client:
    """Talks to one service; safe to share between threads. Close it, or use it in a `with`.

    `deadline_s` bounds a call with all its tries, `timeout_s` one try. `http` replaces the connection, in tests.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        deadline_s: float = 30,
        timeout_s: float = 10,
        http: httpx.Client | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._deadline_s = deadline_s
        self._timeout_s = timeout_s
        self._http = http or httpx.Client()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def rate(self, completion_id: str, rating: float, *, index: int | None = None, **more: Any) -> Added:
        """Give a kept answer 1 to 5. `more`: `aspect`, `comment`, `annotator`, `idempotency_key`."""
        return self.send(completion_id=completion_id, rating=rating, index=index, **more)

    def thumb(self, completion_id: str, up: bool, *, index: int | None = None, **more: Any) -> Added:
        """Give a kept answer a thumb up or down."""
        return self.send(completion_id=completion_id, thumb=up, index=index, **more)

    def comment(self, completion_id: str, text: str, *, index: int | None = None, **more: Any) -> Added:
        """Say something about a kept answer, or about all of its choices."""
        return self.send(completion_id=completion_id, comment=text, index=index, **more)

    def rank(
        self,
        ranking: Sequence[int],
        *,
        completion_id: str | None = None,
        prompt: str | None = None,
        messages: Turns | None = None,
        completions: Sequence[str | Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> Added:
        """Put answers in order: `ranking[i]` is the place of answer i, 1 the best, ties share one.

        The answers are those of a kept completion, or are brought along with their prompt.
        """
        return self.send(
            completion_id=completion_id,
            prompt=prompt,
            messages=messages,
            completions=completions,
            ranking=ranking,
            **more,
        )

    def send(self, *, idempotency_key: str | None = None, **fields: Any) -> Added:
        """Send one request of feedback as docs/http-api.md words it; returns once it is on the service's disk."""
        body = {name: value for name, value in fields.items() if value is not None}
        key = idempotency_key or uuid4().hex
        answer = self._call("POST", "/v1/feedback", json=body, headers={"Idempotency-Key": key})
        return Added(tuple(answer.json()["ids"]), answer.headers.get("Idempotency-Replayed") == "true")

    def feedback(
        self, *, kind: Kind | None = None, annotator: str | None = None, page: int = 100
    ) -> Iterator[Feedback]:
        """All feedback, oldest first, fetched page by page."""
        wanted = {"kind": kind, "annotator": annotator, "limit": page}
        query = {name: value for name, value in wanted.items() if value is not None}
        cursor, more = "0", True
        while more:
            found = self._call("GET", "/v1/feedback", params={**query, "cursor": cursor}).json()
            yield from map(parse_feedback, found["data"])
            cursor, more = found["next_cursor"], found["has_more"]

    def rewards(
        self, completions: Sequence[str], *, prompt: str | None = None, messages: Turns | None = None
    ) -> Rewards:
        """A reward for each answer to one prompt; only differences between them mean something."""
        fields = {"prompt": prompt, "messages": messages, "completions": completions}
        body = {name: value for name, value in fields.items() if value is not None}
        found = self._call("POST", "/v1/rewards", json=body).json()
        return Rewards(tuple(found["rewards"]), found["model"], found["version"])

    def _call(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **request: Any
    ) -> httpx.Response:
        """An answer of success, however many tries it takes before the deadline."""
        end = time.monotonic() + self._deadline_s
        tries = 0
        while True:
            tries += 1
            wait = random.uniform(0.5, 1) * min(LONGEST_WAIT_S, 0.1 * 2**tries)
            left = end - time.monotonic()
            try:
                answer = self._http.request(
                    method,
                    self._base_url + path,
                    headers={**self._headers, **(headers or {})},
                    timeout=max(0.01, min(self._timeout_s, left)),
                    **request,
                )
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    return answer
                problem = _again(answer)
                wait = max(wait, _asked_to_wait(answer))
            if time.monotonic() + wait >= end:
                raise Unavailable(f"{self._base_url}{path}: {problem} ({tries} tries in {self._deadline_s:g} s)")
            time.sleep(wait)


def _again(answer: httpx.Response) -> str:
    """What is wrong for the moment; `Refused` where it would be wrong again."""
    try:
        error = answer.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        error, message, code = {}, f"status {answer.status_code} without a reason: is this an rlhf-ray service?", None
    if answer.status_code in AGAIN or code == IN_FLIGHT:
        return f"{answer.status_code}, {message}"
    if answer.status_code >= 500:
        raise Unavailable(f"{answer.status_code}, {message}")
    _refuse(answer.status_code, message, error)


def _refuse(status: int, message: str, error: Mapping[str, Any]) -> NoReturn:
    kind = KINDS.get(status, Refused)
    type_ = str(error.get("type", "invalid_request_error"))
    raise kind(message, status=status, type=type_, param=error.get("param"), code=error.get("code"))


def _asked_to_wait(answer: httpx.Response) -> float:
    try:
        return float(answer.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0
