"""Weights for rollouts that another policy sampled than the one that learns from them: a stale one, or the same one in
an engine that rounds otherwise.

d = own - behaviour, (B, T): the log-prob of the learner's policy before the update less the one that the token was
sampled with. The weight multiplies the token's loss and carries no gradient; without any difference it is 1.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor

Correction = Literal["none", "token", "sequence", "band", "sequence_mask"]


@torch.no_grad()
def importance_weights(
    own: Tensor, behaviour: Tensor, mask: Tensor, *, how: Correction, low: float, high: float
) -> Tensor:
    """The weight of each token, (B, T), 0 outside the mask.

    - `none`: 1.
    - `token`: min(exp(d_t), high), truncated importance sampling (Ionides 2008, doi:10.1198/106186008X320456; for
      rollouts of another engine: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
      training").
    - `sequence`: min(exp(sum_t d_t), high), the same for the whole response: unbiased up to `high`, and noisier.
    - `band`: exp(d_t) where it lies in [low, high] and 0 elsewhere (IcePop: Ling team 2025, arXiv:2510.18855).
    - `sequence_mask`: 1 where the geometric mean of the response's ratios, exp(mean_t d_t), lies in [low, high], and 0
      for the whole response elsewhere.

    own, behaviour: (B, T) in nats; mask: (B, T) bool.
    """
    d = (own - behaviour).masked_fill(~mask, 0.0)
    match how:
        case "none":
            weights = torch.ones_like(d)
        case "token":
            weights = d.exp().clamp(max=high)
        case "sequence":
            weights = d.sum(1, keepdim=True).exp().clamp(max=high).expand_as(d)
        case "band":
            ratio = d.exp()
            weights = ratio * ((ratio >= low) & (ratio <= high))
        case "sequence_mask":
            mean = (d.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
            weights = ((mean >= low) & (mean <= high)).to(d.dtype).expand_as(d)
        case _:
            assert_never(how)
    return weights.masked_fill(~mask, 0.0)
