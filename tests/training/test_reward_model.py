import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.algo.ranking import pairwise_loss
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.preferences import Comparison, Rated
from rlhf_ray.errors import DataError
from rlhf_ray.models.reward import RewardModel, load_reward_model, new_reward_model
from rlhf_ray.training.reward_losses import RankingLoss, RatingLoss, marked, ranked
from rlhf_ray.training.reward_model import (
    baselines,
    cross_validate,
    fit_reward_model,
    measure,
    pairs_of,
    shuffled,
    standardise,
)
from rlhf_ray.types import Exchange
from tests.models.tiny import make_policy_folder, make_prompt
from tests.training.fakes import loss_and_terms

FIT = {"learning_rate": 5e-3, "batch_size": 16, "max_epochs": 6, "eval_every": 10}
GOOD, BAD = "sorry, we pay you back", "we send a new one today"


def make_config(*, fit: dict[str, Any] | None = None, **overrides: Any) -> RewardModelConfig:
    return RewardModelConfig(**{"fit": {**FIT, **(fit or {})}, **overrides})


def choices(n: int, *, start: int = 0) -> list[Comparison]:
    """Everybody likes the answer that says sorry, whatever else it says."""
    rng = random.Random(start)
    words = ["lamp", "chair", "today", "new", "broken"]
    return [
        Comparison(make_prompt(f"my lamp {number}"), f"{rng.choice(words)} sorry", f"{rng.choice(words)} today")
        for number in range(start, start + n)
    ]


def ratings(n: int, *, start: int = 0) -> list[Rated]:
    return [
        rated
        for pair in choices(n, start=start)
        for rated in (Rated(pair.prompt, pair.better, 4.0), Rated(pair.prompt, pair.worse, 2.0))
    ]


def learn(
    tmp_path: Path, train: Sequence[Any], *, held_out: Sequence[Any] | None = None, **config: Any
) -> dict[str, Any]:
    return fit_reward_model(
        make_policy_folder(tmp_path / "base"),
        train,
        held_out=choices(40, start=1000) if held_out is None else held_out,
        config=make_config(**config),
        folder=tmp_path / "reward",
        seed=0,
        progress=lambda line: None,
    )


@pytest.mark.parametrize("backbone", ["decoder", "encoder"])
def test_it_learns_what_people_choose(tmp_path: Path, backbone: str) -> None:
    metrics = learn(tmp_path, choices(160), backbone=backbone)
    low, high = metrics["accuracy_ci95"]
    assert metrics["accuracy"] > 0.9
    assert 0.8 < low <= metrics["accuracy"] <= high
    assert metrics["pairs"] == 40
    assert metrics["margin"] > 0.5
    assert metrics["curve"][-1]["val_loss"] < metrics["curve"][0]["val_loss"]


def test_it_learns_from_ratings(tmp_path: Path) -> None:
    metrics = learn(tmp_path, ratings(100), feedback="ratings", held_out=ratings(40, start=1000))
    assert (metrics["accuracy"] > 0.9, metrics["pairs"]) == (True, 40)


def test_labels_that_say_nothing_teach_nothing(tmp_path: Path) -> None:
    metrics = learn(tmp_path, choices(160), shuffle_labels=True, held_out=choices(200, start=1000))
    assert metrics["shuffled_labels"]
    assert metrics["validation_loss"] > 0.6  # ln 2 is 0.693


def test_shuffling_turns_half_the_choices_and_deals_out_the_same_ratings() -> None:
    turned = shuffled(choices(400), seed=0)
    assert 150 < sum(item.better.endswith("today") for item in turned if isinstance(item, Comparison)) < 250
    dealt = [item.rating for item in shuffled(ratings(50), seed=0) if isinstance(item, Rated)]
    assert sorted(dealt) == sorted(item.rating for item in ratings(50))
    assert dealt != [item.rating for item in ratings(50)]


def test_the_saved_folder_gives_the_standardised_scores_to_plain_transformers(tmp_path: Path) -> None:
    train = choices(80)
    metrics = learn(tmp_path, train, fit={"max_epochs": 2})
    exchanges = [Exchange(pair.prompt, text) for pair in train for text in (pair.better, pair.worse)]
    saved = load_reward_model(tmp_path / "reward")
    scores = torch.tensor(saved.score(exchanges))
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert scores.mean().item() == pytest.approx(metrics["score_mean"], abs=1e-3)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = torch.tensor(saved.encode(exchanges[:1]))
    assert plain(ids).logits.item() == pytest.approx(scores[0].item(), abs=1e-5)


@pytest.mark.parametrize(("backbone", "folded"), [("decoder", "scale"), ("encoder", "scale and shift")])
def test_a_head_with_a_bias_takes_the_mean_too(tmp_path: Path, backbone: Any, folded: str) -> None:
    reward_model = new_reward_model(make_policy_folder(tmp_path / "base"), backbone, texts=[GOOD, BAD] * 9)
    exchanges = [Exchange(pair.prompt, text) for pair in choices(30) for text in (pair.better, pair.worse)]
    before = torch.tensor(reward_model.score(exchanges))
    told = standardise(reward_model, exchanges, confirming=[])
    after = torch.tensor(reward_model.score(exchanges))
    assert told["folded"] == folded
    assert after.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert after.mean().item() == pytest.approx(told["score_mean"], abs=1e-3)
    assert (told["score_mean"] == 0) == (backbone == "encoder")
    differences = (after - after[0]) * told["logit_scale"]
    assert torch.allclose(differences, before - before[0], atol=1e-5)


def test_a_model_that_learnt_from_coins_says_next_to_nothing_and_one_that_learnt_says_as_much_as_ever(
    tmp_path: Path,
) -> None:
    noise = learn(tmp_path / "noise", choices(200), fit={"max_epochs": 2}, shuffle_labels=True)
    sense = learn(tmp_path / "sense", choices(200), fit={"max_epochs": 2})
    assert noise["score_std"] < 0.1
    assert sense["score_std"] == pytest.approx(1, abs=1e-3)


def test_one_seed_gives_one_reward_model(tmp_path: Path) -> None:
    for name in ("first", "again"):
        learn(tmp_path / name, choices(40), fit={"max_epochs": 1})
    first, again = (load_reward_model(tmp_path / name / "reward").model.state_dict() for name in ("first", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_too_few_to_hold_any_out_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot hold out"):
        learn(tmp_path, choices(1))
    assert not (tmp_path / "reward").exists()


def test_cross_validation_judges_every_pair_once(tmp_path: Path) -> None:
    told = cross_validate(
        make_policy_folder(tmp_path / "base"),
        choices(120),
        config=make_config(fit={"max_epochs": 4}),
        folds=3,
        seed=0,
        progress=lambda line: None,
    )
    assert (len(told["folds"]), told["pairs"]) == (3, 120)
    assert told["accuracy"] == pytest.approx(sum(told["folds"]) / 3, abs=1e-6)
    assert told["accuracy_ci95"][0] > 0.7
    assert told["longer"]["accuracy"] + told["shorter"]["accuracy"] == pytest.approx(1, abs=0.01)


class LengthModel:
    """Scores an answer by its characters."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        return [float(len(exchange.response)) for exchange in exchanges]


def test_measures_equal_numbers_worked_by_hand() -> None:
    prompt = make_prompt()
    pairs = [Comparison(prompt, "aaa", "a"), Comparison(prompt, "a", "aaa"), Comparison(prompt, "aaa", "aa")]
    told = measure(LengthModel(), pairs)  # type: ignore[arg-type]
    assert told["accuracy"] == pytest.approx(2 / 3)
    assert told["margin"] == pytest.approx((2 - 2 + 1) / 3)
    assert (told["longer"]["accuracy"], told["shorter"]["accuracy"]) == pytest.approx((2 / 3, 1 / 3))
    sigmoid_2, sigmoid_1 = 0.880797, 0.731059
    assert told["ece"] == pytest.approx((2 * abs(0.5 - sigmoid_2) + abs(1 - sigmoid_1)) / 3, abs=1e-5)
    assert [bar["count"] for bar in told["bins"]] == [1, 2]


def test_scores_that_are_equal_are_not_counted_as_right() -> None:
    told = measure(LengthModel(), [Comparison(make_prompt(), "ab", "cd")] * 4)  # type: ignore[arg-type]
    assert told["accuracy"] == 0


def test_answers_of_equal_length_count_half_for_both_baselines() -> None:
    told = baselines([Comparison(make_prompt(), "ab", "cd")] * 4)
    assert (told["longer"]["accuracy"], told["shorter"]["accuracy"]) == (0.5, 0.5)


def test_ratings_make_pairs_of_the_answers_to_one_prompt_that_they_tell_apart() -> None:
    one, other = make_prompt("one"), make_prompt("other")
    items = [Rated(one, "a", 5.0), Rated(one, "b", 3.0), Rated(one, "c", 3.0), Rated(other, "d", 1.0)]
    assert pairs_of(items) == [Comparison(one, "a", "b"), Comparison(one, "a", "c")]


def make_reward_model(tmp_path: Path) -> RewardModel:
    return new_reward_model(make_policy_folder(tmp_path / "base"), "decoder")


def test_a_prompts_answers_are_scored_once_for_all_their_pairs(tmp_path: Path) -> None:
    prompt = make_prompt()
    pairs = [Comparison(prompt, "a", "b"), Comparison(prompt, "a", "c"), Comparison(prompt, "b", "c")]
    [item] = ranked(make_reward_model(tmp_path), pairs)
    assert len(item.texts) == 3
    assert item.pairs == ((0, 1), (0, 2), (1, 2))


def test_the_ranking_loss_is_that_of_each_pair_by_itself(tmp_path: Path) -> None:
    reward_model = make_reward_model(tmp_path)
    torch.nn.init.normal_(reward_model.model.score.weight, generator=torch.Generator().manual_seed(0))
    pairs = [Comparison(make_prompt("one"), "a", "b"), Comparison(make_prompt("two"), GOOD, BAD)]
    pairs += [Comparison(make_prompt("one"), "lamp", "b")]
    loss = RankingLoss(reward_model)
    total, terms = loss_and_terms(loss, reward_model.model, loss.collate(ranked(reward_model, pairs)))
    better = torch.tensor(reward_model.score([Exchange(pair.prompt, pair.better) for pair in pairs]))
    worse = torch.tensor(reward_model.score([Exchange(pair.prompt, pair.worse) for pair in pairs]))
    assert terms == 3
    assert total.item() == pytest.approx(3 * pairwise_loss(better, worse).item(), rel=1e-4)


def test_the_rating_loss_is_the_squared_distance_to_standardised_ratings(tmp_path: Path) -> None:
    reward_model = make_reward_model(tmp_path)
    items = [Rated(make_prompt(), GOOD, 5.0), Rated(make_prompt(), BAD, 1.0)]
    rows = marked(reward_model, items, like=items)
    assert [row.target for row in rows] == [1.0, -1.0]
    loss = RatingLoss(reward_model)
    total, terms = loss_and_terms(loss, reward_model.model, loss.collate(rows))
    good, bad = reward_model.score([Exchange(item.prompt, item.response) for item in items])
    assert (terms, total.item()) == (2, pytest.approx((good - 1) ** 2 + (bad + 1) ** 2, rel=1e-4))
