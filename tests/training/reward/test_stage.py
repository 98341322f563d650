"""Held-out pairs against the truth."""

import pytest

from rlhf_ray.data.judgements import Comparison, Ordered, Rated
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Answer, Feedback, Rating
from rlhf_ray.training.reward.stage import halves, truly_ordered
from rlhf_ray.types import Message, Prompt

PROMPT = Prompt("p", (Message("user", "?"),), "p")


class Recipe:
    def gold(self, prompt: Prompt, response: str) -> float | None:
        return None if response == "?" else float(response)


def test_choices_are_turned_the_right_way_round() -> None:
    items = [Ordered(PROMPT, ("0.9", "0.1"), (1, 2)), Ordered(PROMPT, ("0.2", "0.8"), (1, 2))]
    turned = truly_ordered(items[1:], Recipe())  # type: ignore[arg-type]
    assert turned == [Comparison(PROMPT, "0.8", "0.2")]


def test_every_two_answers_count_once_whoever_judged_them() -> None:
    items = [Ordered(PROMPT, ("0.9", "0.1"), (1, 2)), Ordered(PROMPT, ("0.1", "0.9"), (1, 2)), Rated(PROMPT, "0.5", 1)]
    turned = truly_ordered(items, Recipe())  # type: ignore[arg-type]
    assert sorted((pair.better, pair.worse) for pair in turned) == [("0.5", "0.1"), ("0.9", "0.1"), ("0.9", "0.5")]


def test_equal_answers_and_unknown_gold_are_left_out() -> None:
    items = [Ordered(PROMPT, ("0.5", "0.55"), (1, 2)), Ordered(PROMPT, ("?", "0.5"), (1, 2))]
    assert truly_ordered(items, Recipe()) == []  # type: ignore[arg-type]


def judgement(annotator: str) -> Feedback:
    told = {"messages": (Message("user", "Hi"),), "prompt_id": "p", "group": "p", "annotator": annotator}
    return Feedback(**told, answers=(Answer(text="Hello", sampler="base"),), rating=Rating(value=4))


def test_no_annotator_is_in_both_halves() -> None:
    feedback = [judgement(name) for name in ("d", "a", "c", "b", "a", "e")]
    first, second = halves(feedback)
    assert [item.annotator for item in first] == ["a", "c", "a", "e"]
    assert [item.annotator for item in second] == ["d", "b"]


def test_one_annotator_makes_no_two_halves() -> None:
    with pytest.raises(DataError, match="two annotators"):
        halves([judgement("ann"), judgement("ann")])
