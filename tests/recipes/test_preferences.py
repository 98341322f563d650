"""People's pairs as a recipe."""

from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.recipes.preferences import PreferencesRecipe
from rlhf_ray.types import Message


def make_pair(n: int, chosen: str = "yes", rejected: str = "no") -> Feedback:
    return Feedback(
        messages=(Message("user", f"question {n}"),),
        prompt_id=f"p{n}",
        group=f"g{n}",
        answers=tuple(Answer(text=text, sampler="them") for text in (chosen, rejected)),
        ranking=Ranking(ranks=(1, 2)),
        annotator="people",
    )


def recipe() -> PreferencesRecipe:
    return PreferencesRecipe([make_pair(1), make_pair(1, "sure", "never"), make_pair(2)], [make_pair(3)], described="")


def test_a_prompt_with_several_pairs_is_asked_once() -> None:
    assert [prompt.id for prompt in recipe().train_prompts] == ["p1", "p2"]
    assert [prompt.id for prompt in recipe().held_out_prompts] == ["p3"]


def test_it_imitates_what_people_chose() -> None:
    assert [exchange.response for exchange in recipe().demonstrations()] == ["yes", "sure", "yes"]


def rated(n: int, text: str, value: float) -> Feedback:
    return make_pair(n).model_copy(
        update={"answers": (Answer(text=text, sampler="them"),), "ranking": None, "rating": Rating(value=value)}
    )


def test_of_what_was_rated_it_imitates_what_is_better_than_most() -> None:
    ratings = [rated(1, "bad", 1.0), rated(1, "good", 5.0), rated(2, "fair", 3.0)]
    recipe = PreferencesRecipe([*ratings, make_pair(3)], [make_pair(4)], described="")
    assert [exchange.response for exchange in recipe.demonstrations()] == ["good", "yes"]
    assert [prompt.id for prompt in recipe.train_prompts] == ["p1", "p2", "p3"]


def test_its_texts_are_those_of_the_training_side_each_once() -> None:
    assert recipe().corpus() == ["question 1", "yes", "no", "sure", "never", "question 2"]


def test_nobody_knows_its_gold() -> None:
    assert recipe().gold(make_pair(1).prompt, "yes") is None
