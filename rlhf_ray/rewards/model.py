"""A reward model, or an ensemble of them, in this process."""

import math
from collections.abc import Sequence
from typing import Protocol

from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.models.sureness import Considered, agreed
from rlhf_ray.rewards.source import Given
from rlhf_ray.types import Exchange


class Scoring(Protocol):
    """Whatever gives rewards alone."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """One number an exchange, in their order."""


class Considering(Protocol):
    """`models.reward.RewardModel`, or a fake in tests."""

    def consider(self, exchanges: Sequence[Exchange]) -> Considered:
        """One number an exchange, in their order, and how sure it is, where that is known."""


class ModelSource:
    """The mean of its members, less `uncertainty` times their variance: Coste et al. 2024 (arXiv:2310.02743), "UWO".

    The variance is that of `agreed`. A model of our own that gives no number is broken: that is an error, not a missing
    reward.
    """

    def __init__(self, members: Sequence[Considering], *, uncertainty: float = 0.0) -> None:
        self.members, self.uncertainty = list(members), uncertainty

    def score(self, exchanges: Sequence[Exchange]) -> Given:
        """See `Source.score`; `ConfigError` where there is to be a penalty and nobody knows how sure the reward is."""
        told = agreed([_checked(member, exchanges) for member in self.members])
        rewards = told.rewards
        if self.uncertainty and exchanges:
            if not told.spreads:
                raise ConfigError(
                    "uncertainty is that of an ensemble, and this reward model has no heads: leave it out"
                )
            rewards = [
                reward - self.uncertainty * spread**2 for reward, spread in zip(rewards, told.spreads, strict=True)
            ]
        return Given(rewards, told.spreads, told.strange)


def _checked(member: Considering, exchanges: Sequence[Exchange]) -> Considered:
    considered = member.consider(exchanges)
    if len(considered.rewards) != len(exchanges):
        raise InfrastructureError(
            f"a reward model was given {len(exchanges)} exchanges and scored {len(considered.rewards)}"
        )
    for exchange, score in zip(exchanges, considered.rewards, strict=True):
        if not math.isfinite(score):
            raise InfrastructureError(
                f"a reward model scored the answer to prompt {exchange.prompt.id} {score}; a reward is a finite number"
            )
    return considered
