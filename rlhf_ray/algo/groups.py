"""Advantages from several responses to one prompt: what the others earned is the baseline, and no critic is needed.

returns: (B), what each response earned in units of reward; groups: (B) int, equal for responses to one prompt, in any
order. Results are (B), one advantage a response, for `advantages.spread` to give to its tokens. A constant added to all
returns of a group changes nothing.
"""

import torch
from torch import Tensor


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """A_i = r_i - mean of the other r_j of the group (REINFORCE leave-one-out).

    Unbiased, for the baseline does not depend on the response itself. Kool et al. 2019 ("Buy 4 REINFORCE samples, get a
    baseline for free!"); Ahmadian et al. 2024 (arXiv:2402.14740). Groups of two or more.
    """
    index, sizes = _indexed(groups)
    k = sizes[index]
    return (returns - _means(returns, index, sizes)) * k / (k - 1)


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6), both over the group, std with Bessel's correction.

    Shao et al. 2024 (arXiv:2402.03300), section 4.1.2. Groups of two or more; one whose returns are equal gives zeros.
    """
    index, sizes = _indexed(groups)
    centred = returns - _means(returns, index, sizes)
    variance = _sums(centred.square(), index, sizes) / (sizes - 1)
    return centred / (variance.sqrt() + 1e-6)[index]


def centred(returns: Tensor, groups: Tensor) -> Tensor:
    """A_i = r_i - mean over the group.

    Dr. GRPO: Liu et al. 2025 (arXiv:2503.20783), as dividing by the group's spread favours prompts that are
    nearly solved or nearly hopeless. The first step of REINFORCE++-baseline, too: Hu et al. 2025 (arXiv:2501.03262).
    """
    index, sizes = _indexed(groups)
    return returns - _means(returns, index, sizes)


def remax(returns: Tensor, greedy: Tensor) -> Tensor:
    """A_i = r_i - the return of the likeliest response to the same prompt, (B) each.

    Li et al. 2023 (arXiv:2310.10505); the likeliest response is sampled greedily.
    """
    return returns - greedy


def spread_of(returns: Tensor, groups: Tensor) -> Tensor:
    """The standard deviation over the population of each response's own group, (B); at 0 nothing is learnt."""
    index, sizes = _indexed(groups)
    deviations = (returns - _means(returns, index, sizes)).square()
    return (_sums(deviations, index, sizes) / sizes).sqrt()[index]


def _indexed(groups: Tensor) -> tuple[Tensor, Tensor]:
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, sizes


def _sums(x: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(len(sizes), dtype=x.dtype, device=x.device).index_add(0, index, x)


def _means(x: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return (_sums(x, index, sizes) / sizes)[index]
