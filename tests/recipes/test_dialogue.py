"""The invented shop: enough distinct prompts, a clean split, answers that cannot be memorised or won by a phrase."""

import random
import statistics

import pytest

from rlhf_ray.algo.ranking import distinct_n
from rlhf_ray.config import DataConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.recipes.dialogue import Case, DialogueRecipe, Skill, demonstrate
from rlhf_ray.recipes.dialogue_gold import gold_score, judge, remark
from rlhf_ray.recipes.dialogue_phrases import PROBLEMS, Problem
from rlhf_ray.types import Message, Prompt

PERFECT = Skill(*[0.0] * 10)


@pytest.fixture(scope="module")
def recipe() -> DialogueRecipe:
    return DialogueRecipe(DataConfig(), seed=0)


def test_there_are_two_thousand_distinct_prompts_and_two_hundred_held_out(recipe: DialogueRecipe) -> None:
    texts = {prompt.messages[0].content for prompt in (*recipe.train_prompts, *recipe.held_out_prompts)}
    assert len(texts) == len(recipe.train_prompts) + len(recipe.held_out_prompts) >= 2000
    assert len(recipe.held_out_prompts) == 200


def test_no_training_text_is_about_a_held_out_case(recipe: DialogueRecipe) -> None:
    held_out = {recipe.case(prompt) for prompt in recipe.held_out_prompts}
    trained = {recipe.case(exchange.prompt) for exchange in recipe.demonstrations()}
    assert not held_out & trained
    questions = {prompt.messages[0].content for prompt in recipe.held_out_prompts}
    assert not questions & {exchange.prompt.messages[0].content for exchange in recipe.demonstrations()}


def test_every_held_out_prompt_is_about_another_case(recipe: DialogueRecipe) -> None:
    assert len({recipe.case(prompt) for prompt in recipe.held_out_prompts}) == len(recipe.held_out_prompts)
    assert len({prompt.group for prompt in recipe.held_out_prompts}) == len(recipe.held_out_prompts)


def test_two_recipes_of_one_seed_are_equal_and_of_two_seeds_differ(recipe: DialogueRecipe) -> None:
    assert DialogueRecipe(DataConfig(), seed=0).demonstrations() == recipe.demonstrations()
    assert DialogueRecipe(DataConfig(), seed=1).demonstrations() != recipe.demonstrations()


def test_demonstrations_are_of_mixed_quality(recipe: DialogueRecipe) -> None:
    gold = [recipe.quality(exchange.prompt, exchange.response) for exchange in recipe.demonstrations()]
    assert 0.4 < statistics.fmean(gold) < 0.6
    assert min(gold) < 0.1 < 0.95 < max(gold)


def test_a_perfect_answer_to_every_case_scores_one() -> None:
    rng = random.Random(0)
    for problem in PROBLEMS:
        for _ in range(20):
            answer = demonstrate(Case("blue lamp", problem), PERFECT, rng)
            assert gold_score("blue lamp", problem.name, answer) == pytest.approx(1.0), answer


def test_no_single_answer_wins_over_all_prompts(recipe: DialogueRecipe) -> None:
    rng = random.Random(1)
    perfect = [demonstrate(recipe.case(prompt), PERFECT, rng) for prompt in recipe.held_out_prompts]
    best = max(statistics.fmean(recipe.quality(p, answer) for p in recipe.held_out_prompts) for answer in perfect)
    assert best < 0.55


def test_saying_every_remedy_does_not_win(recipe: DialogueRecipe) -> None:
    everything = " ".join(problem.remedies[0] + " " + problem.steps[0] for problem in PROBLEMS)
    prompt = recipe.held_out_prompts[0]
    thing = recipe.case(prompt).thing
    assert recipe.quality(prompt, f"Thank you for writing. Your {thing}. {everything} We are glad to help.") < 0.3


def test_of_what_people_asked_a_served_policy_the_truth_is_not_known(recipe: DialogueRecipe) -> None:
    known, other = recipe.held_out_prompts[0], Prompt("p", (Message("user", "Where is my parcel?"),), "p")
    assert recipe.gold(known, "We are sorry.") == recipe.quality(known, "We are sorry.")
    assert recipe.gold(other, "We are sorry.") is None


GOOD = (
    "Thank you for writing. Sorry to hear your blue lamp arrived broken. We will send a new one. "
    "Please throw the pieces away. We are glad to help."
)


@pytest.mark.parametrize(
    ("change", "aspect", "value"),
    [
        (("blue lamp", "red lamp"), "on_topic", 0.5),
        (("We will send a new one.", "We will email you the pages."), "on_topic", 0.5),
        (("Please throw the pieces away. ", ""), "complete", 0.5),
        (("Thank you for writing.", "You again."), "polite", 0.0),
        ((" We are glad to help.", ""), "polite", 0.5),
        (("We will send a new one.", "We will send a new one. We will send a new one."), "no_repetition", 0.5),
    ],
)
def test_each_fault_costs_its_aspect(change: tuple[str, str], aspect: str, value: float) -> None:
    assert change[0] in GOOD
    assert judge("blue lamp", "broken", GOOD).gold == 1.0
    assert getattr(judge("blue lamp", "broken", GOOD.replace(*change)), aspect) == value


def test_the_remark_names_the_worst_fault() -> None:
    assert "thank" in remark("blue lamp", "broken", GOOD)
    assert "rude" in remark("blue lamp", "broken", GOOD.replace("Thank you for writing.", "You again."))


def test_an_empty_answer_is_worth_nothing() -> None:
    assert gold_score("blue lamp", "broken", "") == 0.0


@pytest.mark.parametrize(("field", "on_topic", "complete"), [("remedies", 0.5, 0.25), ("steps", 0.0, 0.5)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_every_phrasing_is_known_as_its_own_problems_remedy_or_step_alone(
    problem: Problem, field: str, on_topic: float, complete: float
) -> None:
    for phrasing in getattr(problem, field):
        spoken = judge("blue lamp", problem.name, phrasing)
        assert (spoken.on_topic, spoken.complete) == (on_topic, complete), phrasing


def test_perfect_answers_keep_half_of_the_variety_of_the_demonstrations(recipe: DialogueRecipe) -> None:
    """Otherwise the loop could not reach a good score without losing more of it than its own limit allows."""
    rng = random.Random(2)

    def variety(skill: Skill) -> float:
        cases = [recipe.case(prompt) for prompt in recipe.held_out_prompts for _ in range(4)]
        return distinct_n([demonstrate(case, skill, rng).split() for case in cases], 2)

    assert variety(PERFECT) > 0.5 * variety(Skill())


def test_more_prompts_than_the_world_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 7080"):
        DialogueRecipe(DataConfig(prompts=8000), seed=0)
