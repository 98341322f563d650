import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Judgement, Ordered, Rated, Thumbed, comparisons, exchanges_of
from rlhf_ray.errors import DataError
from rlhf_ray.models.ensemble import load_ensemble
from rlhf_ray.models.files import members_of
from rlhf_ray.models.reward import load_reward_model, new_reward_model
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.training import fit
from rlhf_ray.training.reward.learn import fit_reward_model, shuffled
from rlhf_ray.training.reward.scale import Evidence, Unseen, standardise
from rlhf_ray.types import Exchange
from tests.models.tiny import make_policy_folder, make_prompt

FIT = {"learning_rate": 5e-3, "batch_size": 16, "max_epochs": 6, "eval_every": 10}
ONE_FIT = {"confirmed_by": 0}
"""Where nothing is asked about how loud scores are, no other models are fitted to find out."""
GOOD, BAD = "sorry, we pay you back", "we send a new one today"


def make_config(*, fit: dict[str, Any] | None = None, **overrides: Any) -> RewardModelConfig:
    return RewardModelConfig(**{"fit": {**FIT, **(fit or {})}, **ONE_FIT, **overrides})


def choices(n: int, *, start: int = 0) -> list[Ordered]:
    """Everybody likes the answer that says sorry, whatever else it says; it stands first or second."""
    rng = random.Random(start)
    words = ["lamp", "chair", "today", "new", "broken"]
    made = []
    for number in range(start, start + n):
        answers = f"{rng.choice(words)} sorry", f"{rng.choice(words)} today"
        ranks = (1, 2) if rng.random() < 0.5 else (2, 1)
        made.append(Ordered(make_prompt(f"my lamp {number}"), answers if ranks == (1, 2) else answers[::-1], ranks))
    return made


def rankings(n: int, *, start: int = 0) -> list[Ordered]:
    """Three answers: sorry, then anything else, which is all the same."""
    return [
        Ordered(make_prompt(f"my lamp {number}"), ("today", "new sorry", "broken"), (2, 1, 2))
        for number in range(start, start + n)
    ]


def ratings(n: int, *, start: int = 0) -> list[Rated]:
    return [
        Rated(item.prompt, answer, 1.0 if "sorry" in answer else -1.0)
        for item in choices(n, start=start)
        for answer in item.answers
    ]


def thumbs(n: int, *, start: int = 0) -> list[Thumbed]:
    return [Thumbed(item.prompt, item.response, item.target > 0) for item in ratings(n, start=start)]


def comments(n: int, *, start: int = 0) -> list[Rated]:
    return [replace(item, kind="comments", weight=0.5) for item in ratings(n, start=start)]


KINDS: dict[str, list[Judgement]] = {
    "pairs": [*choices(160)],
    "rankings": [*rankings(100), *choices(40, start=100)],
    "ratings": [*ratings(100)],
    "thumbs": [*thumbs(100)],
    "comments": [*comments(100)],
    "joint": [*choices(40), *rankings(40, start=40), *ratings(40, start=80), *thumbs(40, start=120)],
}


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


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_learns_from_every_kind_and_from_all_together(tmp_path: Path, kind: str) -> None:
    ties = "none" if kind == "rankings" else "davidson"
    metrics = learn(tmp_path, KINDS[kind], feedback=kind, ties=ties, fit={"max_epochs": 10})
    assert metrics["accuracy"] > 0.9
    assert sum(metrics["train_items"].values()) == len(KINDS[kind])


def test_what_it_does_not_learn_from_it_does_not_see(tmp_path: Path) -> None:
    wrong = [replace(item, target=-item.target) for item in ratings(100)]
    metrics = learn(tmp_path, [*choices(160), *wrong], feedback="pairs")
    assert metrics["accuracy"] > 0.9
    assert metrics["train_items"] == {"pairs": 160}


def test_a_kind_counts_for_what_its_weight_says(tmp_path: Path) -> None:
    wrong = [replace(item, target=-item.target) for item in ratings(100)]
    metrics = learn(tmp_path, [*choices(100), *wrong], feedback="joint", weights={"ratings": 0.0})
    assert metrics["accuracy"] > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_ties_that_teach_nothing_leave_the_others_enough_to_end_the_fit_by(tmp_path: Path, seed: int) -> None:
    """Of twelve prompts one decides when to stop; it was one with nothing but a tie now and then."""
    draw = random.Random(seed)
    items = [replace(item, ranks=(1, 1)) if draw.random() < 0.25 else item for item in choices(12)]
    metrics = fit_reward_model(
        make_policy_folder(tmp_path / "base"),
        items,
        held_out=choices(20, start=1000),
        config=make_config(confirmed_by=50, fit={"max_epochs": 0.5}),
        folder=None,
        seed=seed,
        progress=lambda line: None,
    )
    told_apart = sum(item.ranks != (1, 1) for item in items)
    assert metrics["train_items"] == {"pairs": told_apart}
    assert metrics["confirmed_by"]["choices"] == told_apart


def test_where_each_answer_stands_alone_it_learns_and_says_that_nothing_was_compared(tmp_path: Path) -> None:
    """As what a served policy's users say: a thumb, or stars, on the one answer that each got."""
    train, held_out = (
        [*thumbs(n, start=start)[::2], *thumbs(n, start=start + n)[1::2]] for n, start in ((200, 0), (60, 1000))
    )
    metrics = learn(tmp_path, train, held_out=held_out, feedback="thumbs")
    assert (metrics["pairs"], metrics["accuracy"], metrics["gate"]["passed"]) == (0, None, False)
    assert metrics["thumbs"]["auc"] > 0.9
    assert metrics["thumbs"]["n"] == 120
    assert metrics["score_std"] == pytest.approx(1, abs=1e-3)
    assert metrics["confirmed_by"]["across_prompts"]
    noise = learn(tmp_path / "noise", train, held_out=held_out, feedback="thumbs", shuffle_labels=True)
    assert noise["score_std"] < 0.2


def test_the_prompts_of_a_step_can_be_shared_out(tmp_path: Path) -> None:
    """Sixteen answers are five prompts of three, which four parts of a step cannot have alike: they have four."""
    shared = {"batch_size": 16, "max_epochs": 1, "trainer": {"gradient_accumulation_steps": 4}}
    assert learn(tmp_path, rankings(40), feedback="rankings", fit=shared)["steps"] == 9  # of 36 that are learnt from


def test_its_temperature_is_that_of_what_it_did_not_learn_from(tmp_path: Path) -> None:
    """One choice in five is the wrong way round: who has learnt for long is too sure, and is told by how much."""
    data = [
        replace(item, ranks=item.ranks[::-1]) if number % 5 == 0 else item for number, item in enumerate(choices(300))
    ]
    wrong = [
        replace(item, ranks=item.ranks[::-1]) if number % 5 == 0 else item
        for number, item in enumerate(choices(200, start=1000))
    ]
    metrics = learn(tmp_path, data, held_out=wrong, confirmed_by=200, fit={"max_epochs": 20, "patience": 50})
    assert metrics["ece_at_temperature"] < 0.1
    assert metrics["ece_at_temperature"] < metrics["ece"] + 0.02


def test_each_aspect_has_a_head_and_the_reward_is_their_sum(tmp_path: Path) -> None:
    """Saying sorry is polite and no help; the help counts three times as much."""
    train = [
        replace(item, aspect=aspect, target=sign * item.target)
        for item in ratings(100)
        for aspect, sign in (("polite", 1), ("helpful", -1))
    ]
    for weights, likes_sorry in (({"polite": 1.0, "helpful": 3.0}, False), ({"polite": 3.0, "helpful": 1.0}, True)):
        metrics = learn(tmp_path / str(likes_sorry), train, feedback="ratings", aspects=weights, fit={"max_epochs": 10})
        assert (metrics["accuracy"] > 0.9) == likes_sorry
        assert load_reward_model(tmp_path / str(likes_sorry) / "reward").model.config.num_labels == 1


def test_heads_know_less_of_what_was_never_judged_and_strange_texts_are_flagged(tmp_path: Path) -> None:
    metrics = learn(tmp_path, choices(160), ensemble={"heads": 8})
    saved = load_reward_model(tmp_path / "reward")
    alike = saved.consider(exchanges_of(choices(60, start=200)))
    other = saved.consider([Exchange(make_prompt("%&/ 123 $$"), "QQQ ### 999 " * 9)] * 2)
    assert sum(alike.spreads) / len(alike.spreads) < 0.5 * min(other.spreads)
    assert sum(alike.strange) / len(alike.strange) < 0.2
    assert all(other.strange)
    assert alike.rewards == pytest.approx(saved.score(exchanges_of(choices(60, start=200))), abs=1e-5)
    assert metrics["sureness"]["surest"]["accuracy"] >= metrics["sureness"]["least_sure"]["accuracy"] - 0.1


def test_an_ensembles_members_differ_and_are_measured_together(tmp_path: Path) -> None:
    metrics = learn(tmp_path, choices(80), fit={"max_epochs": 2}, ensemble={"members": 3, "heads": 0})
    members = [load_reward_model(path) for path in members_of(tmp_path / "reward")]
    exchanges = exchanges_of(choices(40, start=1000))
    scores = torch.tensor([member.score(exchanges) for member in members])
    assert len(members) == 3
    assert all(not torch.allclose(scores[0], other, atol=1e-3) for other in scores[1:])
    means = dict(zip(exchanges, scores.mean(0).tolist(), strict=True))
    pairs = comparisons(choices(40, start=1000))
    right = [means[Exchange(p.prompt, p.better)] > means[Exchange(p.prompt, p.worse)] for p in pairs]
    assert metrics["accuracy"] == pytest.approx(sum(right) / 40)
    told = exchanges_of(choices(80))
    centres = torch.tensor([member.score(told) for member in members]).mean(1)
    apart = (scores - centres[:, None]).std(0, correction=0).tolist()
    assert metrics["sureness"]["spread"] == pytest.approx(sum(apart) / len(apart), rel=0.01)
    assert ModelSource(members).score(exchanges).spreads == pytest.approx(apart, abs=1e-3)
    assert load_ensemble(tmp_path / "reward").score(exchanges) == pytest.approx(scores.mean(0).tolist(), abs=1e-5)


def test_a_small_matrix_beside_each_layer_learns_and_is_merged(tmp_path: Path) -> None:
    metrics = learn(tmp_path, choices(160), lora={"rank": 4}, fit={"learning_rate": 2e-2})
    assert metrics["accuracy"] > 0.9
    assert not [name for name in load_reward_model(tmp_path / "reward").model.state_dict() if "lora" in name]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {"rank": 4, "quantised": True}}, "merged into its weights"),
        ({"lora": {"rank": 4}, "backbone": "linear"}, "stays as it is"),
        ({"backbone": "linear", "linear": {"solver": "ridge"}}, "take gradient"),
        ({"aspects": {"overall": 0.0}}, "has to count for something"),
        ({"feedback": "rankings", "smoothing": 0.1}, "smoothing is said of choices between two"),
        ({"feedback": "rankings", "margin": 1.0}, "margin is said of choices between two"),
        ({"feedback": "rankings", "ties": "davidson"}, "ties is said of choices between two"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_config(**settings)


@pytest.mark.parametrize(("feedback", "solver"), [("pairs", "gradient"), ("ratings", "gradient"), ("ratings", "ridge")])
def test_a_line_through_the_bodys_features_learns_too(tmp_path: Path, feedback: str, solver: str) -> None:
    body = learn(tmp_path, choices(160), backbone="encoder") and tmp_path / "reward"
    told = {"backbone": "linear", "body": body, "linear": {"solver": solver}}
    metrics = learn(tmp_path / "line", KINDS[feedback], feedback=feedback, **told)
    assert metrics["accuracy"] > 0.9
    before, after = (load_reward_model(path).model.state_dict() for path in (body, tmp_path / "line" / "reward"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_labels_that_say_nothing_teach_nothing(tmp_path: Path) -> None:
    metrics = learn(tmp_path, choices(160), shuffle_labels=True, held_out=choices(200, start=1000))
    assert metrics["shuffled_labels"]
    assert metrics["validation_loss"] > 0.6  # ln 2 is 0.693


def test_shuffling_turns_half_the_orders_and_deals_out_the_same_ratings_and_thumbs() -> None:
    before = choices(400)
    after = shuffled(before, seed=0)
    turned = sum(
        one.ranks != other.ranks for one, other in zip(before, after, strict=True) if isinstance(other, Ordered)
    )
    assert 150 < turned < 250
    dealt = [item.target for item in shuffled(ratings(50), seed=0) if isinstance(item, Rated)]
    assert sorted(dealt) == sorted(item.target for item in ratings(50))
    assert dealt != [item.target for item in ratings(50)]
    held_up = [item.up for item in shuffled(thumbs(50), seed=0) if isinstance(item, Thumbed)]
    assert sum(held_up) == 50
    assert held_up != [item.up for item in thumbs(50)]


def test_a_ranking_turned_round_has_its_ties_still() -> None:
    ranked = [Ordered(make_prompt(), ("a", "b", "c", "d"), (1, 2, 2, 4))] * 40
    assert {item.ranks for item in shuffled(ranked, seed=0) if isinstance(item, Ordered)} == {
        (1, 2, 2, 4),
        (4, 2, 2, 1),
    }


def test_the_saved_folder_gives_the_standardised_scores_to_plain_transformers(tmp_path: Path) -> None:
    train = choices(80)
    metrics = learn(tmp_path, train, fit={"max_epochs": 2})
    exchanges = exchanges_of(train)
    saved = load_reward_model(tmp_path / "reward")
    scores = torch.tensor(saved.score(exchanges))
    assert scores.std(correction=0).item() == pytest.approx(metrics["score_std"], rel=1e-3)
    assert scores.mean().item() == pytest.approx(metrics["score_mean"], abs=1e-3)
    assert saved.mean == metrics["score_mean"] != 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = torch.tensor(saved.encode(exchanges[:1]))
    assert plain(ids).logits.item() == pytest.approx(scores[0].item(), abs=1e-5)


@pytest.mark.parametrize(("backbone", "folded"), [("decoder", "scale"), ("encoder", "scale and shift")])
def test_a_head_with_a_bias_takes_the_mean_too(tmp_path: Path, backbone: Any, folded: str) -> None:
    reward_model = new_reward_model(make_policy_folder(tmp_path / "base"), backbone, texts=[GOOD, BAD] * 9)
    exchanges = exchanges_of(choices(30))
    before = torch.tensor(reward_model.score(exchanges))
    told = standardise(reward_model, exchanges, unseen=Unseen(), least_std=1e-3)
    after = torch.tensor(reward_model.score(exchanges))
    assert told["folded"] == folded
    assert after.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert after.mean().item() == pytest.approx(told["score_mean"], abs=1e-3)
    assert (told["score_mean"] == 0) == (backbone == "encoder")
    differences = (after - after[0]) * told["logit_scale"]
    assert torch.allclose(differences, before - before[0], atol=1e-5)


def test_the_temperature_is_the_likeliest_and_the_loudness_what_is_sure_by_hand(tmp_path: Path) -> None:
    """Of 40 unseen choices a standard deviation apart 30 are right: log-odds of ln(30.5 / 10.5), less 1.645 errors."""
    reward_model = new_reward_model(make_policy_folder(tmp_path / "base"), "encoder", texts=[GOOD, BAD] * 9)
    exchanges = exchanges_of(choices(30))
    std = torch.tensor(reward_model.score(exchanges)).std(correction=0).item()
    names = [f"{number}" for number in range(40)]
    unseen = Unseen(within=Evidence([1.0] * 30 + [-1.0] * 10, names, set(names)))
    told = standardise(reward_model, exchanges, unseen=unseen, least_std=1e-3)
    p = 30.5 / 41
    likeliest = math.log(p / (1 - p))
    sure = likeliest - 1.6448536 / math.sqrt(40 * p * (1 - p))
    assert told["temperature"] == pytest.approx(std / likeliest, rel=1e-4)
    assert told["confirmed_std"] == pytest.approx(sure, rel=1e-4)
    assert told["score_std"] == pytest.approx(min(1.0, 2 * sure), rel=1e-4)


def test_a_model_that_learnt_from_coins_says_next_to_nothing_and_one_that_learnt_says_as_much_as_ever(
    tmp_path: Path,
) -> None:
    noise = learn(tmp_path / "noise", choices(200), fit={"max_epochs": 2}, shuffle_labels=True)
    loud = learn(tmp_path / "loud", choices(200), fit={"max_epochs": 2}, shuffle_labels=True, least_std=1.0)
    sense = learn(tmp_path / "sense", choices(200), fit={"max_epochs": 2})
    assert noise["score_std"] < 0.1
    assert loud["score_std"] == pytest.approx(1, abs=1e-3)
    assert sense["score_std"] == pytest.approx(1, abs=1e-3)


def test_of_few_choices_a_good_model_is_believed_and_a_bad_one_is_not(tmp_path: Path) -> None:
    """Its own validation is five choices, which confirm nothing; models without each tenth are asked of all fifty."""
    data = [
        replace(item, ranks=item.ranks[::-1]) if number % 5 == 0 else item for number, item in enumerate(choices(50))
    ]
    alone = learn(tmp_path / "alone", data)
    asked = learn(tmp_path / "asked", data, confirmed_by=50)
    noise = learn(tmp_path / "noise", data, confirmed_by=50, shuffle_labels=True)
    assert alone["confirmed_by"] == {"choices": 5, "prompts": 5, "across_prompts": False}
    assert asked["confirmed_by"] == noise["confirmed_by"] == {"choices": 50, "prompts": 50, "across_prompts": False}
    assert alone["score_std"] == pytest.approx(0.001)
    assert asked["score_std"] > 0.5
    assert noise["score_std"] < 0.1
    assert asked["accuracy"] == alone["accuracy"]  # how loud it is changes no order


def test_no_more_models_are_fitted_than_it_takes_and_the_ensemble_goes_by_what_they_say(tmp_path: Path) -> None:
    names: list[str] = []
    fit_reward_model(
        make_policy_folder(tmp_path / "base"),
        choices(60),
        held_out=choices(20, start=1000),
        config=make_config(confirmed_by=15, fit={"max_epochs": 3}, ensemble={"members": 2, "heads": 0}),
        folder=tmp_path / "reward",
        seed=0,
        progress=lambda line: names.append(line.split(" step")[0]),
    )
    assert {name for name in names if name.startswith("reward_model") and ":" not in name} == {
        "reward_model",
        "reward_model_1",
        *(f"reward_model_without_{number}" for number in range(3)),
    }
    stds = [
        torch.tensor(load_reward_model(path).score(exchanges_of(choices(60)))).std(correction=0).item()
        for path in members_of(tmp_path / "reward")
    ]
    assert stds[0] == pytest.approx(stds[1], rel=1e-3)


def test_one_seed_gives_one_reward_model(tmp_path: Path) -> None:
    for name in ("first", "again"):
        learn(tmp_path / name, choices(40), fit={"max_epochs": 1})
    first, again = (load_reward_model(tmp_path / name / "reward").model.state_dict() for name in ("first", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_fit_that_broke_off_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links and all."""
    monkeypatch.setattr(fit, "SAVE_AFTER_S", 0.0)
    base, lines = make_policy_folder(tmp_path / "base"), []

    def go(name: str, *, until: str = "never") -> None:
        def progress(line: str) -> None:
            lines.append(line)
            if until in line:
                raise KeyboardInterrupt

        fit_reward_model(
            base,
            KINDS["joint"],
            held_out=choices(20, start=1000),
            config=make_config(feedback="joint", ties="davidson"),
            folder=tmp_path / name,
            seed=0,
            progress=progress,
            fits=tmp_path / f"{name}-fits",
        )

    go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("broken", until=" step 30/")
    lines.clear()
    go("broken")
    assert lines[0] == "reward_model goes on from its checkpoint at step 29"
    whole, broken = (load_reward_model(tmp_path / name).model.state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_too_few_to_hold_any_out_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot hold out"):
        learn(tmp_path, choices(1))
    assert not (tmp_path / "reward").exists()
