"""Cross-validation: every judgement by a model that has seen none of its group."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.training.reward.validate import cross_validate
from rlhf_ray.types import Message
from tests.models.tiny import make_policy_folder

FIT = {"learning_rate": 5e-3, "batch_size": 16, "max_epochs": 4, "eval_every": 10}


def choices(n: int) -> list[Feedback]:
    """Who says sorry is preferred, and rated better."""
    items = []
    for number in range(n):
        told = {
            "messages": (Message("user", f"my lamp {number}"),),
            "prompt_id": f"{number}",
            "group": f"{number // 2}",
            "annotator": "ann",
        }
        answers = [Answer(text=text, sampler="base") for text in ("new sorry", "new today")]
        items.append(Feedback(**told, answers=tuple(answers), ranking=Ranking(ranks=(1, 2))))
        items += [
            Feedback(**told, answers=(answer,), rating=Rating(value=value))
            for answer, value in zip(answers, (4, 2), strict=True)
        ]
    return items


@pytest.mark.parametrize("feedback", ["pairs", "joint"])
def test_every_judgement_is_held_out_once(tmp_path: Path, feedback: str) -> None:
    told = cross_validate(
        make_policy_folder(tmp_path / "base"),
        choices(100),
        config=RewardModelConfig(feedback=feedback, fit=FIT),
        folds=3,
        seed=0,
        progress=lambda line: None,
    )
    assert (told["folds"], len(told["by_fold"]), told["groups"]) == (3, 3, 50)
    assert told["pairs"] == (100 if feedback == "pairs" else 200)
    assert {kind: found["pairs"] for kind, found in told["by_kind"].items()} == {"pairs": 100, "ratings": 100}
    assert told["accuracy_ci95"][0] > 0.9
    assert told["gate"]["passed"]
    assert told["ratings"]["overall"]["spearman"] > 0.8
    assert abs(told["ratings_by_length"]["shorter prompt"]["overall"]["spearman"]) < 0.5


def test_a_fold_that_compares_nothing_has_no_accuracy(tmp_path: Path) -> None:
    """Only the first three prompts have two answers that were told apart; each fold has one of two groups, or none."""
    alone = [item for item in choices(60) if item.rating and item.rating.value == 4]
    told = cross_validate(
        make_policy_folder(tmp_path / "base"),
        [*alone, *(item for item in choices(2) if item.ranking)],
        config=RewardModelConfig(feedback="joint", fit=FIT),
        folds=3,
        seed=0,
        progress=lambda line: None,
    )
    assert sorted(one is None for one in told["by_fold"]) == [False, True, True]
    assert told["pairs"] == 2


def test_a_fold_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    def validated(lines: list[str]) -> dict[str, Any]:
        return cross_validate(
            make_policy_folder(tmp_path / "base"),
            choices(60),
            config=RewardModelConfig(fit=FIT),
            folds=2,
            seed=0,
            progress=lines.append,
            fits=tmp_path / "fits",
        )

    first: list[str] = []
    again: list[str] = []
    assert validated(first) == validated(again)
    assert {path.name for path in (tmp_path / "fits").iterdir()} == {"fold_1", "fold_2"}
    assert len(again) < len(first) or any("goes on" in line for line in again)
