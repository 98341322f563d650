"""Held-out pairs against the truth."""

from typing import Any

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.data.judgements import Comparison, Ordered, Rated, counted
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.training.reward.stage import halves, read_sides, truly_ordered
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


def ranked(n: int, annotator: str = "ann") -> list[Feedback]:
    return [
        judgement(annotator).model_copy(
            update={
                "prompt_id": f"{i}",
                "group": f"{i}",
                "answers": tuple(Answer(text=text, sampler="base") for text in "abc"),
                "rating": None,
                "ranking": Ranking(ranks=(1, 2, 2)),
            }
        )
        for i in range(n)
    ]


def test_sides_share_no_group_and_are_read_by_what_the_first_has_taught() -> None:
    train, held_out, _ = read_sides(ranked(20), load_config(None, ["reward_model.held_out=0.25"]))
    groups = [{item.prompt.group for item in side} for side in (train, held_out)]
    assert (len(groups[0]), len(groups[1]), groups[0] & groups[1]) == (15, 5, set())


def test_a_limit_counts_pairs_where_pairs_are_learnt_from_and_judgements_elsewhere() -> None:
    for feedback, kinds in (("pairs", {"pairs": 7}), ("rankings", {"rankings": 7})):
        told = load_config(None, ["reward_model.limit=7", f"reward_model.feedback={feedback}"])
        train, _, _ = read_sides(ranked(20), told)
        assert counted(train) == kinds


@pytest.mark.parametrize(
    ("feedback", "said"),
    [("thumbs", "holds no thumbs to learn from, but rankings"), ("comments", "worth something only beside ratings")],
)
def test_nothing_to_learn_from_is_an_error_that_says_what_there_is(feedback: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_sides(ranked(20), load_config(None, [f"reward_model.feedback={feedback}"]))


def rated(n: int, **rating: Any) -> list[Feedback]:
    """One answer to each prompt."""
    return [
        judgement("ann").model_copy(
            update={"prompt_id": f"{i}", "group": f"{i}", "rating": Rating(value=1 + i % 5, **rating)}
        )
        for i in range(n)
    ]


def test_answers_that_stand_alone_are_learnt_from_too() -> None:
    train, held_out, _ = read_sides(rated(20), load_config(None, ["reward_model.feedback=ratings"]))
    assert (counted(train), counted(held_out)) == ({"ratings": 18}, {"ratings": 2})


def test_ratings_of_aspects_that_do_not_count_are_neither_learnt_from_nor_measured_by() -> None:
    feedback = [*rated(20), *rated(20, aspect="verbosity")]
    train, held_out, _ = read_sides(feedback, load_config(None, ["reward_model.feedback=ratings"]))
    assert (counted(train), counted(held_out)) == ({"ratings": 18}, {"ratings": 2})
    with pytest.raises(DataError, match=r"rates verbosity, and nothing of overall.*aspects=\{verbosity: 1\.0\}"):
        read_sides(rated(20, aspect="verbosity"), load_config(None, ["reward_model.feedback=ratings"]))
    misspelt = ["reward_model.feedback=ratings", "reward_model.aspects={overall: 0.7, verbocity: 0.3}"]
    with pytest.raises(DataError, match=r"nobody rated verbocity.*ratings are of overall, verbosity"):
        read_sides(feedback, load_config(None, misspelt))


def test_ties_alone_teach_nothing_until_they_are_asked() -> None:
    tied = [item.model_copy(update={"ranking": Ranking(ranks=(1, 1, 1))}) for item in ranked(20)]
    with pytest.raises(DataError, match=r"that are all ties.*reward_model\.ties=davidson"):
        read_sides(tied, load_config(None, []))
    train, _, _ = read_sides(tied, load_config(None, ["reward_model.ties=davidson"]))
    assert counted(train) == {"rankings": 18}
