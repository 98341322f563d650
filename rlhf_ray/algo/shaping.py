"""From a reward model's score to the reward of each token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """The reward of each token, (B, T): its KL penalty, and the response's score on its last token.

    r_t = -coef * kl_t + [t is the last response token] * score; zero in the padding.
    Ziegler et al. 2019 (arXiv:1909.08593), equation 2; Stiennon et al. 2020 (arXiv:2009.01325), section 3.4.

    scores: (B) in units of reward; kl: (B, T) in nats; mask: (B, T) bool, true on response tokens, at least one a row.
    """
    assert bool(mask.any(dim=1).all()), "a response without a token has no place for its score"
    rewards = (-coef * kl).masked_fill(~mask, 0.0)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(dim=1, keepdim=True)  # (B, 1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def end_penalty(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """The scores, (B), less `penalty` where a response was cut before its end token.

    score - penalty * [not finished]. Huang et al. 2024 (arXiv:2403.17031), "EOS trick", in a subtractive form.

    scores: (B) in units of reward; finished: (B) bool.
    """
    return scores - penalty * (~finished).to(scores.dtype)


def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """What a response loses as it nears the longest allowed: 0 to 1, (B), growing over its last `buffer` tokens.

    clamp((length - (longest - buffer)) / buffer, 0, 1). Yu et al. 2025 (arXiv:2503.14476), equation 13, negated.
    """
    assert buffer > 0, buffer
    return ((lengths - (longest - buffer)) / buffer).clamp(0.0, 1.0)


def standardised(x: Tensor, groups: Tensor | None = None, *, least_std: float = 1e-8) -> Tensor:
    """Mean 0 and standard deviation 1 over the batch or each group, (B); a smaller std counts as `least_std`.

    groups: (B) int, equal for responses to one prompt.
    """
    groups = torch.zeros_like(x, dtype=torch.long) if groups is None else groups
    result = torch.zeros_like(x)
    for group in groups.unique():
        rows = groups == group
        norm = RunningNorm().updated(x[rows])
        result[rows] = norm.normalise(x[rows], None, least_std=least_std)
    return result


@dataclass(frozen=True, slots=True)
class RunningNorm:
    """Mean and spread of every number seen so far, to bring scores to mean 0 and standard deviation 1.

    Merging batches by the pairwise update of Chan, Golub and LeVeque 1979:
    d = mean_b - mean_a;  mean = mean_a + d * n_b / n;  m2 = m2_a + m2_b + d^2 * n_a * n_b / n.

    Example: `RunningNorm().updated(torch.tensor([1.0, 3.0]))` has mean 2 and std 1.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def std(self) -> float:
        """The standard deviation over the population; 0 before the first number."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def updated(self, x: Tensor) -> "RunningNorm":
        """The norm after the numbers of x, of any shape; they must be finite, for one NaN would stay for ever."""
        if x.numel() == 0:
            return self
        x = x.detach().double()
        assert bool(torch.isfinite(x).all()), "a number that is not finite must not enter a running norm"
        n = x.numel()
        mean = x.mean().item()
        m2 = (x - mean).square().sum().item()
        total = self.count + n
        d = mean - self.mean
        return RunningNorm(total, self.mean + d * n / total, self.m2 + m2 + d * d * self.count * n / total)

    def normalise(self, x: Tensor, clip: float | None, *, least_std: float = 1e-8) -> Tensor:
        """(x - mean) / std, held within +-clip where there is one; a std below `least_std` counts as that.

        Only centred while all numbers were the same.
        """
        assert self.count > 0, "nothing seen yet to normalise by"
        scale = max(self.std, least_std) if self.std > 1e-8 else 1.0
        y = (x - self.mean) / scale
        return y if clip is None else y.clamp(-clip, clip)
