"""A reward model, or an ensemble of them, in this process."""

import math
import statistics
from collections.abc import Sequence
from typing import Protocol

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.rewards.source import Given
from rlhf_ray.types import Exchange


class Scoring(Protocol):
    """`models.reward.RewardModel`, or a fake in tests."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """One number an exchange, in their order."""


class ModelSource:
    """The mean of its members, less `uncertainty` times their variance: Coste et al. 2024 (arXiv:2310.02743), "UWO".

    A model of our own that gives no number is broken: that is an error, not a missing reward.
    """

    def __init__(self, members: Sequence[Scoring], *, uncertainty: float = 0.0) -> None:
        self.members, self.uncertainty = list(members), uncertainty

    def score(self, exchanges: Sequence[Exchange]) -> Given:
        """See `Source.score`."""
        columns = [_checked(member, exchanges) for member in self.members]
        if len(columns) == 1:
            return Given(columns[0])
        rows = list(zip(*columns, strict=True))
        rewards = [statistics.fmean(row) - self.uncertainty * statistics.pvariance(row) for row in rows]
        return Given(rewards, [statistics.pstdev(row) for row in rows])


def _checked(member: Scoring, exchanges: Sequence[Exchange]) -> list[float]:
    scores = [float(score) for score in member.score(exchanges)]
    if len(scores) != len(exchanges):
        raise InfrastructureError(f"a reward model was given {len(exchanges)} exchanges and scored {len(scores)}")
    for exchange, score in zip(exchanges, scores, strict=True):
        if not math.isfinite(score):
            raise InfrastructureError(
                f"a reward model scored the answer to prompt {exchange.prompt.id} {score}; a reward is a finite number"
            )
    return scores
