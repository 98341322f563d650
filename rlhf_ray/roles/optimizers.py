"""The learner's optimizers, and their state as plain tensors for a checkpoint."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.ranks import Ranks


def make_optimizer(parameters: Sequence[nn.Parameter], rate: float, *, bits: Literal[32, 8] = 32) -> Optimizer:
    """AdamW without decay (Loshchilov and Hutter 2019, arXiv:1711.05101); its moments in float32, or in 8 bits by
    blocks (Dettmers et al. 2021, arXiv:2110.02861), for which `ConfigError` says where bitsandbytes is missing.
    """
    if bits == 32:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("resources.optimizer_bits=8 needs bitsandbytes: pip install 'rlhf-ray[quantised]'")
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(parameters, lr=rate, weight_decay=0.0)
    return optimizer


def moments_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that it remembers, by number of the parameter and name."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in enumerate(_states(optimizer))
        for name, value in state.items()
    }


def load_moments(optimizer: Optimizer, moments: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Takes over what `moments_of` gave, whole; where parameters are sharded it keeps its own shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        shard = ranks.like(like, value) if value.shape == like.shape else value  # or what has no shape of its own
        counts = name == "step" and not value.is_floating_point()
        states.setdefault(int(index), {})[name] = int(value) if counts else shard
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state.get(parameter, {}) for group in optimizer.param_groups for parameter in group["params"]]
