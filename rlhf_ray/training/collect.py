"""Feedback into the store, and a frozen snapshot of it: by simulated annotators or from a file."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Answer
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.recipes.annotators import annotate, flipped_share
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.recipes.dialogue import DialogueRecipe
from rlhf_ray.recipes.preferences import PreferencesRecipe
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.training.sampling import exchanges_of, requests_for, sampling_of
from rlhf_ray.types import Exchange, Prompt, Sampling

Say = Callable[[str], None]


def collect_from_people(store: FeedbackStore, recipe: PreferencesRecipe, config: Config, *, say: Say) -> dict[str, Any]:
    """Writes the choices of the training side into the store; the held-out side stays out of every training stage."""
    measuring = f"those on {len(recipe.held_out_prompts)} prompts are kept to measure the policy by (data.held_out)"
    say(f"{config.data.path}: {recipe.described}; {measuring}")
    store.add(recipe.train)
    return _freeze(store, say=say)


def bring_over(store: FeedbackStore, *, older: str, snapshot: str) -> set[str]:
    """Adds what another run's store holds by now; the ids of what that run has learnt from, a snapshot of it."""
    with FeedbackStore(older, read_only=True) as theirs:
        if theirs.name != store.name:
            store.add_all(theirs.counted())
        return theirs.members(snapshot)


def collect_again(store: FeedbackStore, *, known: set[str], say: Say) -> dict[str, Any]:
    """Freezes what people have said by now; `DataError` where that is nothing but what is `known`, by id."""
    found = _freeze(store, say=say)
    new = store.members(found["snapshot"]) - known
    say(f"{len(new)} of them are new since run.from learnt from its own")
    if not new:
        raise DataError(
            f"{store.name} holds nothing that run.from has not learnt from: have people judge its policy's answers "
            "(rlhf feedback ask), into this store or into that of run.from, and run the same command again"
        )
    return found


def collect_from_annotators(
    store: FeedbackStore,
    recipe: Recipe,
    generators: GeneratorGroup,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    say: Say,
    sampler: str = "base-policy",
) -> dict[str, Any]:
    """Samples answers from what the engines hold, called `sampler`, and has the simulated annotators judge them."""
    assert isinstance(recipe, DialogueRecipe), "only a generated world has annotators that can be simulated"
    wanted = config.feedback
    if wanted.prompts > len(recipe.train_prompts):
        raise DataError(
            f"feedback.prompts={wanted.prompts} are more than the {len(recipe.train_prompts)} training prompts"
        )
    prompts = PromptStream(recipe.train_prompts, seed=config.seed).batch(0, wanted.prompts)
    sampling = sampling_of(config.rollout, tokenizer)
    requests = requests_for(
        prompts, tokenizer, run_id=str(config.run.id), step="feedback", samples=wanted.answers, room=sampling.max_tokens
    )
    say(f"sampling {len(requests)} answers to {len(prompts)} prompts from the {sampler.replace('-', ' ')}")
    rollouts = generators.generate(requests, sampling)
    exchanges = exchanges_of(rollouts, prompts, tokenizer)
    shown = _shown(prompts, exchanges, sampling, wanted.answers, sampler=sampler)
    unjudged = len(exchanges) - sum(len(answers) for _, answers in shown)
    if unjudged:
        say(f"{unjudged} of {len(exchanges)} answers are not judged: empty, or with none beside them to compare with")
    feedback = list(
        annotate(
            shown,
            judge=recipe.quality,
            remark=recipe.remark,
            config=wanted.annotators,
            seed=config.seed,
            run_id=str(config.run.id),
        )
    )
    store.add(feedback)
    share = flipped_share(feedback, recipe.quality)
    say(f"{wanted.annotators.count} annotators gave {len(feedback)} judgements; {share:.1%} of their pairs are wrong")
    return {**_freeze(store, say=say), "flipped_share": share, "unjudged": unjudged}


def _shown(
    prompts: list[Prompt], exchanges: list[Exchange], sampling: Sampling, answers: int, *, sampler: str
) -> list[tuple[Prompt, list[Answer]]]:
    """Each prompt with its answers; an empty answer cannot be judged and is left out, and one that is left alone."""
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    shown = []
    for row, prompt in enumerate(prompts):
        texts = [exchange.response for exchange in exchanges[row * answers : (row + 1) * answers]]
        kept = [Answer(text=text, sampler=sampler, sampling=how) for text in texts if text.strip()]
        if len(kept) > 1:
            shown.append((prompt, kept))
    return shown


def _freeze(store: FeedbackStore, *, say: Say) -> dict[str, Any]:
    snapshot = store.freeze()
    say(f"feedback: {snapshot.rows} rows frozen as {snapshot.id}, sha256 {snapshot.sha256[:12]}")
    return {"snapshot": snapshot.id, "sha256": snapshot.sha256, "rows": snapshot.rows}
