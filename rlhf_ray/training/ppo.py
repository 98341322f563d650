"""The page: one step of reinforcement learning. Generate, score, prepare, learn, publish.

Each role has one duty, and none knows this loop:

- generators sample responses with the weights that they have been proved to hold;
- scorers read the text and give each rollout one number;
- the learner turns rollouts and rewards into advantages (`prepare`) and the policy into a better one (`update`);
- the hand-off brings the learner's new weights to every generator and proves that they arrived.

Which algorithm it is, is the learner's affair (`ppo.advantage`, `ppo.loss`); two of them also ask for other samples.
`step` is a function of the step's number and the learner's state alone, so a resumed run asks the same prompts with
the same seeds.
"""

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.prompts import PromptStream, distinct
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.groups import LearnerGroup, ScorerGroup, trouble
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.ahead import Ahead
from rlhf_ray.training.replacing import Answers, Replacing, spare_prompts
from rlhf_ray.training.sampling import Asked, answers_to, asked_of, sampling_of
from rlhf_ray.types import Exchange, Prompt, Rollout, Sampling, Scored, Scores


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
        self.spares = prompts.in_another_order()
        self.sampling = sampling_of(config.rollout, tokenizer)
        self.ahead: Ahead | None = None
        """With `rollout.max_staleness`, from the first step on."""

    def step(self, step: int) -> Step:
        """One pass around the loop; `step` counts from 0."""
        roles, record = self.roles, Record()

        answers = self._whole(self._sampled(step, record), step, record)
        likeliest = self._likeliest(answers, step, record) if self.config.ppo.advantage == "remax" else None
        rewards = answers.earned
        if self.config.ppo.permute_rewards:
            rewards = permuted(rewards, seed=self.config.seed, step=step)

        def learn() -> dict[str, float]:
            with self._room_for_learner():
                with record.time("prepare"):
                    prepared = roles.learner.prepare(Scored(answers.rollouts, rewards), likeliest)
                with record.time("learn"):
                    return {**prepared, **roles.learner.update()}

        learned = learn() if self.ahead is None else self.ahead.meanwhile(step, learn)
        with record.time("sync"):
            sync = roles.handoff.publish(step + 1) | roles.generators.census()

        metrics = {**learned, **sync, **record.metrics, **describe(answers.rollouts, record.sampled_s, step)}
        return Step(answers.rollouts, answers.exchanges, metrics)

    def close(self) -> None:
        """Gives up what is under way for steps to come."""
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None

    def _sampled(self, step: int, record: "Record") -> Answers:
        """The step's answers and what they earned: sampled now, or while the steps before it were learnt."""
        if not self.config.rollout.max_staleness:
            return self._ask(self._prompts(step), step, record)
        self.ahead = self.ahead or self._look_ahead()
        with record.time("rollout"):  # what of it was left to wait for
            answers, scores, record.sampled_s = self.ahead.answers(step)
        record.scores += scores
        return answers

    def _look_ahead(self) -> Ahead:
        config = self.config

        def ask(step: int) -> Asked:
            return asked_of(
                self._prompts(step),
                self.tokenizer,
                config=config,
                samples=config.rollout.samples,
                step=step,
                room=config.rollout.max_tokens,
            )

        return Ahead(
            self.roles.generators,
            ask,
            self.roles.scorers.ask,
            sampling=self.sampling,
            steps=config.rollout.max_staleness,
            last=config.ppo.steps - 1,
        )

    def _prompts(self, step: int) -> list[Prompt]:
        return self.prompts.batch(step, self.config.rollout.prompts)

    def _room_for_learner(self) -> AbstractContextManager[None]:
        """Where engines and learner share a GPU's memory, the engines give theirs up in here."""
        return self.roles.generators.asleep() if self.config.resources.engine_sleep else nullcontext()

    def _ask(
        self, prompts: Sequence[Prompt], step: int | str, record: "Record", *, sampling: Sampling | None = None
    ) -> Answers:
        """What the policy answers, once where it is told how to sample, and what that earns."""
        config = self.config
        samples = config.rollout.samples if sampling is None else 1
        with record.time("rollout"):
            rollouts, exchanges = answers_to(
                prompts,
                self.roles.generators,
                tokenizer=self.tokenizer,
                config=config,
                samples=samples,
                step=step,
                sampling=sampling,
            )
        if self.ahead is None:
            record.sampled_s = record.seconds["time/rollout_s"]
        with record.time("score"):
            scores = self.roles.scorers.ask(exchanges)
        record.scores.append(scores)
        return Answers(rollouts, exchanges, list(scores.rewards))

    def _whole(self, answers: Answers, step: int, record: "Record") -> Answers:
        """The answers, with prompts replaced that are without a reward, or that teach nothing."""
        config = self.config

        def replacing(tries: int) -> Replacing:
            used = [exchange.prompt for exchange in answers.exchanges]
            spares = spare_prompts(self.spares, used, step=step, tries=tries, n=config.rollout.prompts)
            return Replacing(lambda prompts: self._ask(prompts, step, record), spares)

        answers = replacing(config.rewards.replacements).unrewarded(answers, why=lambda: trouble(record.scores))
        if config.rollout.dynamic_sampling:
            answers, passed_over = replacing(config.rollout.dynamic_sampling).uniform(answers)
            record.counts["rollout/passed_over"] = float(passed_over)
        return answers

    def _likeliest(self, answers: Answers, step: int, record: "Record") -> Scored:
        """ReMax's baseline: for each rollout, the greedy answer to its prompt and what that earns."""
        prompts = distinct(exchange.prompt for exchange in answers.exchanges)
        found = self._ask(
            prompts, f"{step}-greedy", record, sampling=replace(self.sampling, temperature=0.0, top_p=1.0)
        )
        earned = dict(zip((rollout.prompt_id for rollout in found.rollouts), found.earned, strict=True))
        likeliest = {rollout.prompt_id: rollout for rollout in found.rollouts}
        order = [rollout.prompt_id for rollout in answers.rollouts]
        return Scored([likeliest[prompt] for prompt in order], [earned[prompt] for prompt in order])


def permuted(rewards: Sequence[float], *, seed: int, step: int) -> list[float]:
    """The control `ppo.permute_rewards`: the same numbers, given to the wrong rollouts."""
    return random.Random(f"permute/{seed}/{step}").sample(list(rewards), len(rewards))


def describe(rollouts: Sequence[Rollout], sampled_s: float, step: int) -> dict[str, float]:
    """What the rollouts themselves tell: lengths, ends, speed, and how stale their weights were."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    staleness = [step - rollout.weights_step for rollout in rollouts]
    return {
        "episode": float((step + 1) * len(rollouts)),
        "rollout/length_mean": statistics.fmean(lengths),
        "rollout/finished": statistics.fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        "rollout/tokens_per_s": sum(lengths) / sampled_s,
        "rollout/staleness_mean": statistics.fmean(staleness),
        "rollout/staleness_max": float(max(staleness)),
    }


class Record:
    """What a step notes on its way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By phase, as `time/<phase>_s`; a phase may come several times."""
        self.scores: list[Scores] = []
        """All that scorers had to say."""
        self.counts: dict[str, float] = {}
        self.sampled_s = 0.0
        """From the first request to the last rollout."""
        self._began = time.monotonic()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Times what it encloses."""
        start, key = time.monotonic(), f"time/{phase}_s"
        yield
        self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - start

    @property
    def metrics(self) -> dict[str, float]:
        """Seconds of each phase and of the whole step so far, counts, and where the rewards came from."""
        whole = {"time/step_s": time.monotonic() - self._began}
        return {**self.seconds, **whole, **self.counts, **reward_metrics(self.scores)}


def reward_metrics(scores: Sequence[Scores]) -> dict[str, float]:
    """`rewards/` metrics: what is missing; by source its mean, how unsure it is, the share of answers unlike all
    that a reward model has learnt from, and what went wrong.

    A single source that gave all its rewards says nothing that `objective/scores` does not.
    """
    metrics = {"rewards/missing": float(sum(reward is None for part in scores for reward in part.rewards))}
    for name in scores[0].by_source:
        given = [value for part in scores for value in part.by_source[name] if value is not None]
        if given and len(scores[0].by_source) > 1:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(given)
    for name in scores[0].spreads:
        metrics[f"rewards/{name}/spread"] = statistics.fmean(spread for part in scores for spread in part.spreads[name])
    for name in scores[0].strange:
        flags = [flag for part in scores for flag in part.strange[name]]
        metrics[f"rewards/{name}/out_of_distribution"] = statistics.fmean(flags)
    counts = Counter[str]()
    for part in scores:
        counts.update(part.counts)
    return metrics | {f"rewards/{what}": float(n) for what, n in counts.items()}
