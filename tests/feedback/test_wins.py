"""Who wins by what people said."""

from typing import Any

import pytest

from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.feedback.wins import wins
from rlhf_ray.types import Message


def said(prompt: str, *answers: Answer, annotator: str = "ann", **judgement: Any) -> Feedback:
    asked = {"messages": (Message("user", prompt),), "prompt_id": prompt, "group": prompt, "annotator": annotator}
    return Feedback(answers=answers, **asked, **judgement)


def by(sampler: str, version: int | None = None) -> Answer:
    return Answer(text="t", sampler=sampler, policy_version=version)


def ranked(prompt: str, answers: list[Answer], ranks: tuple[int, ...]) -> Feedback:
    return said(prompt, *answers, ranking=Ranking(ranks=ranks))


def test_each_prompt_counts_once_however_often_it_was_judged() -> None:
    pair = [by("a"), by("b")]
    feedback = [ranked("p", pair, (1, 2))] * 3 + [ranked("p", pair, (2, 1)), ranked("q", pair, (1, 1))]
    [duel] = wins(feedback)
    assert (duel.name, duel.other, duel.judgements, duel.prompts) == ("a", "b", 5, 2)
    assert duel.rate == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_a_ranking_compares_every_two_samplers_and_none_with_itself() -> None:
    duels = wins([ranked("p", [by("a"), by("a"), by("c"), by("b")], (1, 4, 2, 3))])
    assert [(duel.name, duel.other, duel.judgements, duel.rate) for duel in duels] == [
        ("a", "b", 2, 0.5),
        ("a", "c", 2, 0.5),
        ("b", "c", 1, 0.0),
    ]


def test_versions_of_a_served_policy_are_told_apart() -> None:
    [duel] = wins([ranked("p", [by("policy", 3), by("policy", 2)], (1, 2))])
    assert (duel.name, duel.other, duel.rate) == ("policy@2", "policy@3", 0.0)


def test_ratings_compare_where_one_annotator_gave_both_on_one_scale_and_of_one_aspect() -> None:
    def rating(sampler: str, value: float, annotator: str = "ann", **rest: Any) -> Feedback:
        return said("p", by(sampler), annotator=annotator, rating=Rating(value=value, **rest))

    feedback = [rating("a", 5), rating("b", 3), rating("b", 1, "another"), rating("b", 1, scale="thumb")]
    feedback += [rating("b", 5, aspect="tone"), said("p", by("a"), comment={"text": "good"})]
    [duel] = wins(feedback)
    assert (duel.judgements, duel.rate) == (1, 1.0)


def test_where_nobody_compared_there_is_nothing() -> None:
    assert wins([said("p", by("a"), rating=Rating(value=5)), said("q", by("b"), rating=Rating(value=1))]) == []
