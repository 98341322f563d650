import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo.advantages import gae, whiten

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31 - 1)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
shares = st.floats(0.0, 1.0)


def right_padded(lengths: list[int], extra: int = 0) -> Tensor:
    return torch.arange(max(lengths) + extra) < torch.tensor(lengths).unsqueeze(1)


def draw(shape: torch.Size, seed: int) -> tuple[Tensor, Tensor]:
    rewards, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rewards, values


def textbook_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The estimator as the sum that defines it, one sequence without padding, no recursion."""
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@quick
@given(lengths, seeds, shares, shares)
def test_gae_equals_the_textbook_sum(lengths: list[int], seed: int, gamma: float, lam: float) -> None:
    mask = right_padded(lengths)
    rewards, values = draw(mask.shape, seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, n in enumerate(lengths):
        sums = textbook_gae(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        wanted = torch.tensor(sums, dtype=torch.float64)
        torch.testing.assert_close(advantages[row, :n], wanted)
        torch.testing.assert_close(returns[row, :n], wanted + values[row, :n])


def test_gae_equals_numbers_worked_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.5)
    # deltas: 0.9 * 0.6 - 0.5 = 0.04;  0.9 * 0.8 - 0.6 = 0.12;  1 - 0.8 = 0.2.  gamma * lam = 0.45
    torch.testing.assert_close(advantages, torch.tensor([[0.1345, 0.21, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.6345, 0.81, 1.0]]))


@quick
@given(lengths, seeds)
def test_undiscounted_gae_is_the_return_minus_the_value(lengths: list[int], seed: int) -> None:
    mask = right_padded(lengths)
    rewards, values = draw(mask.shape, seed)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come)
    torch.testing.assert_close(advantages, (to_come - values) * mask)


@quick
@given(lengths, seeds, st.integers(1, 5))
def test_more_padding_with_rubbish_in_it_changes_no_bit_of_gae(lengths: list[int], seed: int, extra: int) -> None:
    short, long = right_padded(lengths), right_padded(lengths, extra)
    rewards, values = draw(long.shape, seed)
    width = short.shape[1]
    plain = gae(rewards[:, :width], values[:, :width], short, gamma=0.99, lam=0.95)
    rewards, values = rewards.masked_fill(~long, torch.nan), values.masked_fill(~long, torch.inf)
    padded = gae(rewards, values, long, gamma=0.99, lam=0.95)
    for a, b in zip(plain, padded, strict=True):
        assert torch.equal(a, b[:, :width])
        assert not b[:, width:].any()


def test_gae_hands_out_no_gradient() -> None:
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_gae_refuses_padding_on_the_left() -> None:
    with pytest.raises(AssertionError, match="to the right"):
        gae(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[False, True, True]]), gamma=1.0, lam=1.0)


@quick
@given(lengths, seeds)
def test_whitened_numbers_have_mean_0_and_std_1_over_the_mask(lengths: list[int], seed: int) -> None:
    mask = right_padded([*lengths, 2])
    x = 3.0 + 5.0 * draw(mask.shape, seed)[0]
    inside = whiten(x, mask)[mask].tolist()
    mean = sum(inside) / len(inside)
    assert mean == pytest.approx(0.0, abs=1e-6)
    assert sum((v - mean) ** 2 for v in inside) / len(inside) == pytest.approx(1.0, abs=1e-3)


def test_whitening_equals_numbers_worked_by_hand_and_blanks_the_padding() -> None:
    x = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 7.0, torch.inf]])  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    white = whiten(x, torch.tensor([[True, True, False]] * 2))
    torch.testing.assert_close(white, torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / 5**0.5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1234.567, -1e6])
def test_whitening_makes_no_signal_out_of_rounding(constant: float) -> None:
    x = torch.full((32, 37), constant)
    assert whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1e-4
