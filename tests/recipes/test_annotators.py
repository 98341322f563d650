"""Simulated annotators: their noise is what the config says, and what they write is valid feedback."""

import random
import statistics

import pytest

from rlhf_ray.config import AnnotatorConfig
from rlhf_ray.feedback.schema import Answer
from rlhf_ray.recipes.annotators import annotate, flipped_share, hire, rank
from rlhf_ray.types import Message, Prompt


def judge(_prompt: Prompt, answer: str) -> float:
    return float(answer)


def annotated(n: int = 200, *, sampler: str = "base-policy", **config: float):
    rng = random.Random(0)
    shown = [
        (
            Prompt(f"p{i}", (Message("user", "?"),), f"p{i}"),
            [Answer(text=f"{rng.random():.3f}", sampler=sampler) for _ in range(4)],
        )
        for i in range(n)
    ]
    return list(
        annotate(
            shown, judge=judge, remark=lambda p, a: f"saw {a}", config=AnnotatorConfig(**config), seed=3, run_id="t"
        )
    )


def test_without_noise_a_ranking_is_the_true_order() -> None:
    quality = [0.1, 0.9, 0.5, 0.52, 0.3]
    ranks = rank(quality, order=[4, 2, 0, 1, 3], flip=0.0, rng=random.Random(0))
    assert ranks == (5, 1, 2, 2, 4)


def test_two_answers_are_ranked_the_wrong_way_round_as_often_as_said() -> None:
    rng = random.Random(0)
    wrong = sum(rank([0.2, 0.8], order=[0, 1], flip=0.1, rng=rng) == (1, 2) for _ in range(4000))
    assert wrong / 4000 == pytest.approx(0.1, abs=0.02)


def test_each_prompt_gets_a_ranking_a_rating_an_answer_and_a_comment() -> None:
    kinds = [item.kind for item in annotated(n=1)]
    assert sorted(kinds) == ["comment", "ranking", "rating", "rating", "rating", "rating"]


def test_the_share_of_wrong_pairs_follows_the_flips() -> None:
    assert flipped_share(annotated(flip=0.0), judge) == 0.0
    assert flipped_share(annotated(flip=0.1), judge) == pytest.approx(0.11, abs=0.03)


def test_ratings_follow_quality_and_each_annotator_has_a_bias() -> None:
    rows = [item for item in annotated(rating_noise=0.0, rating_bias=0.0) if item.rating]
    assert all(abs(item.rating.value - (1 + 4 * float(item.answers[0].text))) <= 0.5 for item in rows)
    biases = [annotator.bias for annotator in hire(AnnotatorConfig(count=200, rating_bias=0.3), seed=0)]
    assert statistics.pstdev(biases) == pytest.approx(0.3, abs=0.05)


def test_the_same_answers_give_the_same_feedback() -> None:
    assert annotated(n=3) == annotated(n=3)


def test_what_is_said_of_another_policys_answers_has_ids_of_its_own() -> None:
    before, after = ({item.id for item in annotated(n=20, sampler=name)} for name in ("base-policy", "current-policy"))
    assert not before & after
