"""Lines: closed form against descent and by hand, and whether the sureness is true."""

import pytest
import torch
from torch import Tensor

from rlhf_ray.algo.regression import bayesian_ridge, descend, ridge


def drawn(n: int, d: int, *, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=draw) + 3
    w = torch.randn(d, dtype=torch.float64, generator=draw)
    return x, w, x @ w + 5 + noise * torch.randn(n, dtype=torch.float64, generator=draw)


def test_ridge_by_hand() -> None:
    # about the means x is -1, 1 and y -2, 2: w = 4 / (2 + 2), b = 3 - 1 * 2
    x, y = torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.tensor([1.0, 5.0], dtype=torch.float64)
    w, b = ridge(x, y, torch.ones(2, dtype=torch.float64), penalty=2.0)
    assert (w.tolist(), b.item()) == ([pytest.approx(1.0)], pytest.approx(1.0))


def test_ridge_finds_what_was_planted() -> None:
    x, truth, y = drawn(5000, 6, noise=0.5)
    w, b = ridge(x, y, torch.ones(len(y), dtype=torch.float64), penalty=1e-3)
    assert torch.allclose(w, truth, atol=0.03)
    assert b.item() == pytest.approx(5, abs=0.15)


def test_a_weight_of_two_is_the_same_row_twice() -> None:
    x, _, y = drawn(20, 3, noise=1.0)
    weights = torch.ones(20, dtype=torch.float64)
    weights[:5] = 2
    heavy, b = ridge(x, y, weights, penalty=1.0)
    twice, c = ridge(torch.cat([x, x[:5]]), torch.cat([y, y[:5]]), torch.ones(25, dtype=torch.float64), penalty=1.0)
    assert torch.allclose(heavy, twice)
    assert b.item() == pytest.approx(c.item())


def test_descent_and_the_closed_form_agree() -> None:
    x, _, y = drawn(200, 8, noise=1.0)
    v = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, b = ridge(x, y, v, penalty=3.0)

    def loss(line: Tensor) -> Tensor:
        return (v * (x @ line[:-1] + line[-1] - y).square()).sum() + 3.0 * line[:-1].square().sum()

    found = descend(loss, torch.zeros(9, dtype=torch.float64))
    assert torch.allclose(found, torch.cat([w, b[None]]), atol=1e-6)


def test_the_evidence_finds_the_noise() -> None:
    x, _, y = drawn(2000, 10, noise=0.7)
    assert bayesian_ridge([x], y).noise == pytest.approx(0.49, rel=0.1)


def test_it_is_as_sure_as_it_may_be() -> None:
    """Of predictions for what it has not seen, 95% lie within 1.96 standard deviations."""
    inside = total = 0
    for seed in range(30):
        x, _, y = drawn(150, 40, noise=1.0, seed=seed)
        expected, variance = bayesian_ridge([x[:60]], y[:60]).predict(x[60:])
        inside += int(((y[60:] - expected).abs() < 1.96 * variance.sqrt()).sum())
        total += 90
    assert 0.92 < inside / total < 0.98


def test_of_targets_that_have_nothing_to_do_with_the_features_it_knows_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, d, dtype=torch.float64, generator=draw) for d in (5, 1))
    expected, variance = bayesian_ridge([x], y[:, 0]).predict(x)
    assert expected.std().item() < 0.2
    assert (variance / y.var()).min().item() > 0.9


def test_targets_that_are_all_the_same_are_no_trouble() -> None:
    x, _, _ = drawn(10, 3, noise=0)
    expected, variance = bayesian_ridge([x], torch.full((10,), 2.0, dtype=torch.float64)).predict(x)
    assert torch.allclose(expected, torch.full((10,), 2.0, dtype=torch.float64))
    assert bool(torch.isfinite(variance).all())


def test_a_line_learnt_part_by_part_is_that_of_the_whole() -> None:
    x, _, y = drawn(200, 8, noise=0.5)
    whole, parted = bayesian_ridge([x], y), bayesian_ridge(x.split(64), y)
    for found, wanted in zip(parted.predict(x), whole.predict(x), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9)
