"""An environment's own rewards, which come with the dialogues, as a source beside others."""

from collections.abc import Sequence

from rlhf_ray.rewards.source import Given, as_reward
from rlhf_ray.types import Exchange


class EnvironmentSource:
    """What the environment gave each dialogue; None, NaN and what is no number are no reward."""

    def score(self, exchanges: Sequence[Exchange]) -> Given:
        """See `Source.score`."""
        return Given([as_reward(exchange.reward) for exchange in exchanges])
