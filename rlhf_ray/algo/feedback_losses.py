"""What each kind of feedback says of scores: the negative log-likelihood, or squared error, of every judgement.

All take scores r in log-odds and give nats, one number a judgement, so that whoever sums them may weigh each.
Let p be sigmoid(r_i - r_j), what Bradley and Terry (1952) say of the chance that i is preferred to j.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Ties = Literal["none", "davidson", "rao_kupper"]


def pair_losses(
    better: Tensor,
    worse: Tensor,
    *,
    tied: Tensor,
    margin: Tensor | float = 0.0,
    smoothing: float = 0.0,
    ties: Ties = "none",
    tie: Tensor | float = 0.0,
) -> Tensor:
    """(N) how surprised the scores are by choices between two answers, some of which are ties.

    Without ties -log p of Bradley and Terry, as in Ouyang et al. 2022 (arXiv:2203.02155), equation 1. `tie` is t, where
    ties are part of the model; P(i preferred) and P(tie) are then, with d = r_i - r_j,

        Davidson 1970:        e^{d/2} / Z and e^t / Z, Z = e^{d/2} + e^{-d/2} + e^t
        Rao and Kupper 1967:  sigmoid(d - s) and the rest, s = softplus(t)

    Davidson's odds of winning to losing are Bradley and Terry's; Rao and Kupper have two answers tied that nobody can
    tell apart by s.

    better, worse: (N) scores; of a tie (`tied`, (N) bool) either way round. margin: (N) what a choice has to be won by,
    so r_i - r_j - margin stands for the difference (Touvron et al. 2023, arXiv:2307.09288, equation 2); of a tie it
    does not count. smoothing: share of choices that are known to be the wrong way round; each counts as that share of
    its opposite (Szegedy et al. 2016, arXiv:1512.00567, section 7). With `ties` at "none" a tie costs nothing.
    """
    assert better.shape == worse.shape == tied.shape, (better.shape, worse.shape, tied.shape)
    difference = better - worse
    won = _won(difference - margin, ties, tie)
    if smoothing:
        won = (1 - smoothing) * won + smoothing * _won(-difference - margin, ties, tie)
    return torch.where(tied, _drawn(difference, ties, tie), won)


def _won(difference: Tensor, ties: Ties, tie: Tensor | float) -> Tensor:
    """-log P(the first is preferred)."""
    if ties == "none":
        return -functional.logsigmoid(difference)
    if ties == "rao_kupper":
        return -functional.logsigmoid(difference - functional.softplus(torch.as_tensor(tie)))
    return _davidson(difference, tie) - difference / 2


def _drawn(difference: Tensor, ties: Ties, tie: Tensor | float) -> Tensor:
    """-log P(tie)."""
    if ties == "none":
        return torch.zeros_like(difference)
    if ties == "rao_kupper":
        # 1 - sigmoid(d - s) - sigmoid(-d - s) = (e^{2s} - 1) sigmoid(d - s) sigmoid(-d - s)
        s = functional.softplus(torch.as_tensor(tie))
        either = functional.logsigmoid(difference - s) + functional.logsigmoid(-difference - s)
        return -(torch.log(torch.expm1(2 * s)) + either)
    return _davidson(difference, tie) - tie


def _davidson(difference: Tensor, tie: Tensor | float) -> Tensor:
    """log Z."""
    return torch.logsumexp(
        torch.stack([difference / 2, -difference / 2, torch.as_tensor(tie).expand_as(difference)]), dim=0
    )


def ranking_losses(scores: Tensor, ranks: Tensor) -> Tensor:
    """(N) how surprised the scores are by rankings of many answers: Plackett 1975 and Luce 1959.

    L = sum over i of log sum_{j: rank_j >= rank_i} e^{r_j} - r_i: from what is left the best is chosen, again and
    again. Answers that share a rank are each chosen from what is left with all of them there (Breslow 1974, of ties in
    Cox's likelihood, which this is). Of two answers that are told apart it is Bradley and Terry's.

    scores: (N, K); ranks: (N, K) ints from 1, ties sharing one; 0 where a shorter ranking has no answer.
    """
    assert scores.shape == ranks.shape, (scores.shape, ranks.shape)
    there = ranks > 0
    left = (ranks[:, None, :] >= ranks[:, :, None]) & there[:, None, :]  # (N, i, j): j is left when i is chosen
    left |= torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)  # so that no sum is empty
    among = torch.logsumexp(scores[:, None, :].masked_fill(~left, -torch.inf), dim=2)  # (N, K)
    return ((among - scores) * there).sum(1)


def thumb_losses(scores: Tensor, up: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """(N) how surprised the scores are by thumbs: binary cross-entropy, -log sigmoid(r) of a thumb up.

    smoothing: share of thumbs that are known to be wrong. scores: (N) less the score at which up and down are even; up:
    (N) of 0 and 1.
    """
    target = up * (1 - 2 * smoothing) + smoothing
    return functional.binary_cross_entropy_with_logits(scores, target, reduction="none")


def rating_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """(N) squared distances to ratings, halved: nats of a rating with noise of variance 1, less a constant."""
    return (predicted - target).square() / 2
