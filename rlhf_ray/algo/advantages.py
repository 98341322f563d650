"""Advantages and returns: how much better each token went than the critic expected."""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and the critic's targets (returns), both (B, T), zero in the padding and free of gradients.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};  R_t = A_t + V_t.
    Generalized advantage estimation: Schulman et al. 2016 (arXiv:1506.02438), equation 16.

    rewards, values: (B, T) in units of reward; values[:, t] is the critic's view before token t was drawn.
    mask: (B, T) bool, true on response tokens, which come first: padding is on the right and may hold anything.
    The episode ends with the last response token: the value after it is 0, also where the response was cut.
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()), "padding must lie to the right of the response"
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    next_values = functional.pad(values[:, 1:], (0, 1))  # (B, T)
    deltas = rewards + gamma * next_values - values  # (B, T), zero in the padding
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])  # (B)
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """The same numbers with mean 0 and standard deviation 1 over the mask, and 0 outside it.

    (x - mean) / sqrt(var + 1e-8), var over the population. A constant x gives zeros.
    Advantage normalisation as studied in Andrychowicz et al. 2020 (arXiv:2006.05990), over all tokens of the batch.

    x: any shape; mask: bool, the same shape. Inside it computes in float64: in float32 the rounding of a mean is
    blown up to a signal where the numbers are large and nearly equal.
    """
    inside = x.masked_fill(~mask, 0.0).double()
    count = mask.sum()
    centred = (inside - inside.sum() / count).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / count
    return (centred * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0).to(x.dtype)
