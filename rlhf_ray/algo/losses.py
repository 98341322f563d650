"""What the learner minimises: policy losses token by token, how they are averaged, and the critic's loss.

Each policy loss gives one number a token, (B, T), and where its clip has cut the gradient off; `average` makes a scalar
of them. With rho = exp(logprobs - old_logprobs), the old ones those of the policy that the update began with.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

Averaging = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A policy loss before it is averaged; both (B, T), and meaningless outside the mask."""

    loss: Tensor
    clipped: Tensor
    """Bool: no gradient comes from here."""


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """How far an update has moved the policy from the one that it began with; detached scalars, means over tokens."""

    approxkl: Tensor
    """d^2 / 2 in nats, d = new minus old log-prob (k2 of Schulman 2020)."""
    clipfrac: Tensor
    """Share of tokens whose gradient the clip has cut off."""
    ratio: Tensor
    """New over old probability."""


@dataclass(frozen=True, slots=True)
class Totals:
    """How much a minibatch holds. A part of it that is averaged over these gives its share of the whole's mean."""

    tokens: Tensor
    """Scalar: true entries of the mask."""
    rows: Tensor
    """Scalar: rows with at least one."""

    @classmethod
    def of(cls, mask: Tensor) -> "Totals":
        """Of a (B, T) bool mask."""
        return cls(mask.sum(), mask.any(1).sum())


def masked_mean(x: Tensor, mask: Tensor, totals: Totals | None = None) -> Tensor:
    """The mean of x where the mask is true, a scalar; what lies outside never matters, be it NaN.

    x, mask (bool): the same shape. A mask without a true gives NaN: a mean of nothing should stop a run. With the
    `totals` of a larger batch it is what these entries add to that one's mean.
    """
    return x.masked_fill(~mask, 0.0).sum() / (mask.sum() if totals is None else totals.tokens)


def average(x: Tensor, mask: Tensor, how: Averaging, *, length: int, totals: Totals | None = None) -> Tensor:
    """One number of a (B, T) tensor's masked entries, a scalar.

    - `token`: the mean over all tokens of the batch, so that long answers count for more (DAPO, arXiv:2503.14476,
      section 3.3).
    - `sequence`: each answer's mean, then the mean over answers, so that a token of a long answer counts for less
      (GRPO, arXiv:2402.03300, equation 3). Rows without a token are left out.
    - `constant`: the sum over `length` times the rows, so that every token counts the same in every batch (Dr. GRPO,
      arXiv:2503.20783, appendix). `length` is the longest answer allowed.

    mask: (B, T) bool. Nothing inside gives NaN, as in `masked_mean`; `totals` as there.
    """
    inside, totals = x.masked_fill(~mask, 0.0), totals or Totals.of(mask)
    match how:
        case "token":
            return inside.sum() / totals.tokens
        case "sequence":
            lengths = mask.sum(1)  # (B)
            return (inside.sum(1) / lengths.clamp(min=1)).sum() / totals.rows
        case "constant":
            return inside.sum() / (totals.rows * length)
        case _:
            assert_never(how)


def clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float
) -> TokenLoss:
    """PPO's clipped surrogate, negated.

    max(-A * rho, -A * clamp(rho, 1 - low, 1 + high)).
    Schulman et al. 2017 (arXiv:1707.06347), equation 7; bounds that differ are DAPO's "clip-higher" (Yu et al. 2025,
    arXiv:2503.14476, section 3.1), which leaves unlikely tokens more room to grow.

    logprobs (with gradient), old_logprobs, advantages: (B, T); mask: (B, T) bool, true on response tokens.
    """
    return _clipped(_ratio(logprobs, old_logprobs, mask), advantages.masked_fill(~mask, 0.0), low=low, high=high)


def dual_clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float, dual: float
) -> TokenLoss:
    """`clip_loss` that also bounds what a bad token can cost: where A < 0, min(clip loss, -dual * A), dual > 1.

    Without it a token whose advantage is negative and whose ratio has grown large pulls without bound.
    Ye et al. 2020 (arXiv:1912.09729).
    """
    plain = clip_loss(logprobs, old_logprobs, advantages, mask, low=low, high=high)
    most = -dual * advantages.masked_fill(~mask, 0.0)
    binds = (advantages < 0) & (plain.loss > most) & mask
    return TokenLoss(torch.where(binds, most, plain.loss), plain.clipped | binds)


def gspo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float
) -> TokenLoss:
    """`clip_loss` with one ratio a response, the geometric mean of its tokens': s = exp(mean_t(log rho_t)).

    Group sequence policy optimisation: Zheng et al. 2025 (arXiv:2507.18071); average it by
    sequence. The ratio of a whole response varies much less than a token's: its bounds are some 1e-4.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    ratio = mean.exp().expand_as(log_ratio)  # (B, T)
    return _clipped(ratio, advantages.masked_fill(~mask, 0.0), low=low, high=high)


def cispo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, high: float) -> TokenLoss:
    """REINFORCE with a weight that is capped and carries no gradient: -sg(min(rho, 1 + high)) * A * log p.

    No token's gradient is ever cut off, only its weight bounded, so nothing counts as clipped.
    MiniMax 2025 (arXiv:2506.13585), without a lower bound as there.
    """
    weight = _ratio(logprobs, old_logprobs, mask).detach().clamp(max=1.0 + high)
    loss = -weight * advantages.masked_fill(~mask, 0.0) * logprobs.masked_fill(~mask, 0.0)
    return TokenLoss(loss, torch.zeros_like(mask))


def reinforce_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    """The score-function gradient as a loss: -A log p. Williams 1992 (doi:10.1007/BF00992696), section 5.

    Right for the policy that sampled; with several updates a batch the later ones see samples of an older policy.
    """
    loss = -advantages.masked_fill(~mask, 0.0) * logprobs.masked_fill(~mask, 0.0)
    return TokenLoss(loss, torch.zeros_like(mask))


@torch.no_grad()
def policy_stats(
    logprobs: Tensor, old_logprobs: Tensor, clipped: Tensor, mask: Tensor, totals: Totals | None = None
) -> PolicyStats:
    """How far the policy has moved; all (B, T)."""
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    return PolicyStats(
        approxkl=masked_mean(log_ratio.square(), mask, totals) / 2,
        clipfrac=masked_mean(clipped.to(log_ratio.dtype), mask, totals),
        ratio=masked_mean(log_ratio.exp(), mask, totals),
    )


def value_loss_clipped(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, totals: Totals | None = None
) -> Tensor:
    """The critic's loss, a scalar: half a squared error, blind to gains from moving further than `clip`.

    L = 1/2 * mean over tokens of max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2).
    OpenAI baselines' `ppo2`; Engstrom et al. 2020 (arXiv:2005.12729), section 3, which prints min for the code's max.

    values (with gradient), old_values, returns: (B, T) in units of reward; mask: (B, T) bool.
    """
    values = torch.where(mask, values, 0.0)
    old_values = old_values.masked_fill(~mask, 0.0)
    returns = returns.masked_fill(~mask, 0.0)
    near = values.clamp(old_values - clip, old_values + clip)  # (B, T)
    return masked_mean(torch.maximum((values - returns).square(), (near - returns).square()), mask, totals) / 2


def _ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    return (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # filled before exp: padding must reach no gradient


def _clipped(ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> TokenLoss:
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    return TokenLoss(torch.maximum(free, bounded), (bounded > free).detach())
