"""How far people agree who judged the same things, beyond what chance would give.

1 is agreement throughout, 0 what values drawn at random would give, below 0 disagreement by system.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

Level = Literal["nominal", "ordinal", "interval"]
"""What a difference between two values means: that they differ, how many others lie between, or how far it is."""
RESAMPLES = 1_000
AT_ONCE = 10_000_000
"""Numbers of a resampling that are held at a time."""


def krippendorff_alpha(units: Iterable[Sequence[float]], level: Level = "nominal") -> float | None:
    """Krippendorff's alpha of any number of judges, with whatever is missing left out.

    alpha = 1 - D_observed / D_expected = 1 - (n - 1) * sum_ck o_ck d_ck / sum_ck n_c n_k d_ck, where o_ck counts how
    often values c and k met in a unit, each unit of m values counting m, n_c = sum_k o_ck and n = sum_c n_c; d_ck is
    [c != k], or (c - k)^2, or (n_c / 2 + sum of n_g for g between c and k + n_k / 2)^2 (Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability").

    units: the values that one thing was given, one a judge; a unit of fewer than two says nothing. None where nothing
    was judged twice, or all values are the same, so that there is nothing to agree about.
    """
    values, met = _coincidences(units)
    return _alpha(values, met.sum(0), level)


def krippendorff_interval(
    units: Iterable[Sequence[float]], level: Level = "nominal", *, seed: int = 0
) -> tuple[float, float] | None:
    """The 95% interval of alpha, by 1,000 resamplings of whole units; None where alpha is none.

    Of few units it is wide, and of very few meaningless: a resampling in which nothing varies is left out.
    """
    values, met = _coincidences(units)
    if _alpha(values, met.sum(0), level) is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    count, cells = len(met), met.flatten(1)  # (U, K * K)
    alphas: list[float] = []
    at_once = max(1, AT_ONCE // max(count, cells.shape[1]))
    for start in range(0, RESAMPLES, at_once):
        drawn = torch.randint(count, (min(at_once, RESAMPLES - start), count), generator=generator)  # (R, U)
        times = torch.zeros(drawn.shape, dtype=met.dtype).scatter_add_(1, drawn, torch.ones(drawn.shape).to(met.dtype))
        for whole in (times @ cells).unflatten(1, met.shape[1:]):  # (K, K)
            if (alpha := _alpha(values, whole, level)) is not None:
                alphas.append(alpha)
    low, high = torch.tensor(alphas).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def cohen_kappa(
    pairs: Sequence[tuple[float, float]], weights: Literal["none", "linear", "quadratic"] = "none"
) -> float | None:
    """Cohen's kappa of two judges who judged the same things.

    kappa = 1 - sum_ck w_ck o_ck / sum_ck w_ck e_ck, with o_ck the share of things that the first gave c and the second
    k, and e_ck the product of how often each gives them; w_ck is [c != k] (Cohen 1960), or the distance of the two on
    the list of all values, or its square (Cohen 1968).

    pairs: what the two gave each thing. None where there is none, or both always gave the same one value.
    """
    values = sorted({value for pair in pairs for value in pair})
    place = {value: i for i, value in enumerate(values)}
    observed = torch.zeros(len(values), len(values), dtype=torch.float64)
    for first, second in pairs:
        observed[place[first], place[second]] += 1 / len(pairs)
    apart = (torch.arange(len(values))[:, None] - torch.arange(len(values))[None, :]).abs().double()
    match weights:
        case "none":
            weight = (apart > 0).double()
        case "linear":
            weight = apart
        case "quadratic":
            weight = apart**2
        case _:
            assert_never(weights)
    expected = observed.sum(1)[:, None] * observed.sum(0)[None, :]
    by_chance = float((weight * expected).sum())
    return 1 - float((weight * observed).sum()) / by_chance if by_chance else None


def _coincidences(units: Iterable[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """All values that met another, in their order (K), and how often each met each in each unit (U, K, K)."""
    told = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in told for value in unit})
    place = {value: i for i, value in enumerate(values)}
    met = torch.zeros(len(told), len(values), len(values), dtype=torch.float64)
    for row, unit in enumerate(told):
        counts = torch.bincount(torch.tensor([place[value] for value in unit]), minlength=len(values)).double()
        met[row] = (counts[:, None] * counts[None, :] - counts.diag()) / (len(unit) - 1)
    return torch.tensor(values, dtype=torch.float64), met


def _alpha(values: Tensor, met: Tensor, level: Level) -> float | None:
    """From the values (K) and their coincidences (K, K)."""
    totals = met.sum(1)  # (K)
    match level:
        case "nominal":
            apart = 1 - torch.eye(len(values), dtype=torch.float64)
        case "interval":
            apart = (values[:, None] - values[None, :]) ** 2
        case "ordinal":
            middle = totals.cumsum(0) - totals / 2  # where a value's own ones lie among all
            apart = (middle[:, None] - middle[None, :]) ** 2
        case _:
            assert_never(level)
    expected = float((totals[:, None] * totals[None, :] * apart).sum())
    return 1 - float(totals.sum() - 1) * float((met * apart).sum()) / expected if expected else None
