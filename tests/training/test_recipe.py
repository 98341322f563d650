"""Which recipe a config makes, and which prompts its context leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import DataError
from rlhf_ray.recipes.dialogue import DialogueRecipe
from rlhf_ray.training.recipe import drop_long_prompts, make_preferences, make_recipe
from rlhf_ray.types import Message, Prompt
from tests.training.fakes import Tokenizer


def test_the_default_is_the_invented_world() -> None:
    assert isinstance(make_recipe(load_config()), DialogueRecipe)


def test_no_group_of_peoples_pairs_lies_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 10}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(30)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_preferences(
        load_config(None, ["recipe=preferences", "data.format=preference", f"data.path={path}", "data.held_out=3"])
    )
    train, held_out = ({item.group for item in items} for items in (recipe.train, recipe.held_out))
    assert (len(train), len(held_out), train & held_out) == (7, 3, set())


def make_long() -> SimpleNamespace:
    texts = {"short": "?", "long": "?" * 60}
    prompts = [Prompt(name, (Message("user", text),), name) for name, text in texts.items()]
    return SimpleNamespace(train_prompts=prompts, held_out_prompts=prompts)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_an_error_with_its_name() -> None:
    config = load_config(None, ["rollout.max_tokens=8"])
    with pytest.raises(DataError, match="prompt long"):
        drop_long_prompts(make_long(), Tokenizer(), config)  # type: ignore[arg-type]


def test_or_it_is_dropped_and_counted() -> None:
    recipe = make_long()
    config = load_config(None, ["rollout.max_tokens=8", "data.on_bad_row=skip"])
    assert drop_long_prompts(recipe, Tokenizer(), config) == 2  # type: ignore[arg-type]
    assert [prompt.id for prompt in recipe.train_prompts] == ["short"]
