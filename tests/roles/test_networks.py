from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.roles.networks import load_networks, new_critic
from rlhf_ray.types import Sampling
from tests.models.tiny import make_policy_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy")


def test_a_new_critic_says_0_of_everything(base: Path) -> None:
    critic = new_critic(base, base)
    assert not critic(torch.tensor([[5, 6, 7]])).logits.any()


def test_a_critic_may_start_as_the_reward_model(base: Path, tmp_path: Path) -> None:
    reward_model = new_reward_model(base, "decoder")
    with torch.no_grad():
        reward_model.model.get_parameter("model.norm.weight").mul_(2)
    reward_model.save(tmp_path / "reward_model")
    critic = new_critic(tmp_path / "reward_model", base)
    assert torch.equal(critic.get_parameter("model.norm.weight"), reward_model.model.get_parameter("model.norm.weight"))
    assert not critic(torch.tensor([[5, 6, 7]])).logits.any()


def test_a_reward_model_that_reads_other_tokens_is_no_critic(base: Path, tmp_path: Path) -> None:
    new_reward_model(base, "encoder", texts=["a blue lamp arrived broken", "we send a new one"]).save(tmp_path / "rm")
    with pytest.raises(ConfigError, match="another tokenizer"):
        new_critic(tmp_path / "rm", base)


def test_without_a_body_there_is_no_critic(base: Path) -> None:
    networks = load_networks(base, sampling=Sampling(), critic_body=None)
    assert networks.critic is None
    assert not any(parameter.requires_grad for parameter in networks.reference.parameters())
