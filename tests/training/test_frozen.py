"""What frozen feedback may be learnt from."""

import json
from pathlib import Path

import pytest

from rlhf_ray.config import Config, load_config
from rlhf_ray.feedback.schema import Answer, Feedback, Rating, names_of
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.training.frozen import read_frozen
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.types import Message, Prompt


def rating(messages: tuple[Message, ...], prompt_id: str, group: str) -> Feedback:
    answers = (Answer(text="yes", sampler="ppo"),)
    rated = Rating(value=4)
    return Feedback(
        messages=messages, prompt_id=prompt_id, group=group, answers=answers, rating=rated, annotator="visitor"
    )


def as_the_recipe_says(prompt: Prompt) -> Feedback:
    return rating(prompt.messages, prompt.id, prompt.group)


def as_the_service_says(prompt: Prompt) -> Feedback:
    return rating(prompt.messages, *names_of(prompt.messages))


def further_on(prompt: Prompt) -> Feedback:
    """Another prompt that begins alike: of the same group, under another id."""
    messages = (*prompt.messages, Message("assistant", "Which one?"), Message("user", "The blue one."))
    return rating(messages, *names_of(messages))


@pytest.fixture(params=["dialogue", "preferences"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    if request.param == "dialogue":
        return load_config(None, ["data.prompts=40", "data.held_out=8"])
    rows = [{"prompt": f"question {n}", "chosen": "b", "rejected": "c"} for n in range(4)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["recipe=preferences", "data.format=preference", f"data.path={tmp_path / 'choices.jsonl'}"]
    return load_config(None, [*told, "data.held_out=1"])


def test_what_is_about_a_group_that_measures_the_policy_is_left_out_and_counted(config: Config, tmp_path: Path) -> None:
    recipe = make_recipe(config)
    spellings = (as_the_recipe_says, as_the_service_says, further_on)
    learnt, measured = (
        [spelling(side[0]) for spelling in spellings] for side in (recipe.train_prompts, recipe.held_out_prompts)
    )
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add([*measured, *learnt])
        snapshot = store.freeze()
    said: list[str] = []
    assert read_frozen(str(tmp_path / "f.db"), snapshot.id, config=config, say=said.append) == learnt
    assert [line.split(":")[0] for line in said] == ["3 of 6 rows of feedback are left out"]


def test_of_feedback_that_is_all_learnt_from_nothing_is_said(config: Config, tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add(rows := [as_the_recipe_says(prompt) for prompt in make_recipe(config).train_prompts])
        snapshot = store.freeze()
    said: list[str] = []
    assert read_frozen(str(tmp_path / "f.db"), snapshot.id, config=config, say=said.append) == rows
    assert said == []
