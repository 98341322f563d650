"""Held-out pairs against the truth."""

from rlhf_ray.data.preferences import Comparison, Rated
from rlhf_ray.training.reward_stage import truly_ordered
from rlhf_ray.types import Message, Prompt

PROMPT = Prompt("p", (Message("user", "?"),), "p")


class Recipe:
    def gold(self, prompt: Prompt, response: str) -> float | None:
        return None if response == "?" else float(response)


def test_a_wrong_choice_is_turned_the_right_way_round() -> None:
    items = [Comparison(PROMPT, "0.9", "0.1"), Comparison(PROMPT, "0.2", "0.8")]
    turned = truly_ordered(items, Recipe())  # type: ignore[arg-type]
    assert [(item.better, item.worse) for item in turned] == [("0.9", "0.1"), ("0.8", "0.2")]


def test_equal_answers_unknown_gold_and_ratings_are_left_out() -> None:
    items = [Comparison(PROMPT, "0.5", "0.55"), Comparison(PROMPT, "?", "0.1"), Rated(PROMPT, "0.5", 3.0)]
    assert truly_ordered(items, Recipe()) == []  # type: ignore[arg-type]
