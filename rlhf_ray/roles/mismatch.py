"""How far the engine that sampled is from the learner, by the log-probs that each gives the same tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ray.algo.losses import masked_mean
from rlhf_ray.types import Rollout


def behaviour_of(rollouts: Sequence[Rollout], *, like: Tensor) -> Tensor:
    """(B, T) the log-probs that the engine sampled with."""
    behaviour = torch.zeros_like(like)
    for row, rollout in enumerate(rollouts):
        behaviour[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs, device=like.device)
    return behaviour


def mismatch(behaviour: Tensor, own: Tensor, unsure: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine's behaviour log-probs are from the learner's own for the same weights.

    Tokens at whose position float error alone decides what the nucleus holds are left out, and counted.
    """
    sure = mask & ~unsure
    difference = torch.where(sure, behaviour - own, 0.0)  # (B, T)
    return {
        "mismatch/max_abs": float(difference.abs().max()),
        "mismatch/kl": float(masked_mean(difference, sure)),
        "mismatch/ratio_mean": float(masked_mean((-difference).exp(), sure)),
        "mismatch/left_out": float((mask & unsure).sum()),
    }
