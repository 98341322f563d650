"""The networks of a learner as a run begins with them, each held as the config wants it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from rlhf_ray.config import LoRAConfig, ResourcesConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.critic import critic_config, new_critic
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.lora import four_bits, with_adapter
from rlhf_ray.models.policy import check_vocabulary, load_policy
from rlhf_ray.models.shards import empty_model, fill
from rlhf_ray.roles.budget import TokenBudget
from rlhf_ray.roles.networks import ALONE, PLAIN, Networks
from rlhf_ray.roles.ranks import Ranks, shard_alone
from rlhf_ray.types import Sampling

NO_LORA = LoRAConfig()


def load_networks(
    base: Path,
    *,
    sampling: Sampling,
    budget: TokenBudget,
    critic_body: Path | None,
    lora: LoRAConfig = NO_LORA,
    seed: int = 0,
    ranks: Ranks = ALONE,
    resources: ResourcesConfig = PLAIN,
) -> Networks:
    """All at the start of a run: the policy and the reference are the base policy."""
    if resources.learner_offload and not torch.cuda.is_available():
        raise ConfigError("resources.learner_offload relieves a GPU, and there is none here: leave it out")
    if ranks.mesh is None and resources.learner_offload:
        ranks = shard_alone()
    held: dict[str, Any] = {}
    if lora.rank:  # what stays as it is may as well be held as it is computed
        held["dtype"] = getattr(torch, resources.learner_dtype)
    if lora.quantised:
        held |= four_bits(held["dtype"])
    spread = _is_spread(ranks, resources)
    policy = _loaded(base, spread=spread, **held)
    critic = None if critic_body is None else _new_critic(critic_body, base, spread=spread, **held)
    reference = None if lora.rank else _loaded(base, spread=spread)
    origins = [(policy, base), (critic, critic_body), (reference, base)]
    empty = [_is_empty(model) for model, _ in origins]
    if lora.rank:
        policy = with_adapter(policy, lora, use="policy", seed=seed)
        critic = critic and with_adapter(critic, lora, use="critic", seed=seed)
    if resources.recompute:
        for model in (policy, critic) if critic is not None else (policy,):
            recompute_activations(model)
    networks = Networks(policy, reference, critic, sampling, budget, ranks, resources)
    sharded = (networks.policy, networks.critic, networks.reference)
    for model, (_, path), waits in zip(sharded, origins, empty, strict=True):
        if waits and path is not None:
            fill(model, path, ranks.read)
    return networks


def adopt_policy(networks: Networks, folder: Path) -> None:
    """A folder's policy in place of the one that is there; the reference stays what it was."""
    policy = _loaded(folder, spread=_is_spread(networks.ranks, networks.resources))
    waits = _is_empty(policy)
    networks.adopt(policy)
    if waits:
        fill(networks.policy, folder, networks.ranks.read)


def _is_spread(ranks: Ranks, resources: ResourcesConfig) -> bool:
    """Whether each rank reads its own shards; what is offloaded has to be on the CPU first, and is loaded whole."""
    return ranks.count > 1 and not resources.learner_offload


def _is_empty(model: PreTrainedModel | None) -> bool:
    return model is not None and any(parameter.is_meta for parameter in model.parameters())


def _loaded(path: Path, *, spread: bool, **held: Any) -> PreTrainedModel:
    """A policy; where it is spread over ranks, without weights if they can be read in shards."""
    if spread:
        read_folder(path, "policy")
        model = empty_model(AutoModelForCausalLM, path, "policy")
        if model is not None:
            check_vocabulary(model, path)
            return model
    return load_policy(path, **held)


def _new_critic(body: Path, policy: Path, *, spread: bool, **held: Any) -> PreTrainedModel:
    if spread:
        model = empty_model(AutoModelForTokenClassification, body, "critic", config=critic_config(body, policy))
        if model is not None:
            return model
    return new_critic(body, policy, **held)


def recompute_activations(model: Any) -> None:
    """Keeps only what goes into each layer, and computes the rest again for the gradient (Chen et al. 2016,
    arXiv:1604.06174). transformers does so in training mode only, in which dropout must not wake up.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()  # an adapter's base does not learn, and nothing would be kept for it
    model.train()
