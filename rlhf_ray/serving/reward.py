"""The reward model over HTTP.

| route | who | what |
|---|---|---|
| `POST /v1/rewards` | app, trainer, admin | a reward for each of several answers to one prompt |
| `POST /get_reward` | app, trainer, admin | the same as OpenRLHF's trainer asks for it |

Light to import: torch comes with the replica, not with the routes.
"""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import ConfigDict, Field, JsonValue, model_validator

from rlhf_ray.feedback.schema import MAX_TEXT
from rlhf_ray.serving.auth import role
from rlhf_ray.serving.backends import Readiness, RewardBackend, ScoreItem, Scores
from rlhf_ray.serving.batches import Batches, in_thread
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.judgements import Closed, Text, Turn
from rlhf_ray.serving.settings import ServiceConfig
from rlhf_ray.types import Exchange, Message, Prompt

if TYPE_CHECKING:
    from rlhf_ray.models.ensemble import Ensemble

MAX_QUERIES = 1_024

Answer = Annotated[str, Field(max_length=MAX_TEXT)]


class RewardReplica:
    """One reward model, with all its members, scoring what different requests ask together.

    Items without messages are texts that hold prompt and answer already. A batch is scored by one version whole, so
    that each answer's version is right while another is loaded.
    """

    def __init__(
        self,
        model: "Ensemble | Path",
        *,
        version: int,
        name: str = "reward-model",
        batch: int = 64,
        batch_wait_s: float = 0,
        queue: int = 1_024,
        deadline_s: float = 30,
        threads: int | None = None,
    ) -> None:
        self.name = name
        self._holding = (_loaded(model, threads), version)
        self._batches: Batches[Sequence[ScoreItem], Scores] = Batches(
            in_thread(self._score, "rewards"),
            name="the reward model",
            most=batch,
            limit=queue,
            deadline_s=deadline_s,
            linger_s=batch_wait_s,
        )

    @property
    def version(self) -> int:
        """Which version scores the next batch."""
        return self._holding[1]

    async def score(self, items: Sequence[ScoreItem], /) -> Scores:
        """One reward an item. `ApiError`: 500 for a score that is no number, 503 where too much waits."""
        if not items:
            return Scores(self.version, self.name, ())
        return await self._batches.submit(items, weight=len(items))

    async def score_each(self, requests: Sequence[Sequence[ScoreItem]], /) -> list[Scores | ApiError]:
        """What `score` gives each of several requests: one that fails leaves the others as they are."""
        outcomes = await asyncio.gather(*map(self.score, requests), return_exceptions=True)
        return [_told(outcome) for outcome in outcomes]

    async def load(self, folder: Path, version: int) -> None:
        """Score with another version from the next batch on; where it does not load, the old one stays."""
        self._holding = (await asyncio.to_thread(_loaded, folder, None), version)

    async def ready(self) -> Readiness:
        """What it holds."""
        return Readiness(True, f"{self.name} version {self.version}")

    async def close(self) -> None:
        """Finish what waits."""
        await self._batches.close()

    def _score(self, requests: list[Sequence[ScoreItem]]) -> list[Scores | Exception]:
        model, version = self._holding
        together = [item for items in requests for item in items]
        told = model.consider_texts([_text(model, item) for item in together], [item.messages for item in together])
        answers, start = [], 0
        for items in requests:
            mine = slice(start, start + len(items))
            start += len(items)
            answers.append(self._answer(version, told.rewards[mine], told.spreads[mine], told.strange[mine]))
        return answers

    def _answer(
        self, version: int, rewards: list[float], spreads: list[float], strange: list[bool]
    ) -> Scores | Exception:
        if not all(map(math.isfinite, rewards)):
            # A number would be trained on. There is none.
            return ApiError(500, f"reward model version {version} gave a score that is no number", code="not_finite")
        return Scores(version, self.name, tuple(rewards), tuple(spreads), tuple(strange))


def _told(outcome: Scores | BaseException) -> Scores | ApiError:
    if isinstance(outcome, Scores | ApiError):
        return outcome
    if isinstance(outcome, Exception):  # logged where it was caught; another process may not know its class
        return ApiError(500, "the reward model could not score this", code="not_scored")
    raise outcome


def _loaded(model: "Ensemble | Path", threads: int | None) -> "Ensemble":
    import torch

    from rlhf_ray.models.ensemble import load_ensemble

    if threads is not None:
        torch.set_num_threads(threads)
    if not isinstance(model, Path):
        return model
    loaded = load_ensemble(model)
    if torch.cuda.is_available():
        for member in loaded.members:
            member.model.to("cuda")
    return loaded


def _text(model: "Ensemble", item: ScoreItem) -> str:
    from rlhf_ray.models.reward import render

    if not item.messages:
        return item.completion
    return render(model.members[0].tokenizer, Exchange(Prompt("", item.messages, group=""), item.completion))


class RewardRequest(Closed):
    """Answers to one prompt, each to be given a number."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "My lamp arrived broken.", "completions": ["A new one is on its way.", "Bad luck."]},
                {"messages": [{"role": "user", "content": "Where is my chair?"}], "completions": ["It comes today."]},
            ]
        }
    )

    prompt: Text | None = None
    """What was answered; stands for one turn of the user's."""
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=1_000)] | None = None
    """The dialogue that was answered, the user's turn last."""
    completions: Annotated[tuple[Answer, ...], Field(min_length=1, max_length=MAX_QUERIES)]
    """The answers; one may be empty."""

    @model_validator(mode="after")
    def _one_prompt(self) -> "RewardRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("the dialogue has to end with the user's turn")
        return self

    @property
    def dialogue(self) -> tuple[Message, ...]:
        """What was answered, as turns."""
        if self.messages is None:
            return (Message("user", self.prompt or ""),)
        return tuple(Message(turn.role, turn.content) for turn in self.messages)


class Rewards(Closed):
    """A reward for each answer, in their order."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "rewards",
                "model": "reward-model",
                "version": 2,
                "rewards": [1.37, -0.52],
                "spreads": [0.08, 0.31],
                "out_of_distribution": [False, True],
            }
        }
    )

    object: Literal["rewards"] = "rewards"
    model: str
    version: int
    """Of the reward model; all of the request was scored by this one."""
    rewards: tuple[float, ...]
    spreads: tuple[float, ...] | None = None
    """How unsure it is of each: the standard deviation over its members, or over last layers that might as well have
    been learnt. Null where the model cannot say."""
    out_of_distribution: tuple[bool, ...] | None = None
    """Whether each is unlike all that it has learnt from. Null where the model cannot say."""


class OpenRLHFRequest(Closed):
    """The request of OpenRLHF's remote reward model, as versions 0.7 to 0.11 send it (`remote_rm_url`)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"query": ["user: Hi\\nassistant: Hello!"], "prompts": ["user: Hi\\n"], "labels": [""]}]
        }
    )

    query: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_QUERIES)]
    """Prompt and answer in one text, special tokens written out, as the trainer's chat template made it."""
    prompts: tuple[JsonValue, ...] | None = None
    """Taken and not used: the model reads `query`."""
    labels: tuple[JsonValue, ...] | None = None
    """Taken and not used: reference answers are for reward functions."""


class OpenRLHFRewards(Closed):
    """What OpenRLHF's server answers: `rewards` are trained on, `scores` filter prompts, `extra_logs` are logged."""

    rewards: tuple[float, ...]
    scores: tuple[float, ...]
    extra_logs: dict[str, tuple[float, ...]]
    """`reward_model_version`, once for each query."""


def router(settings: ServiceConfig, *, reward: RewardBackend) -> APIRouter:
    """The routes above, over whoever scores."""
    routes = APIRouter(tags=["rewards"], dependencies=[Depends(role("app", "trainer"))])

    @routes.post("/v1/rewards")
    async def rewards(body: RewardRequest) -> Rewards:
        """Give each answer a number; higher is better, and only differences mean something."""
        given = len(body.completions)
        if given > settings.reward.max_items:
            raise ApiError(
                400, f"{given} completions: send at most {settings.reward.max_items} a request", param="completions"
            )
        scores = await reward.score([ScoreItem(body.dialogue, answer) for answer in body.completions])
        return Rewards(
            model=scores.model,
            version=scores.version,
            rewards=scores.rewards,
            spreads=scores.spreads or None,
            out_of_distribution=scores.strange or None,
        )

    @routes.post("/get_reward")
    async def get_reward(body: OpenRLHFRequest) -> OpenRLHFRewards:
        """Score whole texts, in the shape of OpenRLHF's remote reward model."""
        for name, given in (("prompts", body.prompts), ("labels", body.labels)):
            if given is not None and len(given) != len(body.query):
                raise ApiError(400, f"{len(given)} {name} for {len(body.query)} queries", param=name)
        scores = await reward.score([ScoreItem((), text) for text in body.query])
        logs = {"reward_model_version": (float(scores.version),) * len(body.query)}
        return OpenRLHFRewards(rewards=scores.rewards, scores=scores.rewards, extra_logs=logs)

    return routes
