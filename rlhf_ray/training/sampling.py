"""From prompts to rollouts and back to text: what PPO, the evaluation and the collection of feedback share."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config, RolloutConfig
from rlhf_ray.data.prompts import rollout_seed
from rlhf_ray.models.policy import decode_response, encode_prompt, stop_ids
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.roles.environment import Episode, MakeEnvironment, load_environment
from rlhf_ray.roles.generators import Session
from rlhf_ray.types import Exchange, GenerationRequest, Prompt, Rollout, Sampling


class Generating(Protocol):
    """`generators.GeneratorGroup`."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Rollout]:
        """One rollout a request, in their order."""

    def session(self) -> AbstractContextManager[Session]:
        """For requests that follow from answers."""


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
    run_id = str(config.run.id)
    if config.rollout.environment is not None:
        return _dialogues(
            prompts,
            load_environment(config.rollout.environment),
            generators,
            tokenizer=tokenizer,
            sampling=sampling,
            turns=config.rollout.turns,
            identity=(run_id, step),
            samples=samples,
        )
    requests = requests_for(prompts, tokenizer, run_id=run_id, step=step, samples=samples, room=sampling.max_tokens)
    rollouts = generators.generate(requests, sampling)
    return rollouts, exchanges_of(rollouts, prompts, tokenizer)


def sampling_of(rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """How responses are drawn; `ConfigError` where a text in `rollout.stop` is not one token."""
    return Sampling(rollout.temperature, rollout.top_p, rollout.max_tokens, stop_ids(tokenizer, rollout.stop))


def _dialogues(
    prompts: Sequence[Prompt],
    make: MakeEnvironment,
    generators: Generating,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    turns: int,
    identity: tuple[str, int | str],
    samples: int,
) -> tuple[list[Rollout], list[Exchange]]:
    """Each goes on by itself: an answer's next turn is asked for as soon as the answer is there."""
    run_id, step = identity
    episodes: dict[str, Episode] = {}
    seeds: dict[str, Iterator[int]] = {}

    def drawn(prompt: Prompt, sample: int) -> Iterator[int]:
        return (rollout_seed(run_id, f"{step}.{turn}" if turn else step, prompt.id, sample) for turn in count())

    for prompt in prompts:
        for sample in range(samples):
            id = f"{run_id}/{step}/{prompt.id}/{sample}"
            environment = make(prompt, rollout_seed(run_id, f"{step}-environment", prompt.id, sample))
            episodes[id] = Episode(id, prompt, environment, tokenizer, turns=turns, room=sampling.max_tokens)
            seeds[id] = drawn(prompt, sample)
    with generators.session() as session:
        session.ask([episode.request(next(seeds[id])) for id, episode in episodes.items()], sampling)
        while ended := session.take():
            going_on = [answer.id for answer in ended if episodes[answer.id].answered(answer)]
            session.ask([episodes[id].request(next(seeds[id])) for id in going_on], sampling)
    return [e.rollout() for e in episodes.values()], [e.exchange() for e in episodes.values()]


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
