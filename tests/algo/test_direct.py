import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algo.direct import dpo_loss, ipo_loss, kto_loss
from tests.algo.batches import parity, seeds

betas = st.floats(0.01, 2.0)
WEIGHTS = {"weight_good": 1.0, "weight_bad": 1.5}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@parity
@given(seeds, betas)
def test_each_equals_the_textbook_loop(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    better, worse, drift = 3 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    good = torch.rand(7, generator=generator) < 0.5
    dpo, ipo = dpo_loss(better, worse, beta=beta), ipo_loss(better, worse, beta=beta)
    kto = kto_loss(better, good, drift, beta=beta, **WEIGHTS)
    z = max(0.0, beta * sum(drift.tolist()) / 7)
    for i, (b, w, g) in enumerate(zip(better.tolist(), worse.tolist(), good.tolist(), strict=True)):
        assert dpo[i].item() == pytest.approx(-math.log(sigmoid(beta * (b - w))), abs=1e-6)
        assert ipo[i].item() == pytest.approx((b - w - 1 / (2 * beta)) ** 2, rel=1e-6, abs=1e-6)
        wanted = 1 - sigmoid(beta * b - z) if g else 1.5 * (1 - sigmoid(z - beta * b))
        assert kto[i].item() == pytest.approx(wanted, abs=1e-6)


def test_numbers_worked_by_hand() -> None:
    zero = torch.zeros(1)
    assert dpo_loss(zero, zero, beta=0.1).item() == pytest.approx(math.log(2))
    assert ipo_loss(torch.tensor([5.0]), zero, beta=0.1).item() == pytest.approx(0.0)  # 1 / (2 * 0.1) = 5
    both = kto_loss(torch.zeros(2), torch.tensor([True, False]), torch.tensor([-3.0]), beta=0.5, **WEIGHTS)
    assert both.tolist() == pytest.approx([0.5, 0.75])  # the reference point is never below 0


@parity
@given(seeds, betas)
def test_what_both_responses_have_in_common_changes_nothing(seed: int, beta: float) -> None:
    better, worse, shift = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for loss in (dpo_loss, ipo_loss):
        torch.testing.assert_close(loss(better + shift, worse + shift, beta=beta), loss(better, worse, beta=beta))


def test_gradients_raise_what_is_good_and_lower_what_is_not() -> None:
    better, worse = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    dpo_loss(better, worse, beta=0.1).sum().backward()
    torch.testing.assert_close(better.grad, torch.full((3,), -0.05))
    torch.testing.assert_close(worse.grad, torch.full((3,), 0.05))
    ratios, drift = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), drift, beta=0.1, **WEIGHTS).sum().backward()
    assert ratios.grad is not None
    assert ratios.grad[0] < 0 < ratios.grad[1]
    assert drift.grad is None
