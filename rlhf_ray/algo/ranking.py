"""The figures that say how well choices were predicted."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Numbers = Tensor | Sequence[float]

_Z90 = 1.6448536269514722
"""Normal quantile of 0.95."""


@dataclass(frozen=True, slots=True)
class Slope:
    """The b in P = sigmoid(b * margin) of choices that a model has predicted."""

    value: float
    """Under which they are likeliest; 1 / b is the temperature that calibrates the model (Guo et al. 2017,
    arXiv:1706.04599, section 4.2)."""
    confirmed: float
    """Its lower 95% bound, at least 0: how sure of itself the model may be."""


def slope_of(margins: Numbers, groups: Sequence[Hashable]) -> Slope:
    """What choices say of a model's margins.

    Newton's method on the likelihood of the choices with Firth's correction (1993, Biometrika 80), so that b is finite
    though all choices are right. The bound is b - 1.645 se, where se is that of independent choices,
    se^2 = 1 / information, or, where that is more, the one that holds though choices of one group go together (Liang
    and Zeger 1986): se^2 = sum over groups of (sum of scores)^2 / information^2.
    Margins that choices do not confirm have a bound of 0, and so have a handful of right ones, which coins give as
    well; margins of 0 say nothing and have no slope.

    margins: (N), score of the chosen answer less that of the other; groups: (N), such as the prompt of each.
    """
    m = _flat(margins).double()
    assert len(m) == len(groups), (len(m), len(groups))
    unit = m.abs().max().item() if len(m) else 0.0
    if unit == 0:
        return Slope(0.0, 0.0)
    m = m / unit  # Newton's steps stay small, whatever the scores are counted in
    b = torch.zeros((), dtype=torch.float64)
    for _ in range(50):
        right = torch.sigmoid(b * m)
        by_choice = m.square() * right * (1 - right)
        information = by_choice.sum().clamp(min=1e-12)
        firth = (m * by_choice * (1 - 2 * right)).sum() / (2 * information)
        step = ((m * (1 - right)).sum() + firth) / information
        b = b + step.clamp(-1, 1)
        if abs(step) < 1e-10:
            break
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([places[group] for group in groups])
    by_group = torch.zeros(len(places), dtype=torch.float64).index_add(0, index, m * torch.sigmoid(-b * m))
    error = torch.maximum(information.sqrt(), by_group.square().sum().sqrt()) / information
    return Slope(b.item() / unit, max(0.0, (b - _Z90 * error).item()) / unit)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The predictions of about one probability, and how often they came true."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean of the predicted probabilities."""
    observed: float
    """Share of them that came true."""


def reliability_bins(probs: Numbers, outcomes: Numbers, bins: int = 10) -> list[ReliabilityBin]:
    """A reliability diagram's bars: predictions in bins of equal width, lowest first, empty bins left out.

    Bin k holds k / bins <= p < (k + 1) / bins; the last one holds p = 1 too.
    Guo et al. 2017 (arXiv:1706.04599), section 2.

    probs: (N) in [0, 1]; outcomes: (N) of 0 and 1, or shares between. For a reward model's choices orient each pair
    without looking at the label (or give max(p, 1 - p) and whether the choice was right): of pairs that are all
    turned so that the outcome is 1, calibration says nothing.
    """
    p, y = _flat(probs), _flat(outcomes)
    assert p.shape == y.shape, (p.shape, y.shape)
    assert bool(((p >= 0) & (p <= 1)).all()), "a probability lies outside [0, 1]"
    place = (p * bins).long().clamp(max=bins - 1)
    return [
        ReliabilityBin(k / bins, (k + 1) / bins, int(here.sum()), p[here].mean().item(), y[here].mean().item())
        for k in range(bins)
        if (here := place == k).any()
    ]


def expected_calibration_error(probs: Numbers, outcomes: Numbers, bins: int = 10) -> float:
    """The mean distance between predicted probability and observed share, in [0, 1]; 0 is perfectly calibrated.

    ECE = sum over bins of count / N * |observed - predicted|. Guo et al. 2017 (arXiv:1706.04599), equation 3.
    Inputs as for `reliability_bins`, at least one.
    """
    bars = reliability_bins(probs, outcomes, bins)
    assert bars, "no prediction to calibrate"
    total = sum(bar.count for bar in bars)
    return sum(bar.count * abs(bar.observed - bar.predicted) for bar in bars) / total


def bootstrap_mean_ci(values: Numbers, *, seed: int, n: int = 2000) -> tuple[float, float]:
    """The lower and upper end of the mean's 95% interval, from n resamples; the same seed gives the same interval.

    Percentile bootstrap: Efron 1979; Efron and Tibshirani 1993, chapter 13. For a paired gain give the differences;
    several values of one prompt belong averaged first, for the interval takes the values as independent.

    values: (N), at least one, in units of their own.
    """
    x = _flat(values)
    assert len(x) > 0, "no values to resample"
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([x[torch.randint(len(x), (len(x),), generator=generator)].mean() for _ in range(n)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """How varied texts are, in [0, 1]: distinct n-grams over all n-grams of all texts together; 0 without any.

    "distinct-n" of Li et al. 2016 (arXiv:1510.03055). It falls as texts get more or longer: compare like with like.

    sequences: each text's tokens or words; n: 1 for words, 2 for neighbours. An n-gram never spans two texts.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in sequences for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _flat(x: Numbers) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64, device="cpu").detach().flatten()
