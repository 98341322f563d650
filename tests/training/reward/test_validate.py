"""Cross-validation: every judgement by a model that has seen none of its group."""

from pathlib import Path

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
