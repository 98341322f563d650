"""PPO: the page. Generate, score, prepare, learn, publish.

Each role has one duty, and none knows this loop:

- generators sample responses with the weights that they have been proved to hold;
- scorers read the text and give each rollout one number;
- the learner turns rollouts and rewards into advantages (`prepare`) and the policy into a better one (`update`);
- the hand-off brings the learner's new weights to every generator and proves that they arrived.

`step` is a function of the step's number and the learner's state alone, so a resumed run asks the same prompts with
the same seeds.
"""

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.roles.groups import GeneratorGroup, LearnerGroup, ScorerGroup
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.sampling import exchanges_of, requests_for
from rlhf_ray.types import Exchange, GenerationRequest, Prompt, Rollout, Sampling


@dataclass(frozen=True, slots=True)
class Roles:
    """Who does the work."""

    generators: GeneratorGroup
    scorers: ScorerGroup
    learner: LearnerGroup
    handoff: WeightsHandoff


@dataclass(frozen=True, slots=True)
class Step:
    """What one step made."""

    rollouts: list[Rollout]
    exchanges: list[Exchange]
    metrics: dict[str, float]


class PPO:
    """The loop's one step."""

    def __init__(
        self, roles: Roles, *, prompts: PromptStream, tokenizer: PreTrainedTokenizerBase, config: Config
    ) -> None:
        self.roles, self.prompts, self.tokenizer, self.config = roles, prompts, tokenizer, config
        rollout = config.rollout
        self.sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_tokens)

    def step(self, step: int) -> Step:
        """One pass around the loop; `step` counts from 0."""
        roles, clock = self.roles, Clock()
        prompts = self.prompts.batch(step, self.config.rollout.prompts)

        with clock.time("rollout"):
            rollouts = roles.generators.generate(self._requests(prompts, step), self.sampling)
        with clock.time("score"):
            exchanges = exchanges_of(rollouts, prompts, self.tokenizer)
            rewards = roles.scorers.score(exchanges)
        if self.config.ppo.permute_rewards:
            rewards = permuted(rewards, seed=self.config.seed, step=step)
        with clock.time("prepare"):
            prepared = roles.learner.prepare(rollouts, rewards)
        with clock.time("learn"):
            learned = roles.learner.update()
        with clock.time("sync"):
            sync = roles.handoff.publish(step + 1) | roles.generators.census()

        metrics = {**prepared, **learned, **sync, **clock.seconds, **describe(rollouts, clock.seconds, step)}
        return Step(rollouts, exchanges, metrics)

    def _requests(self, prompts: Sequence[Prompt], step: int) -> list[GenerationRequest]:
        rollout, run_id = self.config.rollout, str(self.config.run.id)
        return requests_for(
            prompts, self.tokenizer, run_id=run_id, step=step, samples=rollout.samples, room=rollout.max_tokens
        )


def permuted(rewards: Sequence[float], *, seed: int, step: int) -> list[float]:
    """The control `ppo.permute_rewards`: the same numbers, given to the wrong rollouts."""
    return random.Random(f"permute/{seed}/{step}").sample(list(rewards), len(rewards))


def describe(rollouts: Sequence[Rollout], seconds: Mapping[str, float], step: int) -> dict[str, float]:
    """What the rollouts themselves tell: lengths, ends, speed, and how stale their weights were."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    staleness = [step - rollout.weights_step for rollout in rollouts]
    return {
        "episode": float((step + 1) * len(rollouts)),
        "rollout/length_mean": statistics.fmean(lengths),
        "rollout/finished": statistics.fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        "rollout/tokens_per_s": sum(lengths) / seconds["time/rollout_s"],
        "rollout/staleness_mean": statistics.fmean(staleness),
        "rollout/staleness_max": float(max(staleness)),
    }


class Clock:
    """Seconds by phase, as `time/<phase>_s`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Times what it encloses."""
        start = time.monotonic()
        yield
        self.seconds[f"time/{phase}_s"] = time.monotonic() - start
