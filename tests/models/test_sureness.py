"""Spread and distance by hand, and a folder that keeps them."""

from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.files import members_of
from rlhf_ray.models.reward import load_reward_model, new_reward_model
from rlhf_ray.models.sureness import Considered, Sureness, agreed, load_sureness
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.types import Exchange
from tests.models.tiny import make_policy_folder, make_prompt

SURE = Sureness(
    heads=torch.tensor([[1.0, 0.0], [3.0, 0.0]]),
    middle=torch.tensor([1.0, 1.0]),
    whiten=torch.tensor([[1.0], [0.5]]),
    limit=torch.tensor(2.0),
)


def test_spread_and_distance_by_hand() -> None:
    features = torch.tensor([[1.0, 1.0], [2.0, 5.0], [4.0, 1.0]])
    assert SURE.spread(features).tolist() == [0.0, 1.0, 3.0]  # 0 0, 1 3, 3 9
    assert SURE.distance(features).tolist() == [0.0, 3.0, 3.0]  # 1 + 4 / 2
    assert SURE.strange(features).tolist() == [False, True, True]


@pytest.mark.parametrize("heads", [0, 1])
def test_where_there_are_no_two_heads_nobody_knows_how_sure_it_is(tmp_path: Path, heads: int) -> None:
    """Which is not the same as no doubt: a penalty for doubt would be none, without a word."""
    model = new_reward_model(make_policy_folder(tmp_path / "base"), "decoder")
    width = model.head.in_features
    model.sureness = Sureness(torch.ones(heads, width), torch.zeros(width), torch.eye(width), torch.tensor(1e9))
    told = model.consider([Exchange(make_prompt(), "a lamp")])
    assert (told.spreads, told.strange) == ([], [False])
    with pytest.raises(ConfigError, match="has no heads"):
        ModelSource([model], uncertainty=1.0).score([Exchange(make_prompt(), "a lamp")])


def test_members_agree_but_for_what_they_say_of_everything_alike_by_hand() -> None:
    one, other = Considered([11.0, 15.0], [9.0, 9.0], [False, True], 10.0), Considered([3.0, 5.0], [], [], 0.0)
    assert agreed([one, other]) == Considered([7.0, 10.0], [1.0, 0.0], [False, True], 5.0)
    assert agreed([one]) is one


@pytest.mark.parametrize("backbone", ["decoder", "encoder"])
def test_a_saved_model_considers_as_it_scores(tmp_path: Path, backbone: str) -> None:
    model = new_reward_model(make_policy_folder(tmp_path / "base"), backbone, texts=["a lamp"] * 9)  # type: ignore[arg-type]
    exchanges = [Exchange(make_prompt(f"lamp {n}"), "a lamp" * (1 + n % 4)) for n in range(9)]
    assert model.consider(exchanges).spreads == []
    width = model.head.in_features
    draw = torch.Generator().manual_seed(0)
    model.sureness = Sureness(
        torch.randn(4, width, generator=draw), torch.zeros(width), torch.eye(width), torch.tensor(1e9)
    )
    model.save(tmp_path / "saved")
    loaded = load_reward_model(tmp_path / "saved")
    told = loaded.consider(exchanges)
    assert told.rewards == pytest.approx(loaded.score(exchanges), abs=1e-5)
    assert told.rewards == pytest.approx(model.score(exchanges), abs=1e-5)
    assert told.spreads == pytest.approx(model.consider(exchanges).spreads, abs=1e-5)
    assert min(told.spreads) > 0
    assert told.strange == [False] * 9
    assert members_of(tmp_path / "saved") == [tmp_path / "saved"]


def test_a_folder_that_says_nothing_of_it_has_none(tmp_path: Path) -> None:
    assert load_sureness(tmp_path) is None
