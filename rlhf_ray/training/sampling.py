"""From prompts to rollouts and back to text: what PPO, the evaluation and the collection of feedback share."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config, RolloutConfig
from rlhf_ray.data.prompts import rollout_seed
from rlhf_ray.models.policy import decode_response, encode_prompt, stop_ids
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.roles.environment import Episode, MakeEnvironment, load_environment
from rlhf_ray.roles.generators import Follow
from rlhf_ray.types import Exchange, GenerationRequest, Prompt, Rollout, Sampling


class Generating(Protocol):
    """`generators.GeneratorGroup`."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, follow: Follow = ...
    ) -> list[Rollout]:
        """What each request comes to, in their order."""


class Asked(Protocol):
    """What a step asks of the generators, and what comes of it."""

    @property
    def requests(self) -> list[GenerationRequest]:
        """To begin with, one for each rollout, in their order."""

    def follow(self, rollout: Rollout) -> GenerationRequest | None:
        """What is asked once this has ended; None where that was all."""

    def whole(self, rollout: Rollout) -> tuple[Rollout, Exchange]:
        """All of it, of which this was the last: for the learner, and as text for the scorers."""


def answers_to(
    prompts: Sequence[Prompt],
    generators: Generating,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    samples: int,
    step: int | str,
    sampling: Sampling | None = None,
) -> tuple[list[Rollout], list[Exchange]]:
    """`samples` answers to each prompt, or dialogues from it, as tokens and as text; those of one prompt together.

    The draws follow from run, step, prompt and sample; `step` is the learner's, or a word for what is sampled outside
    the loop.
    """
    sampling = sampling or sampling_of(config.rollout, tokenizer)
    asked = asked_of(prompts, tokenizer, config=config, samples=samples, step=step, room=sampling.max_tokens)
    last = generators.generate(asked.requests, sampling, follow=asked.follow)
    whole = [asked.whole(rollout) for rollout in last]
    return [rollout for rollout, _ in whole], [exchange for _, exchange in whole]


def asked_of(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: Config,
    samples: int,
    step: int | str,
    room: int,
) -> Asked:
    """`samples` rollouts of each prompt, as the config has them: an answer, or a dialogue from there."""
    identity = (str(config.run.id), step)
    if config.rollout.environment is None:
        return SingleAnswers(prompts, tokenizer, identity=identity, samples=samples, room=room)
    return Dialogues(
        prompts,
        tokenizer,
        load_environment(config.rollout.environment),
        turns=config.rollout.turns,
        identity=identity,
        samples=samples,
        room=room,
    )


class SingleAnswers:
    """`Asked`: one answer each."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        identity: tuple[str, int | str],
        samples: int,
        room: int,
    ) -> None:
        run_id, step = identity
        self.requests = requests_for(prompts, tokenizer, run_id=run_id, step=step, samples=samples, room=room)
        self._tokenizer, self._prompts = tokenizer, {prompt.id: prompt for prompt in prompts}

    def follow(self, rollout: Rollout) -> None:
        """Nothing."""

    def whole(self, rollout: Rollout) -> tuple[Rollout, Exchange]:
        """The rollout itself."""
        return rollout, exchange_of(rollout, self._prompts[rollout.prompt_id], self._tokenizer)


class Dialogues:
    """`Asked`: each goes on by itself, an answer's next turn is asked for as soon as the answer is there."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        make: MakeEnvironment,
        *,
        turns: int,
        identity: tuple[str, int | str],
        samples: int,
        room: int,
    ) -> None:
        run_id, step = identity
        self._episodes: dict[str, Episode] = {}
        self._seeds: dict[str, Iterator[int]] = {}

        def drawn(prompt: Prompt, sample: int) -> Iterator[int]:
            return (rollout_seed(run_id, f"{step}.{turn}" if turn else step, prompt.id, sample) for turn in count())

        for prompt in prompts:
            for sample in range(samples):
                id = f"{run_id}/{step}/{prompt.id}/{sample}"
                environment = make(prompt, rollout_seed(run_id, f"{step}-environment", prompt.id, sample))
                self._episodes[id] = Episode(id, prompt, environment, tokenizer, turns=turns, room=room)
                self._seeds[id] = drawn(prompt, sample)
        self.requests = [self._next(id) for id in self._episodes]

    def follow(self, rollout: Rollout) -> GenerationRequest | None:
        """The next turn, where the dialogue goes on."""
        return self._next(rollout.id) if self._episodes[rollout.id].answered(rollout) else None

    def whole(self, rollout: Rollout) -> tuple[Rollout, Exchange]:
        """The dialogue as one rollout, and as text."""
        episode = self._episodes[rollout.id]
        return episode.rollout(), episode.exchange()

    def _next(self, id: str) -> GenerationRequest:
        return self._episodes[id].request(next(self._seeds[id]))


def sampling_of(rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """How responses are drawn; `ConfigError` where a text in `rollout.stop` is not one token."""
    return Sampling(rollout.temperature, rollout.top_p, rollout.max_tokens, stop_ids(tokenizer, rollout.stop))


def gold_of(recipe: Recipe, exchanges: Sequence[Exchange], config: Config) -> list[float]:
    """Each exchange's gold score, where the recipe knows one; it knows none of dialogues with an environment."""
    if config.rollout.environment is not None:
        return []
    gold = [recipe.gold(exchange.prompt, exchange.response) for exchange in exchanges]
    return [value for value in gold if value is not None]


def requests_for(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    run_id: str,
    step: int | str,
    samples: int,
    room: int,
) -> list[GenerationRequest]:
    """`samples` rollouts of each prompt, those of one prompt together; seeds follow from (run, step, prompt, sample).

    `step` is the learner's step, or a word for what is sampled outside the loop. `room` tokens are kept for the
    response; a prompt that leaves fewer raises `DataError`.
    """
    requests = []
    for prompt in prompts:
        ids = tuple(encode_prompt(tokenizer, prompt, room=room))
        for sample in range(samples):
            seed = rollout_seed(run_id, step, prompt.id, sample)
            requests.append(GenerationRequest(f"{run_id}/{step}/{prompt.id}/{sample}", prompt.id, ids, seed))
    return requests


def exchanges_of(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[Exchange]:
    """The rollouts as text, in their order."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return [exchange_of(rollout, by_id[rollout.prompt_id], tokenizer) for rollout in rollouts]


def exchange_of(rollout: Rollout, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Exchange:
    """A rollout of this prompt as text."""
    return Exchange(prompt, decode_response(tokenizer, rollout.response_ids))
