"""The verdict: words that a reader will believe, so each turn of them is held to its figures."""

from typing import Any

import pytest

from rlhf_ray.training.verdict import closing_lines, engine_agrees, figure, learned, stays_varied, within_kl


def gold(low: float, high: float) -> dict[str, Any]:
    middle = (low + high) / 2
    return {"gold": {"before": 0.5, "after": 0.5 + middle, "gain_ci95": [low, high]}}


def reward(after: float, **more: Any) -> dict[str, Any]:
    return {"gold": None, "reward": {"before": 0.0, "after": after, "sd_before": 2.0}, **more}


@pytest.mark.parametrize(
    ("summary", "passed", "opening"),
    [
        (gold(0.3, 0.4), True, "The policy learned."),
        (gold(-0.02, 0.04), False, "No clear change."),
        (gold(-0.4, -0.3), False, "It got worse."),
        (reward(2.5), True, "The reward rose."),
        (reward(0.5), False, "The policy hardly changed."),
        (reward(-2.5), False, "It got worse."),
        ({}, None, "No held-out score"),
    ],
)
def test_the_verdict_follows_the_held_out_figures(summary: dict[str, Any], passed: bool | None, opening: str) -> None:
    check = learned(summary)
    assert check.passed is passed
    assert check.text.startswith(opening)


def test_a_gain_in_gold_is_told_with_its_interval() -> None:
    assert "from 0.50 to 0.85 on held-out prompts (+0.35, 95% interval +0.30 to +0.40)" in learned(gold(0.3, 0.4)).text


def test_a_gain_without_an_interval_is_not_believed() -> None:
    assert learned({"gold": {"before": 0.5, "after": 0.9}}).passed is None


def test_a_reward_that_rose_on_collapsed_answers_is_no_success() -> None:
    collapsed = reward(9.0, distinct_2={"before": 0.2, "after": 0.05})
    assert learned(collapsed).passed is False
    assert "collapsed" in learned(collapsed).text


def test_kl_is_judged_by_its_highest_step_too() -> None:
    summary = {"kl": 5.0, "kl_limit": 25.0}
    assert within_kl(summary, 24.0).passed is True
    assert within_kl(summary, 26.0).passed is False
    assert within_kl({"kl": 5.0}).passed is None


def test_one_answer_in_twenty_samples_or_half_the_bigrams_is_the_border() -> None:
    def varied(after: float, share: float) -> bool | None:
        summary = {"distinct_2": {"before": 0.2, "after": after}, "top_answer_share": {"before": 0.01, "after": share}}
        return stays_varied(summary).passed

    assert varied(0.1, 0.05) is True
    assert varied(0.099, 0.05) is False
    assert varied(0.1, 0.051) is False
    assert stays_varied({}).passed is None


def test_log_probs_that_differ_by_more_than_float_error_fail() -> None:
    assert engine_agrees({"mismatch_max_abs": 1e-4}).passed is True
    assert engine_agrees({"mismatch_max_abs": 2e-4}).passed is False
    assert engine_agrees({}).passed is None


@pytest.mark.parametrize("value", [None, True, "0.5", [], float("nan"), float("inf")])
def test_only_finite_numbers_are_figures(value: Any) -> None:
    assert figure({"a": {"b": value}}, "a", "b") is None
    assert figure({"a": [0.5]}, "a", 0) == 0.5
    assert figure({"a": 1}, "a", "b") is None


def test_the_closing_lines_answer_each_question_and_name_what_was_within_reach() -> None:
    summary = {
        "gold": {"before": 0.4, "after": 0.9, "gain_ci95": [0.4, 0.6], "best_of_n": {"n": 16, "gold": 0.88}},
        "kl": 3.0,
        "kl_limit": 2.0,
    }
    lines = closing_lines(summary)
    assert "yes" in lines[0]
    assert "best of 16" in lines[1]
    assert "0.88" in lines[1]
    assert "NO" in lines[2]
    assert "not known" in lines[3]
