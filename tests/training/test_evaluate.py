"""The evaluation: which figures come from which answers."""

import math
from typing import Any

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.training.evaluate import Evaluation, compare, diversity, evaluate, shown_samples, top_share
from rlhf_ray.types import Prompt
from tests.training.fakes import Roles, Tokenizer, make_prompts


class Recipe:
    """Gold is the response's place in the alphabet."""

    def __init__(self, known: bool = True) -> None:
        self.held_out_prompts = make_prompts(3)
        self.known = known

    def gold(self, prompt: Prompt, response: str) -> float | None:
        return (ord(response[0]) - 65) / 26 if self.known else None


def evaluated(recipe: Any, roles: Roles, samples: int = 4) -> Evaluation:
    config = load_config(None, ["run.id=t", "rollout.max_tokens=8"])
    told: Any = {"tokenizer": Tokenizer(), "config": config, "samples": samples, "name": "before"}
    return evaluate(recipe, roles, roles, **told)


def make_evaluation(gold: list[list[float]] | None, answers: list[list[str]] | None = None) -> Evaluation:
    rows = answers or [["a b", "c d"]] * len(gold or [])
    return Evaluation(rows, [[float(len(a)) for a in row] for row in rows], gold, finished=1.0)


def test_each_held_out_prompt_is_answered_as_often_as_asked() -> None:
    roles = Roles()
    evaluation = evaluated(Recipe(), roles)
    assert [len(row) for row in evaluation.answers] == [4, 4, 4]
    assert {request.prompt_id for request in roles.requests} == {"p0", "p1", "p2"}
    assert evaluation.scores[1][2] == ord(evaluation.answers[1][2])
    assert evaluation.gold is not None
    assert evaluation.gold[2][3] == (ord(evaluation.answers[2][3]) - 65) / 26


def test_without_a_gold_score_there_is_none() -> None:
    evaluation = evaluated(Recipe(known=False), Roles())
    assert evaluation.gold is None
    assert compare(evaluation, evaluation, seed=0)["gold"] is None


def test_the_gain_is_paired_by_prompt() -> None:
    before = make_evaluation([[0.1, 0.3], [0.5, 0.5], [0.9, 0.9]])
    after = make_evaluation([[0.3, 0.3], [0.6, 0.6], [1.0, 1.0]])
    gold = compare(before, after, seed=0)["gold"]
    assert gold["before"] == pytest.approx(1.6 / 3)
    assert gold["gain_ci95"] == pytest.approx([0.1, 0.1])
    assert gold["best_of_n"] == {"n": 2, "gold": pytest.approx((0.3 + 0.5 + 0.9) / 3)}


def test_what_choosing_by_reward_does_is_a_curve_along_kl() -> None:
    before = Evaluation([["a"] * 3] * 2, [[1, 2, 3], [3, 2, 1]], [[0.1, 0.5, 0.3], [0.9, 0.5, 0.1]], finished=1.0)
    curve = compare(before, before, seed=0)["best_of_n_by_reward"]
    assert [row["n"] for row in curve] == [1, 2, 3]
    assert [row["reward"] for row in curve] == pytest.approx([2, 8 / 3, 3])
    # pairs of the first prompt choose 0.5, 0.3, 0.3, those of the second 0.9, 0.9, 0.5
    assert [row["gold"] for row in curve] == pytest.approx([0.4, (1.1 / 3 + 2.3 / 3) / 2, 0.6])
    assert curve[2]["kl"] == pytest.approx(math.log(3) - 2 / 3)


def test_the_reward_model_is_asked_how_it_orders_what_each_policy_says() -> None:
    before = Evaluation([["a"] * 3] * 2, [[0, 1, 2], [0, 1, 2]], [[0.0, 0.5, 1.0], [0.5, 0.5, 0.5]], finished=1.0)
    after = Evaluation([["a"] * 3] * 2, [[0, 1, 2], [2, 0, 0]], [[0.0, 0.5, 0.3], [0.0, 0.9, 0.0]], finished=1.0)
    told = compare(before, after, seed=0, logit_scale=2.0)["ordering"]
    assert (told["before"]["pairs"], told["before"]["accuracy"]) == (3, 1.0)
    assert told["before"]["ece"] == pytest.approx(1 - (2 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-4))) / 3)
    # the first prompt: right of 0-0.5 and 0-0.3, wrong of 0.5-0.3; the second: wrong, and a tie is not right
    assert (told["after"]["pairs"], told["after"]["accuracy"]) == (5, pytest.approx((2 / 3 + 0) / 2))
    assert compare(before, after, seed=0)["ordering"]["after"]["ece"] is None


def test_gold_that_tells_nothing_apart_orders_nothing() -> None:
    same = make_evaluation([[0.5, 0.55]] * 2)
    nothing = {"pairs": 0, "accuracy": None, "accuracy_ci95": None, "ece": None}
    assert compare(same, same, seed=0, logit_scale=1.0)["ordering"] == {"before": nothing, "after": nothing}


def test_an_evaluation_survives_json() -> None:
    evaluation = evaluated(Recipe(), Roles())
    again = Evaluation(**evaluation.to_json())
    assert (again.answers, again.gold, again.scores) == (evaluation.answers, evaluation.gold, evaluation.scores)


def test_the_commonest_answer_and_diversity_are_over_equally_many_answers() -> None:
    evaluation = make_evaluation([[0, 0]] * 2, [["a b c", "x y"], ["a b c", "z w"]])
    assert top_share(evaluation, 1) == 1.0
    assert top_share(evaluation, 2) == 0.5
    assert diversity(evaluation, 1) == pytest.approx(2 / 4)


def test_ten_prompts_are_shown_with_their_first_answers() -> None:
    evaluation = make_evaluation([[0.25, 0.5]] * 12)
    shown = shown_samples(make_prompts(12), evaluation, evaluation)
    assert len(shown) == 10
    assert shown[0]["before"] == "a b"
    assert shown[0]["gold_after"] == 0.25


def test_who_wins_is_told_by_gold_and_where_there_is_none_by_the_reward_model() -> None:
    before = make_evaluation([[0.1, 0.3], [0.5, 0.5], [0.9, 0.9]])
    after = make_evaluation([[0.3, 0.3], [0.6, 0.4], [0.9, 0.95]])
    # pairs of answers to one prompt that are better, ties half: (1, 1, .5, .5), (1, 1, 0, 0), (.5, .5, 1, 1)
    found = compare(before, after, seed=0)["win_rate"]
    assert (found["by"], found["rate"]) == ("gold", pytest.approx((0.75 + 0.5 + 0.75) / 3))
    assert found["ci95"][0] <= found["rate"] <= found["ci95"][1]
    assert 0 < found["length_controlled"] < 1
    longer = make_evaluation(None, [["a b c", "c d e"], ["a b", "c d"]])
    shorter = make_evaluation(None, [["a", "c"], ["a b", "c d"]])
    assert compare(shorter, longer, seed=0)["win_rate"] | {"ci95": 0, "length_controlled": 0} == {
        "by": "the reward model", "rate": 0.75, "ci95": 0, "length_controlled": 0
    }  # fmt: skip


def test_what_the_answers_are_like_is_measured_on_as_many_of_each() -> None:
    answers = [["we send one", "we send one", "x y"], ["a b a b a b", "c", "z"]]
    text = compare(make_evaluation(None, [row[:2] for row in answers]), make_evaluation(None, answers), seed=0)["text"]
    assert text["before"] == text["after"]
    assert text["before"]["words"] == pytest.approx((3 + 3 + 6 + 1) / 4)
    assert text["before"]["self_bleu"] == pytest.approx(
        0.5
    )  # the first two are the same, the others have nothing alike
    assert text["before"]["repetition"] == pytest.approx(0.5 / 4)
