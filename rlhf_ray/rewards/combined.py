"""All of a run's sources as one: made from the config where the scorer runs, and summed by weight."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_ray.config.rewards import EnvironmentReward, FunctionReward, JudgeReward, ModelReward, RewardsConfig
from rlhf_ray.config.rewards import Source as SourceConfig
from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.models.files import members_of
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.rewards.environment import EnvironmentSource
from rlhf_ray.rewards.function import load_function
from rlhf_ray.rewards.judge import JudgeSource
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.rewards.remote import RemoteSource
from rlhf_ray.rewards.service import Service
from rlhf_ray.rewards.source import Source
from rlhf_ray.types import Exchange, Scores


class Weighted(NamedTuple):
    """A source and what its rewards count for."""

    source: Source
    weight: float = 1.0


class CombinedRewards:
    """Asks each source for each exchange; an exchange that one of them has no reward for has none."""

    def __init__(self, sources: Mapping[str, Weighted]) -> None:
        self.sources = dict(sources)

    def score(self, exchanges: Sequence[Exchange]) -> Scores:
        """The weighted sums, in the exchanges' order."""
        by_source: dict[str, list[float | None]] = {}
        spreads: dict[str, list[float]] = {}
        strange: dict[str, list[bool]] = {}
        counts: Counter[str] = Counter()
        for name, (source, _) in self.sources.items():
            given = source.score(exchanges)
            if len(given.rewards) != len(exchanges):
                raise InfrastructureError(
                    f"{name} was given {len(exchanges)} exchanges and scored {len(given.rewards)}"
                )
            by_source[name] = list(given.rewards)
            if given.spreads:
                spreads[name] = list(given.spreads)
            if given.strange:
                strange[name] = list(given.strange)
            counts.update({f"{name}/{what}": n for what, n in given.counts.items()})
        rows = zip(*by_source.values(), strict=True)
        rewards = [self._sum(row) for row in rows] if exchanges else []
        return Scores(rewards, by_source, spreads, dict(counts), strange)

    def _sum(self, row: Sequence[float | None]) -> float | None:
        known = [value for value in row if value is not None]
        if len(known) < len(row):
            return None
        weights = [weighted.weight for weighted in self.sources.values()]
        return sum(weight * value for weight, value in zip(weights, known, strict=True))


def make_sources(config: RewardsConfig, own_model: Path, keys: Mapping[str, str]) -> CombinedRewards:
    """Loads every reward model and imports every function; `own_model` is the run's own, `keys` those of services."""
    return CombinedRewards(
        {
            name: Weighted(_make(source, own_model, keys.get(name)), source.weight)
            for name, source in config.sources.items()
        }
    )


def read_keys(config: RewardsConfig) -> dict[str, str]:
    """The services' keys from this process's environment; `ConfigError` where one is not set."""
    keys = {}
    for name, service in config.services().items():
        if service.key_env is None:
            continue
        key = os.environ.get(service.key_env)
        if not key:
            raise ConfigError(f"rewards.sources.{name}: the environment variable {service.key_env} is not set")
        keys[name] = key
    return keys


def _make(config: SourceConfig, own_model: Path, key: str | None) -> Source:
    if isinstance(config, ModelReward):
        folders = config.paths or [own_model]
        members = [load_reward_model(member) for folder in folders for member in members_of(folder)]
        return ModelSource(members, uncertainty=config.uncertainty)
    if isinstance(config, EnvironmentReward):
        return EnvironmentSource()
    if isinstance(config, FunctionReward):
        return load_function(config.of)
    url = f"{config.url}/chat/completions" if isinstance(config, JudgeReward) else config.url
    service = Service(
        url, key=key, concurrency=config.concurrency, deadline_s=config.deadline_s, patience_s=config.patience_s
    )
    if isinstance(config, JudgeReward):
        return JudgeSource(
            service, model=config.model, rubric=config.rubric, marks=config.marks, max_tokens=config.max_tokens
        )
    return RemoteSource(service, shape=config.shape, batch=config.batch)
