"""The recipe of a config, the same on every machine that makes it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.splits import split_by_group
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.feedback.transfer import Found, read_feedback
from rlhf_ray.models.policy import encode_prompt
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.recipes.dialogue import DialogueRecipe
from rlhf_ray.recipes.preferences import PreferencesRecipe
from rlhf_ray.types import Prompt


def make_recipe(config: Config) -> Recipe:
    """A deterministic function of the config and, for `preferences`, of the data file."""
    if config.recipe == "dialogue":
        return DialogueRecipe(config.data, seed=config.seed)
    return make_preferences(config)


def drop_long_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Config) -> int:
    """Leaves in `recipe` the prompts that, with `rollout.max_tokens` for an answer, fit into the context.

    Returns how many went; raises `DataError` for the first one unless `data.on_bad_row` is `skip`.
    """
    before = len(recipe.train_prompts) + len(recipe.held_out_prompts)
    recipe.train_prompts = _fitting(recipe.train_prompts, tokenizer, config)
    recipe.held_out_prompts = _fitting(recipe.held_out_prompts, tokenizer, config)
    if not recipe.train_prompts or not recipe.held_out_prompts:
        raise DataError("no prompt fits into the context with rollout.max_tokens for an answer; raise model.context")
    return before - len(recipe.train_prompts) - len(recipe.held_out_prompts)


def _fitting(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Prompt]:
    kept = []
    for prompt in prompts:
        try:
            encode_prompt(tokenizer, prompt, room=config.rollout.max_tokens)
        except DataError:
            if config.data.on_bad_row == "error":
                raise
        else:
            kept.append(prompt)
    return kept


def make_preferences(config: Config) -> PreferencesRecipe:
    """People's judgements of any kind, split so that no group lies on both sides."""
    if config.data.path is None:
        raise ConfigError("recipe: preferences needs data.path, a file of human feedback")
    data, found = config.data, Found()
    feedback = list(read_feedback(config.data.path, data.format, found, on_bad_row=data.on_bad_row))
    if not any(item.preferences or item.rating for item in feedback):
        raise DataError(
            f"{data.path} neither compares answers nor rates them ({found.describe()}): give a file of choices "
            "or ratings"
        )
    train, held_out = split_by_group(feedback, group=lambda item: item.group, held_out=data.held_out, seed=config.seed)
    return PreferencesRecipe(train, held_out, described=found.describe())
