"""The recipe of a config, the same on every machine that makes it."""

from rlhf_ray.config import Config
from rlhf_ray.data.preferences import split_by_group
from rlhf_ray.errors import ConfigError
from rlhf_ray.feedback.formats import read_pairs
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.recipes.dialogue import DialogueRecipe
from rlhf_ray.recipes.preferences import PreferencesRecipe


def make_recipe(config: Config) -> Recipe:
    """A deterministic function of the config and, for `preferences`, of the data file."""
    if config.recipe == "dialogue":
        return DialogueRecipe(config.data, seed=config.seed)
    return make_preferences(config)


def make_preferences(config: Config) -> PreferencesRecipe:
    """People's pairs, split so that no group lies on both sides."""
    if config.data.path is None:
        raise ConfigError("recipe: preferences needs data.path, a file of human choices")
    file = read_pairs(config.data.path, config.data.format, config.data.on_bad_row)
    train, held_out = split_by_group(
        file.pairs, group=lambda pair: pair.prompt.group, held_out=config.data.held_out, seed=config.seed
    )
    return PreferencesRecipe(train, held_out, described=file.describe())
