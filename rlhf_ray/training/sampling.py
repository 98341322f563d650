"""From prompts to rollouts and back to text: what PPO, the evaluation and the collection of feedback share."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.prompts import rollout_seed
from rlhf_ray.models.policy import decode_response, encode_prompt
from rlhf_ray.types import Exchange, GenerationRequest, Prompt, Rollout


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
    return [
        Exchange(by_id[rollout.prompt_id], decode_response(tokenizer, rollout.response_ids)) for rollout in rollouts
    ]
