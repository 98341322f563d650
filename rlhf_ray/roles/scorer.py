"""The scorer: exchanges in, rewards out, or an error; never a number that no reward model gave."""

import math
from collections.abc import Sequence
from typing import Protocol

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.types import Exchange


class Scoring(Protocol):
    """What gives rewards: `models.reward.RewardModel`, or a fake in tests."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """One number an exchange, in their order."""


class Scorer:
    """A reward model behind a check: as many finite rewards as exchanges."""

    def __init__(self, reward_model: Scoring, *, name: str = "scorer") -> None:
        self.reward_model = reward_model
        self.name = name

    def ping(self) -> str:
        """Its name, once the reward model is loaded."""
        return self.name

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """A reward for each exchange, in their order; `InfrastructureError` where one is missing or not finite."""
        scores = [float(score) for score in self.reward_model.score(exchanges)]
        if len(scores) != len(exchanges):
            raise InfrastructureError(f"{self.name} was given {len(exchanges)} exchanges and scored {len(scores)}")
        for exchange, score in zip(exchanges, scores, strict=True):
            if not math.isfinite(score):
                raise InfrastructureError(
                    f"{self.name} scored the answer to prompt {exchange.prompt.id} {score}; a reward is a finite number"
                )
        return scores
