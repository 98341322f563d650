from pathlib import Path

import pytest
import torch

from rlhf_ray.algo.logprobs import nucleus_logprobs
from rlhf_ray.config import ResourcesConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.critic import new_critic
from rlhf_ray.models.policy import load_policy
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.roles import networks as networks_module
from rlhf_ray.roles.batch import Tokens, collate
from rlhf_ray.roles.budget import TokenBudget
from rlhf_ray.roles.loading import load_networks
from rlhf_ray.roles.networks import Networks
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
    networks = load_networks(base, sampling=Sampling(), budget=TokenBudget(4096), critic_body=None)
    assert networks.critic is None
    assert not any(parameter.requires_grad for parameter in networks.reference.parameters())


def ragged(networks: Networks) -> Tokens:
    """Prompts of 1 to 4 and responses of 0 to 6 tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (12, 10), generator=draw).tolist()
    return collate([(row[: 1 + i % 4], row[4 : 4 + i % 7]) for i, row in enumerate(ids)], pad_id=0)


def make_networks(base: Path, temperature: float = 0.7, top_p: float = 0.9) -> Networks:
    sampling = Sampling(temperature=temperature, top_p=top_p)
    return load_networks(base, sampling=sampling, budget=TokenBudget(4096), critic_body=None)


def test_what_a_policy_says_is_what_its_whole_logits_say(base: Path) -> None:
    networks = make_networks(base)
    tokens = ragged(networks)
    said = networks.say(networks.policy, tokens)
    mask, ids = tokens.mask, tokens.response_ids[tokens.mask]
    logits = tokens.predictions(load_policy(base)(tokens.ids, attention_mask=tokens.attention).logits) / 0.7  # (N, V)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    nucleus, unsure = nucleus_logprobs(logits, ids, temperature=1.0, top_p=0.9)
    for found, wanted in ((said.logprobs, own), (said.entropy, entropy), (said.sampled, nucleus)):
        assert torch.allclose(found[mask], wanted, atol=1e-5)
        assert not found[~mask].any()
    assert torch.equal(said.unsure[mask], unsure)


@pytest.mark.parametrize("in_halves", [True, False])
def test_logits_made_piece_by_piece_give_the_same_figures_and_the_same_gradient(
    base: Path, in_halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures_and_gradient() -> tuple[torch.Tensor, ...]:
        networks = make_networks(base, top_p=1.0)
        assert networks.in_halves
        networks.in_halves = in_halves
        said = networks.say(networks.policy, ragged(networks), learn_entropy=True)
        (said.logprobs.sum() + said.entropy.square().sum()).backward()
        gradients = [parameter.grad for parameter in networks.policy.parameters()]
        return said.logprobs.detach(), said.entropy.detach(), *gradients

    whole = figures_and_gradient()
    sizes = []
    plain = networks_module.token_logprobs

    def watched(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(logits.numel())
        return plain(logits, ids)

    monkeypatch.setattr(networks_module, "token_logprobs", watched)
    vocabulary = len(whole[2])
    monkeypatch.setitem(networks_module.LOGITS_AT_ONCE, "cpu", 5 * vocabulary)
    pieces = figures_and_gradient()
    assert max(sizes) == 5 * vocabulary
    assert len(sizes) == 14 if in_halves else 7  # 33 tokens, and once more for the gradient
    for one, other in zip(whole, pieces, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_entropy_has_a_gradient_only_where_it_is_learnt(base: Path) -> None:
    networks = make_networks(base)
    tokens = ragged(networks)
    assert not networks.say(networks.policy, tokens).entropy.requires_grad
    assert networks.say(networks.policy, tokens, learn_entropy=True).entropy.requires_grad


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_computed_again_where_that_is_asked_for(base: Path, recompute: bool) -> None:
    networks = load_networks(
        base,
        sampling=Sampling(),
        budget=TokenBudget(4096),
        critic_body=None,
        resources=ResourcesConfig(recompute=recompute),
    )
    passes = []
    networks.policy.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    networks.say(networks.policy, ragged(networks)).logprobs.sum().backward()
    assert len(passes) == (2 if recompute else 1)
