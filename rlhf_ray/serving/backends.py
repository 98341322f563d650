"""What the door's routes ask of the parts behind it, and the messages that go between.

The parts are plain classes, which a test calls in its own process; under Ray Serve, `handles.py` gives deployments the
same faces.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar

from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.requests import Receipt, RequestKey, Submission
from rlhf_ray.feedback.schema import Feedback, Kind
from rlhf_ray.feedback.store import FeedbackStore, Page
from rlhf_ray.types import FinishReason, Message

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One request for answers. Exactly one of `messages` and `prompt` is given.

    Example: `GenerateCall(id="chatcmpl-1", messages=(Message("user", "Hi"),), max_tokens=16)`
    """

    id: str
    """Of the completion; answers are kept under it."""
    messages: tuple[Message, ...] | None = None
    """A dialogue, rendered by the policy's own chat template."""
    prompt: str | None = None
    """Plain text, continued as it is."""
    n: int = 1
    max_tokens: int | None = None
    """None: as many as the context holds, up to the service's limit."""
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """How many alternatives to give for each token; 0: the chosen token's own log-prob; None: none at all."""
    stream: bool = False
    """Deltas as tokens are drawn; otherwise one for each choice, when all are whole."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was sampled, its log-prob, and the likeliest tokens in its place."""

    token: str
    token_id: int
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice has grown by. The last of each choice carries `finish_reason`."""

    index: int
    """Which of the `n` choices."""
    policy_version: int
    """The version that makes this answer, the same from its first token to its last."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, whole."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """A prompt with one answer, to be scored."""

    messages: tuple[Message, ...]
    completion: str


@dataclass(frozen=True, slots=True)
class Scores:
    """A reward for each item, in their order, all from one version of the reward model."""

    version: int
    model: str
    rewards: tuple[float, ...]
    spreads: tuple[float, ...] = ()
    """How unsure it is of each; empty where it cannot say."""
    strange: tuple[bool, ...] = ()
    """Whether each is unlike all that it has learnt from; empty where it cannot say."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that answers now, as `/v1/models` shows it."""

    id: str
    """The name that a request may give as `model`."""
    kind: str
    """`policy` or `reward_model`."""
    version: int
    sha256: str
    created: int
    """Seconds since 1970."""
    lineage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a part can do its work now; `detail` says what is missing or what it holds."""

    ready: bool
    detail: str


class PolicyBackend(Protocol):
    """Whoever answers prompts."""

    def generate(self, request: GenerateCall, /) -> AsyncIterator[Delta]:
        """The answers as they grow, the choices interleaved."""


class RewardBackend(Protocol):
    """Whoever scores answers."""

    async def score(self, items: Sequence[ScoreItem], /) -> Scores:
        """One reward an item."""

    async def ready(self) -> Readiness:
        """Whether it can score."""


class RecordsBackend(Protocol):
    """The one writer of feedback and of kept completions. `ApiError` from any of them goes to the caller as it is."""

    async def add_feedback(self, submission: Submission, /) -> Receipt:
        """Returns after a durable commit, or with what was answered when the same key came first."""

    async def answered(self, key: RequestKey | None, /) -> Receipt | None:
        """What a request of this key was answered with, None where it is new."""

    async def keep_completion(self, completion: Completion, /) -> None:
        """Keeps a served answer under its id, so that feedback can name it."""

    async def completion(self, id: str, /) -> Completion | None:
        """A kept answer, None where there is none under this id."""

    async def feedback(self, id: str, /) -> Feedback | None:
        """One judgement, None where there is none under this id."""

    async def page(self, cursor: int, limit: int, /, *, kind: Kind | None = None, annotator: str | None = None) -> Page:
        """Feedback in the order in which it was added, from a cursor on."""

    async def purge_completions(
        self, *, ids: list[str] | None = None, caller: str | None = None, before: datetime | None = None
    ) -> int:
        """Removes kept answers that fit all that is given; how many."""

    async def ask(self, question: Callable[[FeedbackStore], T], /) -> T:
        """What a function makes of the store: one that can be named from another process, as `functools.partial` of
        one of a module."""

    async def ready(self) -> Readiness:
        """Whether the store can be written."""


class VersionsBackend(Protocol):
    """Whoever knows which versions are served."""

    async def models(self) -> list[ModelInfo]:
        """The versions that answer now."""

    async def ready(self) -> Readiness:
        """Whether each replica holds the version that it should."""
