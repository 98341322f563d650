"""What a reward model is worth, against numbers worked by hand."""

import json
import random
from collections.abc import Sequence

import pytest

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Comparison, Judgement, Ordered, Rated, Thumbed
from rlhf_ray.training.reward.measure import (
    baselines,
    by_kind,
    gate,
    judged_by,
    length_bias,
    measure,
    order_of_ratings,
    order_of_thumbs,
    place_bias,
    told_by,
)
from rlhf_ray.types import Exchange
from tests.models.tiny import make_prompt


class LengthModel:
    """Scores an answer by its characters."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        return [float(len(exchange.response)) for exchange in exchanges]


def pairs_of(n: int, better: str, worse: str, **more: object) -> list[Comparison]:
    return [Comparison(make_prompt(f"{better} {worse} {i}"), better, worse, **more) for i in range(n)]  # type: ignore[arg-type]


def test_measures_equal_numbers_worked_by_hand() -> None:
    pairs = [pair for told in (("aaa", "a"), ("a", "aaa"), ("aaa", "aa")) for pair in pairs_of(1, *told)]
    told = measure(LengthModel(), pairs)  # type: ignore[arg-type]
    assert told["accuracy"] == pytest.approx(2 / 3)
    assert told["margin"] == pytest.approx((2 - 2 + 1) / 3)
    assert (told["longer"]["accuracy"], told["shorter"]["accuracy"]) == pytest.approx((2 / 3, 1 / 3))
    sigmoid_2, sigmoid_1 = 0.880797, 0.731059
    assert told["ece"] == pytest.approx((2 * abs(0.5 - sigmoid_2) + abs(1 - sigmoid_1)) / 3, abs=1e-5)
    assert [bar["count"] for bar in told["bins"]] == [1, 2]


def test_scores_that_are_equal_count_half_as_the_baselines_do() -> None:
    told = measure(LengthModel(), pairs_of(4, "ab", "cd"))  # type: ignore[arg-type]
    assert told["accuracy"] == 0.5
    assert not told["gate"]["passed"]


def test_a_temperature_mends_what_a_model_that_is_too_sure_says() -> None:
    """It is right in three of four, by hand log-odds of 1.0986, and says 2."""
    pairs = [*pairs_of(3, "aaa", "a"), *pairs_of(1, "b", "bbb")]
    told = measure(LengthModel(), pairs, temperature=2 / 1.0986123)  # type: ignore[arg-type]
    assert told["ece"] == pytest.approx(0.880797 - 0.75, abs=1e-5)
    assert told["ece_at_temperature"] == pytest.approx(0, abs=1e-6)


def test_where_nothing_compares_nothing_is_known_and_nothing_let_through() -> None:
    told = measure(LengthModel(), [])  # type: ignore[arg-type]
    assert (told["pairs"], told["accuracy"], told["margin"], told["ece"], told["bins"]) == (0, None, None, None, [])
    assert told["longer"]["accuracy"] is None
    assert told["gate"] == {
        "passed": False,
        "baseline": None,
        "baseline_accuracy": None,
        "better_by": None,
        "better_by_ci95": None,
    }
    assert json.dumps(told, allow_nan=False)


def test_one_group_says_nothing_and_its_interval_is_all_that_can_be() -> None:
    one = make_prompt("one")
    told = judged_by([1.0, 1.0, -1.0], [Comparison(one, "a", f"b{n}") for n in range(3)])
    assert (told["accuracy_ci95"], told["gate"]["better_by_ci95"]) == ([0, 1], [-1, 1])
    assert json.dumps(told, allow_nan=False)
    assert json.dumps(order_of_ratings([0.0, 1.0], [Rated(one, "a", 0.0), Rated(one, "b", 1.0)]), allow_nan=False)


def test_what_nobody_can_know_counts_half_for_the_baselines() -> None:
    told = baselines(pairs_of(4, "ab", "cd"))
    assert {name: found["accuracy"] for name, found in told.items()} == {"longer": 0.5, "shorter": 0.5, "majority": 0.5}


def test_the_majority_is_whatever_place_wins_more_often() -> None:
    pairs = [*pairs_of(3, "ab", "cd", better_first=False), *pairs_of(1, "ef", "gh", better_first=True)]
    assert baselines(pairs)["majority"]["accuracy"] == 0.75


def test_intervals_know_which_pairs_belong_to_one_group() -> None:
    one = make_prompt("one")
    alone = judged_by([1.0] * 30 + [-1.0] * 10, pairs_of(40, "a", "b"))
    together = judged_by([1.0] * 30 + [-1.0] * 10, [Comparison(one, "a", "b")] * 20 + pairs_of(20, "a", "b"))
    assert alone["accuracy"] == together["accuracy"] == 0.75
    width = {
        name: told["accuracy_ci95"][1] - told["accuracy_ci95"][0] for name, told in (("a", alone), ("t", together))
    }
    assert width["t"] > 1.5 * width["a"]
    assert (alone["groups"], together["groups"]) == (40, 21)


def test_accuracy_is_told_by_kind() -> None:
    pairs = [*pairs_of(2, "a", "b"), *pairs_of(1, "a", "b", kind="ratings")]
    assert {kind: found["accuracy"] for kind, found in by_kind([1.0, -1.0, 1.0], pairs).items()} == {
        "pairs": 0.5,
        "ratings": 1.0,
    }


def test_a_model_is_judged_by_the_kinds_that_it_learns_from_where_they_compare_anything() -> None:
    one = make_prompt("one")
    items: list[Judgement] = [Ordered(one, ("a", "b"), (1, 2)), Rated(one, "a", 0.0), Rated(one, "b", 1.0)]
    for feedback, kinds in (("pairs", ["pairs"]), ("ratings", ["ratings"]), ("comments", ["pairs", "ratings"])):
        assert [pair.kind for pair in told_by(items, RewardModelConfig(feedback=feedback))] == kinds
    weighed = RewardModelConfig.model_validate({"feedback": "joint", "weights": {"ratings": 0.0}})
    assert [pair.kind for pair in told_by(items, weighed)] == ["pairs"]


def test_the_gate_lets_through_what_is_surely_better_than_no_model() -> None:
    rng = random.Random(0)
    pairs = [pair for i in range(400) for pair in pairs_of(1, f"a{i}", f"b{i}x" if i % 3 else f"b{i}"[:1])]
    # the shorter is better in two of three
    good = gate([float(rng.random() < 0.85) for _ in pairs], pairs)
    assert (good["passed"], good["baseline"]) == (True, "shorter")
    assert good["baseline_accuracy"] == pytest.approx(2 / 3, abs=0.01)
    assert good["better_by"] == pytest.approx(0.85 - 2 / 3, abs=0.05)
    as_good_as = gate([float(len(pair.better) < len(pair.worse)) for pair in pairs], pairs)
    assert not as_good_as["passed"]  # it is the baseline
    assert not gate([float(rng.random() < 0.6) for _ in pairs], pairs)["passed"]


def test_chance_seldom_passes_the_gate() -> None:
    rng, passed = random.Random(0), 0
    pairs = pairs_of(200, "a", "b")
    for _ in range(300):
        passed += gate([float(rng.random() < 0.5) for _ in pairs], pairs)["passed"]
    assert passed / 300 < 0.05  # one side of a 95% interval: 0.025


def test_a_model_that_goes_by_length_is_seen_to() -> None:
    pairs = [*pairs_of(3, "aaa", "a"), *pairs_of(2, "b", "bbbb")]
    told = length_bias([len(pair.better) - len(pair.worse) for pair in pairs], pairs)
    assert told["correlation"] == pytest.approx(1)
    assert (told["longer_is_better"]["accuracy"], told["shorter_is_better"]["accuracy"]) == (1, 0)
    fair = length_bias([1.0] * 5, pairs)
    assert (fair["longer_is_better"]["accuracy"], fair["shorter_is_better"]["accuracy"]) == (1, 1)
    assert length_bias([1.0], pairs_of(1, "ab", "cd"))["longer_is_better"] is None


def test_a_liking_for_a_place_is_seen() -> None:
    pairs = [*pairs_of(6, "a", "b", better_first=True), *pairs_of(2, "c", "d", better_first=False)]
    told = place_bias([1.0] * 6 + [-1.0] * 2, pairs)
    assert told["first_preferred"]["share"] == 0.75
    assert (told["first_is_better"]["accuracy"], told["first_is_worse"]["accuracy"]) == (1, 0)
    assert place_bias([1.0], pairs_of(1, "a", "b"))["first_preferred"] is None


def test_scores_order_answers_as_ratings_do() -> None:
    rated = [
        Rated(make_prompt(f"{n}"), text, target + shift, annotator="ann")
        for n, shift in enumerate((0.0, 3.0, -2.0))
        for text, target in (("a", 0.0), ("b", 1.0), ("c", 2.0))
    ]
    within = order_of_ratings([0.0, 1.0, 2.0] * 3, rated)
    assert within is not None
    assert within["within"]["spearman"] == pytest.approx(1)
    assert within["overall"]["spearman"] < 0.7  # it knows nothing of the prompts' own level
    exact = order_of_ratings([item.target for item in rated], rated)
    assert exact is not None
    assert exact["overall"]["spearman"] == pytest.approx(1)
    assert order_of_ratings([], []) is None


def test_prompts_whose_answers_were_all_rated_alike_order_nothing() -> None:
    rated = [Rated(make_prompt("one"), text, 0.0, annotator="ann") for text in "abc"]
    told = order_of_ratings([1.0, 2.0, 3.0], rated)
    assert told is not None
    assert (told["overall"], told["within"]) == (None, None)


def test_a_thumb_up_has_the_higher_score_by_hand() -> None:
    """Of 2 x 3 pairs of a thumb up and one down, 4 are in order and one is even."""
    thumbs = [Thumbed(make_prompt(f"{n}"), "a", up=up) for n, up in enumerate((True, True, False, False, False))]
    told = order_of_thumbs([2.0, 1.0, 1.5, 1.0, 0.0], thumbs)
    assert told is not None
    assert told["auc"] == pytest.approx(4.5 / 6)
    assert told["ci95"][0] < 4.5 / 6 < told["ci95"][1]
    assert order_of_thumbs([1.0], thumbs[:1]) is None
    assert order_of_thumbs([], []) is None
