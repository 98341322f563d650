"""How far the engine that sampled is from the learner, by the log-probs that each gives the same tokens."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlhf_ray.algo.losses import masked_mean
from rlhf_ray.types import Rollout, Span


def behaviour_of(rollouts: Sequence[Rollout], *, like: Tensor) -> Tensor:
    """(B, T) the log-probs that the engine sampled with."""
    behaviour = torch.zeros_like(like)
    for row, rollout in enumerate(rollouts):
        behaviour[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs, device=like.device)
    return behaviour


def fresh_of(rollouts: Sequence[Rollout], weights_step: int, *, like: Tensor) -> Tensor:
    """(B, T) whether each token was sampled with the weights of this step."""
    fresh = torch.zeros_like(like, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        spans = [Span(0, rollout.weights_step), *rollout.swaps, Span(len(rollout.logprobs), -1)]
        for span, following in pairwise(spans):
            fresh[row, span.start : following.start] = span.weights_step == weights_step
    return fresh


def mismatch(behaviour: Tensor, own: Tensor, unsure: Tensor, mask: Tensor, fresh: Tensor) -> dict[str, float]:
    """How far behaviour log-probs are from the learner's own: the engine's where it had the same weights (`mismatch/`),
    and those of tokens that older weights sampled (`stale/`).

    Tokens at whose position float error alone decides what the nucleus holds are left out, and counted.
    """
    sure = mask & ~unsure
    metrics = {"mismatch/left_out": float((mask & unsure).sum())}
    if bool((mask & ~fresh).any()):
        metrics["stale/share"] = float((mask & ~fresh).sum() / mask.sum())
    for name, tokens in {"mismatch": sure & fresh, "stale": sure & ~fresh}.items():
        if bool(tokens.any()):
            difference = torch.where(tokens, behaviour - own, 0.0)  # (B, T)
            metrics[f"{name}/max_abs"] = float(difference.abs().max())
            metrics[f"{name}/kl"] = float(masked_mean(difference, tokens))
            metrics[f"{name}/ratio_mean"] = float(masked_mean((-difference).exp(), tokens))
    return metrics
