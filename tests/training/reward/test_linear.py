"""The line's two solvers agree, with each other and with what was planted."""

from pathlib import Path

import pytest
import torch

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Judgement, Rated
from rlhf_ray.errors import DataError
from rlhf_ray.models.reward import RewardModel, new_reward_model
from rlhf_ray.training.reward.linear import fit_linear
from rlhf_ray.training.reward.objective import judged
from tests.models.tiny import make_policy_folder, make_prompt

WORDS = ["lamp", "chair", "sorry", "new", "broken", "today", "back", "pay"]


def make_model(tmp_path: Path, kind: str) -> RewardModel:
    return new_reward_model(make_policy_folder(tmp_path / "base"), kind, texts=WORDS * 3)  # type: ignore[arg-type]


def planted(reward_model: RewardModel, n: int, *, noise: float) -> list[Rated]:
    """Ratings along a line through the model's own features."""
    draw = torch.Generator().manual_seed(0)
    prompts = [make_prompt(f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}") for i in range(n)]
    items = [Rated(prompt, f"{WORDS[i % 7]} {WORDS[i % 5]}", 0.0) for i, prompt in enumerate(prompts)]
    features = reward_model.features(reward_model.encode([item.exchanges[0] for item in items])).double()
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    line = features @ torch.randn(features.shape[1], dtype=torch.float64, generator=draw)
    targets = line / line.std() + noise * torch.randn(n, dtype=torch.float64, generator=draw)
    return [Rated(item.prompt, item.response, target) for item, target in zip(items, targets.tolist(), strict=True)]


@pytest.mark.parametrize("backbone", ["decoder", "encoder"])
def test_the_closed_form_and_the_gradient_agree_and_find_the_line(tmp_path: Path, backbone: str) -> None:
    reward_model = make_model(tmp_path, backbone)
    items: list[Judgement] = [*planted(reward_model, 300, noise=0.1)]
    exchanges = [exchange for item in items for exchange in item.exchanges]
    scores = {}
    for solver in ("ridge", "gradient"):
        told = RewardModelConfig(feedback="ratings", backbone="linear", linear={"solver": solver, "penalty": 0.1})
        rows = judged(reward_model, items, told)
        fit_linear(reward_model, rows, validation=rows, config=told)
        scores[solver] = torch.tensor(reward_model.score(exchanges))
    centred = {solver: found - found.mean() for solver, found in scores.items()}  # a decoder's head has no bias
    assert torch.allclose(centred["ridge"], centred["gradient"], atol=1e-3)
    targets = torch.tensor([item.target for item in items if isinstance(item, Rated)])
    assert float(torch.corrcoef(torch.stack([centred["ridge"], targets]))[0, 1]) > 0.97


def test_nothing_to_validate_by_is_an_error(tmp_path: Path) -> None:
    reward_model = make_model(tmp_path, "encoder")
    told = RewardModelConfig(feedback="ratings", backbone="linear")
    with pytest.raises(DataError, match="needs both"):
        fit_linear(
            reward_model, judged(reward_model, [Rated(make_prompt(), "a", 1.0)], told), validation=[], config=told
        )
