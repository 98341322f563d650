"""Losses that learn a policy from judgements themselves, without a reward model and without sampling.

A log-ratio is log p(response) - log p_reference(response) in nats, summed over the response's tokens; beta (1 / nats)
says how dear it is to leave the reference. All losses are (N), one a judgement.
"""

import torch
from torch import Tensor
from torch.nn import functional


def dpo_loss(better: Tensor, worse: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta * (better - worse)), the log-ratios of a preferred response and of the other, (N) each.

    Direct preference optimisation: Rafailov et al. 2023 (arXiv:2305.18290), equation 7.
    """
    return -functional.logsigmoid(beta * (better - worse))


def ipo_loss(better: Tensor, worse: Tensor, *, beta: float) -> Tensor:
    """(better - worse - 1 / (2 beta))^2: the difference of log-ratios, (N) each, is drawn to a finite margin.

    Where all agree on a choice, DPO's margin grows without end; this one does not. Azar et al. 2023
    (arXiv:2310.12036), equation 17.
    """
    return (better - worse - 1.0 / (2.0 * beta)).square()


def kto_loss(
    ratios: Tensor, good: Tensor, drift: Tensor, *, beta: float, weight_good: float, weight_bad: float
) -> Tensor:
    """weight * (1 - sigmoid(+-(beta * ratio - z))), + for responses called good, - for the others; (N).

    z = max(0, beta * drift) is the reference point: how far the policy has moved at all. Kahneman-Tversky optimisation:
    Ethayarajh et al. 2024 (arXiv:2402.01306), equation 8.

    ratios: (N) log-ratios; good: (N) bool; drift: (M) log-ratios of responses to other prompts than theirs, whose mean
    estimates the KL, without gradient.
    """
    reference_point = (beta * drift.detach().mean()).clamp(min=0.0)
    distance = beta * ratios - reference_point
    signed = torch.where(good, distance, -distance)
    weights = torch.where(good, weight_good, weight_bad)
    return weights * (1.0 - signed.sigmoid())
