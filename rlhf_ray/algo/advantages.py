"""Advantages token by token: how much better each one went than expected.

Shapes: rewards and values (B, T) in units of reward; mask (B, T) bool, true on response tokens, which lie in one piece
(padding on either side, holding anything). All results are zero in the padding and free of gradients. The episode ends
with the last response token: the value after it is 0, also where the response was cut.
"""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and the critic's targets (returns), both (B, T).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};  R_t = A_t + V_t.
    Generalized advantage estimation: Schulman et al. 2016 (arXiv:1506.02438), equation 16.

    values[:, t] is the critic's view before token t was drawn.
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    next_values = functional.pad(values[:, 1:], (0, 1))  # (B, T)
    deltas = (rewards + gamma * next_values - values).masked_fill(~mask, 0.0)
    advantages = _discounted_sum(deltas, mask, gamma * lam)
    return advantages, advantages + values


@torch.no_grad()
def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """What came from each token on, discounted: G_t = r_t + gamma * G_{t+1}, (B, T).

    A token cannot have caused what came before it: Sutton et al. 1999 ("Policy gradient methods for reinforcement
    learning with function approximation"), theorem 1.
    """
    return _discounted_sum(rewards.masked_fill(~mask, 0.0), mask, gamma)


@torch.no_grad()
def trajectory_return(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """What the whole response earned, for each of its tokens: the sum over t of gamma^t * r_t, (B, T).

    REINFORCE: Williams 1992 (doi:10.1007/BF00992696), section 5, with an episode for a trial.
    """
    to_go = reward_to_go(rewards, mask, gamma=gamma)
    first = mask & (mask.cumsum(1) == 1)
    return spread((to_go * first).sum(1), mask)


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """One number a response, (B), for each of its tokens, (B, T)."""
    return x.unsqueeze(1).expand(mask.shape).masked_fill(~mask, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """The same numbers with mean 0 and standard deviation 1 over the mask, and 0 outside it.

    (x - mean) / sqrt(var + 1e-8), var over the population. A constant x gives zeros.
    Advantage normalisation as studied in Andrychowicz et al. 2020 (arXiv:2006.05990), over all tokens of the batch.

    x: any shape; mask: bool, the same shape. Inside it computes in float64: in float32 the rounding of a mean is
    blown up to a signal where the numbers are large and nearly equal.
    """
    inside = x.masked_fill(~mask, 0.0).double()
    count = mask.sum().clamp(min=1)
    centred = (inside - inside.sum() / count).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / count
    return (centred * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0).to(x.dtype)


def whiten_by_group(x: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """`whiten` over the tokens of each group's responses by themselves. groups: (B) int, equal for one prompt."""
    result = torch.zeros_like(x)
    for group in groups.unique():
        rows = groups == group
        result[rows] = whiten(x[rows], mask[rows])
    return result


def _discounted_sum(x: Tensor, mask: Tensor, factor: float) -> Tensor:
    result = torch.zeros_like(x)
    running = torch.zeros_like(x[:, 0])  # (B)
    for t in reversed(range(x.shape[1])):
        running = torch.where(mask[:, t], x[:, t] + factor * running, 0.0)
        result[:, t] = running
    return result
