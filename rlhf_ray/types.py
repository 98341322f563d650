"""The messages that the parts hand each other: frozen, typed, free of torch, Ray and vLLM.

The words are the project's words; docs and code use them with no other meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue.

    Example: `Message("user", "My blue lamp arrived broken.")`
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy answers: a dialogue that ends with the user's turn.

    Example: `Prompt("p17", (Message("user", "My blue lamp arrived broken."),), group="p17")`
    """

    id: str
    """Stable name, unique in a data set."""
    messages: tuple[Message, ...]
    """The turns so far, oldest first."""
    group: str
    """Prompts of one group never lie on both sides of a split (HH-RLHF: the first turn's text, hashed)."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt with one answer in text: what a demonstration is, what a reward model reads and people judge."""

    prompt: Prompt
    response: str
    reward: float | None = None
    """What an environment gave the whole dialogue; None where there is none, or it leaves that to others."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a generator draws tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides the end token."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One rollout that is wanted, and how it is drawn.

    Example: `GenerationRequest("laptop/3/p17/0", "p17", (1, 40, 7), seed=8123)`
    """

    rollout_id: str
    """`run/step/prompt/sample`."""
    prompt_id: str
    prompt_ids: tuple[int, ...]
    """The prompt in the policy's tokens, chat template applied. P of them."""
    seed: int
    """Derives from the rollout's identity, so that a redone rollout draws the same numbers."""
    sampling: Sampling = Sampling()


class Span(NamedTuple):
    """Where in a response tokens of one weights step begin."""

    start: int
    """Index of the first of them; they go on to the next span, or to the end."""
    weights_step: int


class Inserted(NamedTuple):
    """Tokens between two of the policy's own, which it read and did not choose: what an environment said."""

    before: int
    """Index, among the policy's own tokens, of the one that they stand before."""
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt with one sampled response, and how it came to be.

    Of a dialogue of several turns the response is all that the policy said, and `inserted` what it heard in between.
    """

    id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    """(P)"""
    response_ids: tuple[int, ...]
    """(T) the policy's own tokens; the last is the end token, or another that ends it, if it is finished."""
    logprobs: tuple[float, ...]
    """(T) behaviour log-probs: of the distribution sampled from, after temperature and top-p."""
    weights_step: int
    """The learner's weights step that sampled it; its first token, where weights were swapped under way."""
    finish_reason: FinishReason
    swaps: tuple[Span, ...] = ()
    """Where newer weights took over; empty where one step sampled it all."""

    inserted: tuple[Inserted, ...] = ()

    @property
    def last_step(self) -> int:
        """The weights step that sampled its last token."""
        return self.swaps[-1].weights_step if self.swaps else self.weights_step


@dataclass(frozen=True, slots=True)
class Scored:
    """Rollouts with the number that each was given, in one order."""

    rollouts: Sequence[Rollout]
    scores: Sequence[float]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a batch of exchanges earned, in their order."""

    rewards: Sequence[float | None]
    """The weighted sum of all sources; None where one of them had none to give."""
    by_source: Mapping[str, Sequence[float | None]]
    spreads: Mapping[str, Sequence[float]]
    """Standard deviation over an ensemble's members, by source."""
    counts: Mapping[str, int]
    """What went wrong on the way: `judge/timeouts`, ..."""
    strange: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    """Whether an answer is unlike all that a reward model has learnt from, by source."""


@dataclass(frozen=True, slots=True)
class WeightsReceipt:
    """A generator's proof of what it loaded."""

    weights_step: int
    sha256: str
    """Over what was received."""
    seconds: float
