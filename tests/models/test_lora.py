"""An adapter learns, the model under it stays, and what leaves is a plain model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_ray.config import LoRAConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.critic import new_critic
from rlhf_ray.models.lora import (
    learnt_weights,
    load_learnt_weights,
    plain_weights,
    with_adapter,
    without_adapter,
)
from rlhf_ray.models.policy import load_policy, save_policy
from tests.models.tiny import make_policy_folder, make_tokenizer, new_experts

LORA = LoRAConfig(rank=4)
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy")


def adapted(base: Path, *, learnt: bool = True) -> torch.nn.Module:
    model = with_adapter(load_policy(base), LORA, use="policy", seed=0)
    if learnt:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def says(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_new_adapter_changes_nothing_and_alone_learns(base: Path) -> None:
    model = adapted(base, learnt=False)
    torch.testing.assert_close(says(model), says(load_policy(base)))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert learning == learnt_weights(model).keys()


def test_without_it_the_model_is_the_one_that_it_was_put_on(base: Path) -> None:
    model = adapted(base)
    assert not torch.allclose(says(model), says(load_policy(base)), atol=1e-3)
    with without_adapter(model):
        torch.testing.assert_close(says(model), says(load_policy(base)))


def test_plain_weights_hold_what_was_learnt_under_the_models_own_names(base: Path) -> None:
    model, plain = adapted(base), load_policy(base)
    before = says(model)
    weights = dict(plain_weights(model))
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(says(plain), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(says(model), before)


def test_so_they_do_of_a_mixtures_experts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save_policy(tmp_path / "experts", new_experts(len(tokenizer), tokenizer.eos_token_id), tokenizer)
    test_plain_weights_hold_what_was_learnt_under_the_models_own_names(tmp_path / "experts")


def test_what_was_learnt_is_taken_over(base: Path) -> None:
    model, other = adapted(base), adapted(base, learnt=False)
    load_learnt_weights(other, {name: tensor.clone() for name, tensor in learnt_weights(model).items()})
    assert torch.equal(says(other), says(model))
    with pytest.raises(AssertionError, match="not those of this model"):
        load_learnt_weights(other, {})


def test_a_critics_head_learns_too(base: Path) -> None:
    critic = with_adapter(new_critic(base, base), LORA, use="critic", seed=0)
    learning = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert any("score" in name and "lora_" not in name for name in learning)


def test_the_same_seed_makes_the_same_adapter_and_touches_no_other_draw(base: Path) -> None:
    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    models = [adapted(base, learnt=False) for _ in range(2)]
    assert torch.equal(torch.rand(1), first)
    ours, theirs = (learnt_weights(model) for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_layers_that_are_not_there_are_refused_by_name(base: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        with_adapter(load_policy(base), LoRAConfig(rank=4, targets=("nowhere",)), use="policy", seed=0)


def test_rank_0_leaves_the_model_alone(base: Path) -> None:
    model = load_policy(base)
    assert with_adapter(model, LoRAConfig(), use="policy", seed=0) is model
