"""Looks at held-out prompts: when, at what, what is kept, and when the alarm sounds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import load_config
from rlhf_ray.training.looks import HeldOut, Look, exploited, warning
from rlhf_ray.training.run_folder import RunFolder
from rlhf_ray.types import Exchange, Prompt
from tests.training.fakes import Roles, Tokenizer, make_prompts


class Recipe:
    def __init__(self) -> None:
        self.held_out_prompts = make_prompts(6)

    def gold(self, prompt: Prompt, response: str) -> float | None:
        return 0.25


class Scripted:
    """Scores that go along a script, one entry a look."""

    def __init__(self, *levels: float) -> None:
        self.levels = list(levels)

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        level = self.levels.pop(0)
        return [level + 0.25 * row for row in range(len(exchanges))]


class Learner:
    def __init__(self) -> None:
        self.saved: list[Path] = []

    def save_policy(self, folder: Path) -> None:
        self.saved.append(folder)


def make(tmp_path: Path, scorer: Any, judge: Any, said: list[str] | None = None, **roles: Any) -> HeldOut:
    settings = ["run.id=t", "rollout.max_tokens=8", "evaluate.every=2", "evaluate.prompts=4"]
    return HeldOut(
        Recipe(),  # type: ignore[arg-type]
        roles.get("generators", Roles()),
        scorer,
        judge,
        roles.get("learner", Learner()),
        tokenizer=Tokenizer(),  # type: ignore[arg-type]
        config=load_config(None, settings),
        folder=RunFolder(tmp_path),
        say=(said if said is not None else []).append,
    )


def test_a_look_is_due_every_so_many_steps_at_so_many_prompts_with_the_same_draws(tmp_path: Path) -> None:
    roles = Roles()
    held_out = make(tmp_path, Scripted(1, 2), Scripted(1, 2), generators=roles)
    assert held_out.look(1) == {}
    first = held_out.look(2)
    asked = roles.requests
    assert [request.prompt_id for request in asked] == ["p0", "p1", "p2", "p3"]
    assert first == {
        "held_out/reward": 1.375, "held_out/judge": 1.375, "held_out/alarm": 0.0, "held_out/gold": 0.25
    }  # fmt: skip
    held_out.look(4)
    assert roles.requests == asked


def test_the_best_looks_policy_is_kept_and_the_alarm_says_since_when(tmp_path: Path) -> None:
    learner, said = Learner(), []
    held_out = make(tmp_path, Scripted(1, 2, 3, 4), Scripted(1, 2, 1.9, 1.5), said, learner=learner)
    alarms = [held_out.look(step)["held_out/alarm"] for step in (2, 4, 6, 8)]
    assert alarms == [0, 0, 1, 1]
    assert len(learner.saved) == 2
    assert RunFolder(tmp_path).read_json("best.json") == {
        "step": 4, "rewards": [2.0, 2.25, 2.5, 2.75], "judged": [2.0, 2.25, 2.5, 2.75], "by": "the judge"
    }  # fmt: skip
    assert ["since step 4" in line for line in said] == [True]  # once


def test_without_a_judge_the_reward_model_says_which_was_best_and_nothing_sounds(tmp_path: Path) -> None:
    held_out = make(tmp_path, Scripted(1, 3, 2), None)
    assert [held_out.look(step)["held_out/alarm"] for step in (2, 4, 6)] == [0, 0, 0]
    assert RunFolder(tmp_path).read_json("best.json")["by"] == "the reward model"
    assert RunFolder(tmp_path).read_json("best.json")["step"] == 4


def test_a_resumed_run_is_held_against_the_best_from_before_and_forgets_what_comes_anew(tmp_path: Path) -> None:
    make(tmp_path, Scripted(1), Scripted(5)).look(4)
    learner = Learner()
    resumed = make(tmp_path, Scripted(2), Scripted(3), learner=learner)
    resumed.resume(4)
    assert resumed.look(6)["held_out/alarm"] == 1
    assert learner.saved == []
    anew = make(tmp_path, Scripted(2), Scripted(3))
    anew.resume(3)
    assert anew.best is None
    assert RunFolder(tmp_path).read_json("best.json") is None


def test_a_fall_that_may_be_chance_is_none_and_neither_is_one_that_the_reward_model_shares() -> None:
    best = Look(2, [1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 0.9, 1.0])
    assert exploited(best, Look(4, [2.0] * 4, [0.5, 0.7, 0.4, 0.45]))
    assert not exploited(best, Look(4, [2.0] * 4, [0.5, 1.6, 0.4, 1.4]))  # as likely chance
    assert not exploited(best, Look(4, [0.5] * 4, [0.5, 0.6, 0.4, 0.5]))  # both fell
    # the mean rose by 1 and fell by 0.4875, where the standard deviation was 0.0707
    said = warning(best, Look(4, [2.0] * 4, [0.5, 0.7, 0.4, 0.45]))
    assert "rose by 14.14 standard deviations" in said
    assert "fell by 6.89" in said
