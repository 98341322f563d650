"""Each cause is planted in a small run of the real learner, and is the first one named."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import Config, load_config
from rlhf_ray.models.logits import outputs
from rlhf_ray.models.policy import load_policy, load_tokenizer, save_policy
from rlhf_ray.roles.learner import Learner
from rlhf_ray.training.diagnosis import NOTHING_SHOWS, diagnose
from rlhf_ray.types import Rollout, Scored
from tests.models.tiny import make_policy_folder

STEPS, PROMPTS, SAMPLES = 8, 8, 4
LIKED = range(40, 170)
"""Tokens that the reward likes."""
Score = Callable[[Rollout], float]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy")


def config(*overrides: str) -> Config:
    plain = [
        f"rollout.prompts={PROMPTS}", f"rollout.samples={SAMPLES}", "rollout.max_tokens=6", "ppo.minibatch=16",
        "run.id=t", "ppo.learning_rate=5e-3", "ppo.kl.coef=0.01", "ppo.reward_norm=none", "reward_model.path=theirs",
        "ppo.kl.limit=1000",
    ]  # fmt: skip
    return load_config(None, [*plain, *overrides])


def liking(rollout: Rollout) -> float:
    """A reward that can be learnt: the share of liked tokens."""
    return 4 * sum(token in LIKED for token in rollout.response_ids) / len(rollout.response_ids)


def noise(rollout: Rollout) -> float:
    """A reward that cannot."""
    return random.Random(str(rollout.response_ids)).gauss(0.0, 1.0)


def by_prompt(rollout: Rollout) -> float:
    """A reward that the answer does not change."""
    return float(rollout.prompt_id[1:])


def sample(learner: Learner, step: int, *, flatten: float = 1.0) -> list[Rollout]:
    """What a faithful engine would give; with `flatten`, one that scales the logits without telling."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.tensor([[5 + p, 6 + p, 7] for p in range(PROMPTS) for _ in range(SAMPLES)])
    logprobs = []
    for _ in range(6):
        with torch.no_grad():
            logits = outputs(learner.networks.policy, ids, torch.ones_like(ids))[:, -1] * flatten
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        logprobs.append(logits.log_softmax(-1).gather(1, drawn))
        ids = torch.cat([ids, drawn], 1)
    told = torch.cat(logprobs, 1).tolist()
    return [
        Rollout(f"{step}/{row}", f"p{row // SAMPLES}", tuple(line[:3]), tuple(line[3:]), tuple(told[row]), step, "stop")
        for row, line in enumerate(ids.tolist())
    ]


def run(
    base: Path, *overrides: str, score: Score = liking, flatten: float = 1.0
) -> tuple[list[dict[str, Any]], Config]:
    """A run's metrics."""
    settings = config(*overrides)
    learner, rows = Learner.from_folder(base, settings), []
    for step in range(STEPS):
        rollouts = sample(learner, step, flatten=flatten)
        batch = learner.prepare(Scored(rollouts, [score(rollout) for rollout in rollouts]))
        rows.append({"step": step + 1, **batch.metrics, **learner.update(batch)})
    return rows, settings


def causes(rows: list[dict[str, Any]], settings: Config) -> list[str]:
    return [finding.cause for finding in diagnose(rows, settings.model_dump(mode="json"))]


def test_a_run_that_learns_is_told_nothing(base: Path) -> None:
    rows, settings = run(base)
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.5
    assert causes(rows, settings) == []


PLANTED: dict[str, dict[str, Any]] = {
    "the learning rate is too small": {"overrides": ["ppo.learning_rate=1e-7"]},
    "updates are too large": {
        "overrides": ["ppo.learning_rate=0.02", "ppo.clip=0.05", "rollout.prompts=32", "rollout.samples=1"],
        "score": by_prompt,
    },
    "held back by the KL penalty": {"overrides": ["ppo.kl.coef=50"]},
    "the reward model is saturated": {"score": lambda rollout: 3.0 + 1e-4 * liking(rollout)},
    "equal groups": {"overrides": ["ppo.advantage=rloo"], "score": by_prompt},
    "engine and learner disagree": {"flatten": 0.5, "score": noise},
}


@pytest.mark.parametrize("cause", PLANTED)
def test_a_planted_cause_is_the_first_one_named(base: Path, cause: str) -> None:
    planted = dict(PLANTED[cause])
    rows, settings = run(base, *planted.pop("overrides", []), **planted)
    assert causes(rows, settings)[0] == cause


def test_dead_entropy_is_named_where_the_policy_has_made_up_its_mind(base: Path, tmp_path: Path) -> None:
    sure = load_policy(base)
    with torch.no_grad():
        sure.get_parameter("model.norm.weight").mul_(500)
    save_policy(tmp_path / "sure", sure, load_tokenizer(base))
    rows, settings = run(tmp_path / "sure", "ppo.learning_rate=1e-6", score=noise)
    assert "dead entropy" in causes(rows, settings)


def test_the_kl_limit_is_named_where_the_way_was_gone_for_noise(base: Path) -> None:
    settings = ["ppo.learning_rate=5e-3", "ppo.kl.coef=0", "ppo.clip=5"]
    rows, resolved = run(base, *settings, score=noise)
    limit = 1.5 * max(row["objective/kl"] for row in rows)
    shown = resolved.model_dump(mode="json")
    shown["ppo"]["kl"]["limit"] = limit
    assert "near the KL limit" in [finding.cause for finding in diagnose(rows, shown)]


def test_updates_that_were_left_out_are_named(base: Path) -> None:
    rows, settings = run(base, "ppo.learning_rate=1e-7")
    rows[2]["learn/skipped_updates"] = 2.0
    assert causes(rows, settings)[0] == "gradients that are not finite"


def test_too_few_steps_say_nothing_and_missing_figures_are_no_evidence() -> None:
    flat = [{"step": step, "objective/scores": 1.0} for step in range(1, 4)]
    assert diagnose(flat, {}) == []
    assert diagnose([*flat, {"step": 4, "objective/scores": 1.0}], {}) == [NOTHING_SHOWS]
    assert diagnose([{**row, "objective/scores": math.nan} for row in flat * 2], {}) == []
