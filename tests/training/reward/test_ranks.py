"""A reward model fitted by two ranks is the one that one rank makes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.roles.ranks import Meeting, as_rank
from rlhf_ray.training.reward.learn import fit_reward_model
from tests.models.tiny import make_policy_folder
from tests.training.reward.test_learn import choices, thumbs

FIT = {"learning_rate": 0.05, "batch_size": 8, "max_epochs": 2, "eval_every": 10}
PLAIN = {**FIT, "trainer": {"optim": "sgd", "max_grad_norm": 0.0}}
"""Descent whose step is the gradient: Adam's would be the same for half of it."""
SETTINGS = {"feedback": "joint", "fit": PLAIN, "confirmed_by": 10}
"""More prompts with choices than are kept to validate, so both fit models without a part or two of them as well."""


def learn_as_rank(index: int, count: int, point: str, base: Path, out: Path) -> None:
    torch.set_num_threads(1)
    told: dict[str, Any] = as_rank(learn, index, count, point, 60.0, base, out)
    if index == 0:
        (out / "told.json").write_text(json.dumps(told))


def learn(base: Path, out: Path) -> dict[str, Any]:
    lines: list[str] = []
    told = fit_reward_model(
        base,
        [*choices(71), *thumbs(18, start=100)],  # 80 prompts once 9 are kept to validate: steps that come out even
        held_out=choices(20, start=500),
        config=RewardModelConfig.model_validate(SETTINGS),
        folder=out / "reward",
        seed=0,
        progress=lines.append,
        fits=out / "fits",
    )
    return {**told, "lines": lines} if told else {"lines": lines}


def test_two_ranks_learn_what_one_does_and_the_first_speaks_and_saves(tmp_path: Path) -> None:
    base = make_policy_folder(tmp_path / "base")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = learn(base, tmp_path / "one")
    meeting = Meeting("127.0.0.1")
    torch.multiprocessing.spawn(learn_as_rank, (2, meeting.point, base, tmp_path / "two"), nprocs=2)
    together = json.loads((tmp_path / "two" / "told.json").read_text())
    assert len(together["lines"]) == len(alone["lines"]) > len(alone["curve"])
    assert together["confirmed_by"] == alone["confirmed_by"]
    assert together["confirmed_by"]["prompts"] >= 10
    assert together["confirmed_std"] == pytest.approx(alone["confirmed_std"], rel=0.02)
    for one, two in zip(alone["curve"], together["curve"], strict=True):
        assert two == pytest.approx(one, abs=2e-3)
    first, second = (load_file(tmp_path / name / "reward" / "model.safetensors") for name in ("one", "two"))
    start = load_file(base / "model.safetensors")
    moved = sum(float((first[name] - start[name]).square().sum()) for name in first if name in start) ** 0.5
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5
    assert apart < 0.02 * moved
