"""Agreement, against the examples that its inventors worked by hand."""

import math
import random

import pytest

from rlhf_ray.algo.agreement import Level, cohen_kappa, krippendorff_alpha, krippendorff_interval

_: int | None = None
JUDGES: list[list[int | None]] = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
"""Krippendorff 2011, section E: four judges, twelve things, some not judged."""
UNITS = [[value for value in unit if value is not None] for unit in zip(*JUDGES, strict=True)]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(level: Level, alpha: float) -> None:
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize(
    ("first", "second", "alpha"),
    [("0100000010", "1110010000", 0.095), ("aabbdcccedda", "babbbccceddd", 0.692)],
)
def test_krippendorffs_examples_of_two_judges(first: str, second: str, alpha: float) -> None:
    """Krippendorff 2011, sections A and B."""
    units = [[float(ord(value)) for value in unit] for unit in zip(first, second, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(alpha, abs=5e-4)


def test_two_judges_of_two_values_by_hand() -> None:
    # (a, a), (a, b), (b, b), (a, a): o_ab = o_ba = 1, n_a = 5, n_b = 3, n = 8; alpha = 1 - 7 * 2 / (2 * 5 * 3)
    assert krippendorff_alpha([[0, 0], [0, 1], [1, 1], [0, 0]]) == pytest.approx(1 - 7 * 2 / 30)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_all_agree_or_nothing_is_there_to_agree_about(level: Level) -> None:
    assert krippendorff_alpha([[1, 1], [2, 2, 2], [5, 5]], level) == 1.0
    assert krippendorff_alpha([[1, 1], [1, 1]], level) is None
    assert krippendorff_alpha([[1], [2]], level) is None
    assert krippendorff_alpha([], level) is None


def test_values_at_random_agree_by_chance_alone() -> None:
    draw = random.Random(0)
    units = [[draw.randrange(5) for _ in range(3)] for _ in range(3_000)]
    for level in ("nominal", "ordinal", "interval"):
        assert abs(krippendorff_alpha(units, level) or 0.0) < 0.03


@pytest.mark.parametrize("seed", range(3))
def test_its_interval_holds_the_truth(seed: int) -> None:
    """Two judges who copy each other with probability 0.6 and else draw evenly: alpha is 0.6."""
    draw = random.Random(seed)

    def unit() -> list[float]:
        first = draw.randrange(4)
        return [first, first if draw.random() < 0.6 else draw.randrange(4)]

    units = [unit() for _ in range(400)]
    interval = krippendorff_interval(units, seed=seed)
    assert interval is not None
    low, high = interval
    assert low < 0.6 < high
    assert high - low < 0.15
    assert krippendorff_interval([[1, 1], [1, 1]]) is None


def test_kappa_by_hand() -> None:
    """Fifty proposals, two readers: 20 twice yes, 15 twice no, 5 and 10 apart. 0.7 observed, 0.5 by chance."""
    pairs = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa(pairs, "linear") == pytest.approx(0.4)


def test_kappa_of_three_values_by_hand() -> None:
    table = [[25, 13, 12], [12, 2, 16], [3, 15, 2]]
    pairs = [(float(i), float(k)) for i in range(3) for k in range(3) for _ in range(table[i][k])]
    observed, expected = 0.29, 0.50 * 0.40 + 0.30 * 0.30 + 0.20 * 0.30
    assert cohen_kappa(pairs) == pytest.approx((observed - expected) / (1 - expected))


def test_weighted_kappa_forgives_what_is_near() -> None:
    near = [(1.0, 2.0), (2.0, 2.0), (3.0, 3.0), (1.0, 1.0)]
    far = [(1.0, 3.0), (2.0, 2.0), (3.0, 3.0), (1.0, 1.0)]
    assert (cohen_kappa(near, "quadratic") or 0) > (cohen_kappa(far, "quadratic") or 0)
    # by hand, far, linear: observed 2 / 4; expected over places 0 1 2: rows .5 .25 .25, columns .25 .25 .5
    expected = 0.5 * (0.25 * 1 + 0.5 * 2) + 0.25 * (0.25 * 1 + 0.5 * 1) + 0.25 * (0.25 * 2 + 0.25 * 1)
    assert cohen_kappa(far, "linear") == pytest.approx(1 - 0.5 / expected)


def test_kappa_of_nothing() -> None:
    assert cohen_kappa([]) is None
    assert cohen_kappa([(1.0, 1.0)]) is None
    assert not math.isnan(cohen_kappa([(1.0, 2.0)]) or 0.0)
