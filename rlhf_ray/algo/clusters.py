"""Intervals for figures whose parts go together: pairs of one prompt, segments of one document.

Many judgements of few prompts say less than as many of as many prompts; who forgets that has intervals that are too
narrow. Groups are taken as independent of each other, judgements within one are not.
"""

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 200
"""Of groups, at most, that the jackknife leaves out in turn."""
_Z95 = 1.959963984540054
"""Normal quantile of 0.975."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float
    count: int
    """Of what it is over."""
    groups: int


def mean_of(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """The mean over all values, with an interval that holds though those of one group go together.

    se^2 = G / (G - 1) * sum over groups of (sum of deviations)^2 / N^2 (Liang and Zeger 1986, as a ratio of totals in
    Cochran 1977, section 6.3), and Student's t with G - 1 degrees of freedom. One group has no interval but the whole
    line.

    values, groups: of one length, at least 1.
    """
    mean, error, groups_n = _ratio(values, groups)
    half = student_t(groups_n - 1) * error if groups_n > 1 else math.inf
    return Estimate(mean, mean - half, mean + half, len(values), groups_n)


def share_of(right: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """A share of what is right (1, wrong 0; half counts), with an interval that stays within [0, 1].

    Wilson 1927's interval for as many independent trials as these are worth: N over their design effect, less for
    few groups, n = N / deff * (z / t_{G-1})^2 (Korn and Graubard 1998).

    right, groups: of one length, at least 1.
    """
    p, error, groups_n = _ratio(right, groups)
    count = len(right)
    if groups_n == 1:
        return Estimate(p, 0.0, 1.0, count, 1)
    variance = p * (1 - p)
    n = min(float(count), variance / error**2) if error > 0 else float(count if variance else groups_n)
    n *= (_Z95 / student_t(groups_n - 1)) ** 2
    z2 = _Z95**2
    centre = p + z2 / (2 * n)
    half = _Z95 * math.sqrt(variance / n + z2 / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return Estimate(p, min(max(low, 0.0), p), max(min(high, 1.0), p), count, groups_n)


def jackknife_of(figure: Callable[[Sequence[int]], float | None], groups: Sequence[Hashable]) -> Estimate | None:
    """Any figure of a sample, with an interval from what it is without each group in turn.

    se^2 = (G - 1) / G * sum over groups of (without g - mean of those)^2 (Tukey 1958; Efron and Tibshirani 1993,
    chapter 11), and Student's t with G - 1 degrees of freedom. More than `BLOCKS` groups are put into so many blocks at
    random, the same ones each time, and a block is left out at a time: G is then that of blocks (the delete-a-group
    jackknife, Kott 2001). None where the figure is none.

    figure: of places in the sample; groups: of each place.
    """
    value = figure(range(len(groups)))
    if value is None:
        return None
    block_of = _blocks(groups)
    blocks = [block_of[group] for group in groups]
    without = [
        found
        for left_out in range(min(len(block_of), BLOCKS))
        if len(block_of) > 1
        and (found := figure([place for place, block in enumerate(blocks) if block != left_out])) is not None
    ]
    n = len(without)
    if n < 2:
        return Estimate(value, -math.inf, math.inf, len(groups), len(block_of))
    middle = math.fsum(without) / n
    half = student_t(n - 1) * math.sqrt((n - 1) / n * math.fsum((found - middle) ** 2 for found in without))
    return Estimate(value, value - half, value + half, len(groups), len(block_of))


def _blocks(groups: Iterable[Hashable]) -> dict[Hashable, int]:
    """The number of each group's block: one of its own, or, of more than `BLOCKS`, one drawn, all about as large."""
    names = list(dict.fromkeys(groups))
    if len(names) > BLOCKS:
        random.Random(0).shuffle(names)
    return {name: place % BLOCKS for place, name in enumerate(names)}


def student_t(freedom: int) -> float:
    """The quantile of 0.975 of Student's t: exact for 1 and 2, else Abramowitz and Stegun 1964, 26.7.5 (to 0.4%)."""
    if freedom == 1:
        return 12.706204736432095
    if freedom == 2:
        return 4.302652729696142
    z, n = _Z95, freedom
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / n + g2 / n**2 + g3 / n**3 + g4 / n**4


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of ranks, ties sharing the middle of their places (Spearman 1904); None where one is flat."""
    x, y = _ranks(one), _ranks(other)
    assert len(x) == len(y), (len(x), len(y))
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.norm() * y.norm())
    return float(x @ y) / spread if spread > 0 else None


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """The chance that a positive one has a higher score than a negative one, ties half: the area under the ROC curve.

    Mann and Whitney 1947's U over what it is out of. None where there are no two kinds.
    """
    n = sum(positive)
    if not 0 < n < len(positive):
        return None
    ranks = _ranks(scores)[torch.tensor(positive)].sum()
    return float(ranks - n * (n + 1) / 2) / (n * (len(positive) - n))


def _ratio(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float, int]:
    """Mean, its standard error, and the number of groups."""
    assert len(values) == len(groups) > 0, (len(values), len(groups))
    x = torch.tensor(values, dtype=torch.float64)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([places[group] for group in groups])
    mean = x.mean()
    sums = torch.zeros(len(places), dtype=torch.float64).index_add(0, index, x - mean)
    n = len(places)
    error = float((sums.square().sum() * n / max(n - 1, 1)).sqrt()) / len(x)
    return float(mean), error, n


def _ranks(values: Sequence[float]) -> Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    _, place, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return middle[place]
