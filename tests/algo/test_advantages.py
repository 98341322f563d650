import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo.advantages import gae, reward_to_go, spread, trajectory_return, whiten, whiten_by_group
from tests.algo.batches import Ragged, parity, ragged, seeds

shares = st.floats(0.0, 1.0)


def textbook_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The estimator as the sum that defines it, one sequence without padding, no recursion."""
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values, 0.0][1:], strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@parity
@given(ragged(), shares, shares)
def test_gae_equals_the_textbook_sum(batch: Ragged, gamma: float, lam: float) -> None:
    rewards, values = batch.draw(2)
    advantages, returns = gae(rewards, values, batch.mask, gamma=gamma, lam=lam)
    for found, targets, r, v in batch.rows(advantages, returns, rewards, values):
        wanted = textbook_gae(r, v, gamma, lam)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert targets == pytest.approx([a + own for a, own in zip(wanted, v, strict=True)], abs=1e-6)


@parity
@given(ragged(), shares)
def test_returns_equal_the_textbook_sums(batch: Ragged, gamma: float) -> None:
    (rewards,) = batch.draw(1)
    to_go = reward_to_go(rewards, batch.mask, gamma=gamma)
    whole = trajectory_return(rewards, batch.mask, gamma=gamma)
    for later, everything, r in batch.rows(to_go, whole, rewards):
        assert later == pytest.approx([sum(gamma**k * x for k, x in enumerate(r[t:])) for t in range(len(r))], abs=1e-6)
        assert everything == pytest.approx([sum(gamma**k * x for k, x in enumerate(r))] * len(r), abs=1e-6)


def test_returns_worked_by_hand() -> None:
    rewards, mask = torch.tensor([[9.0, 1.0, 2.0, 4.0]]), torch.tensor([[False, True, True, True]])
    assert reward_to_go(rewards, mask, gamma=0.5).tolist() == [[0.0, 3.0, 4.0, 4.0]]
    assert trajectory_return(rewards, mask, gamma=0.5).tolist() == [[0.0, 3.0, 3.0, 3.0]]
    assert spread(torch.tensor([5.0]), mask).tolist() == [[0.0, 5.0, 5.0, 5.0]]


def test_gae_equals_numbers_worked_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.5)
    # deltas: 0.9 * 0.6 - 0.5 = 0.04;  0.9 * 0.8 - 0.6 = 0.12;  1 - 0.8 = 0.2.  gamma * lam = 0.45
    torch.testing.assert_close(advantages, torch.tensor([[0.1345, 0.21, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.6345, 0.81, 1.0]]))


@parity
@given(ragged())
def test_undiscounted_gae_is_the_return_minus_the_value(batch: Ragged) -> None:
    rewards, values = batch.draw(2)
    advantages, returns = gae(rewards, values, batch.mask, gamma=1.0, lam=1.0)
    to_come = reward_to_go(rewards, batch.mask, gamma=1.0)
    torch.testing.assert_close(returns, to_come)
    torch.testing.assert_close(advantages, to_come - values)


@parity
@given(ragged(), st.integers(1, 5), st.booleans())
def test_more_padding_with_rubbish_in_it_changes_no_bit(batch: Ragged, extra: int, left: bool) -> None:
    def wider(x: Tensor, fill: float) -> Tensor:
        more = torch.full((len(x), extra), fill, dtype=x.dtype)
        return torch.cat([more, x] if left else [x, more], dim=1)

    mask = batch.mask
    more = wider(mask, False)
    rewards, values = batch.draw(2)
    rubbish = [wider(x, fill).masked_fill(~more, fill) for x, fill in ((rewards, torch.nan), (values, torch.inf))]
    for plain, padded in (
        (gae(rewards, values, mask, gamma=0.99, lam=0.95), gae(*rubbish, more, gamma=0.99, lam=0.95)),
        ([trajectory_return(rewards, mask, gamma=0.9)], [trajectory_return(rubbish[0], more, gamma=0.9)]),
    ):
        for a, b in zip(plain, padded, strict=True):
            assert torch.equal(wider(a, 0.0), b)
    torch.testing.assert_close(wider(whiten(rewards, mask), 0.0), whiten(rubbish[0], more))


def test_gae_hands_out_no_gradient() -> None:
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert not advantages.requires_grad
    assert not returns.requires_grad


@parity
@given(ragged(shortest=2))
def test_whitened_numbers_have_mean_0_and_std_1_over_the_mask(batch: Ragged) -> None:
    (x,) = batch.draw(1)
    inside = whiten(3.0 + 5.0 * x, batch.mask)[batch.mask].tolist()
    mean = sum(inside) / len(inside)
    assert mean == pytest.approx(0.0, abs=1e-6)
    assert sum((v - mean) ** 2 for v in inside) / len(inside) == pytest.approx(1.0, abs=1e-3)


@parity
@given(ragged(), seeds)
def test_whitening_by_group_is_whitening_each_group_by_itself(batch: Ragged, seed: int) -> None:
    (x,) = batch.draw(1)
    groups = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(seed))
    found = whiten_by_group(x, batch.mask, groups)
    for group in groups.unique():
        rows = groups == group
        assert torch.equal(found[rows], whiten(x[rows], batch.mask[rows]))


def test_whitening_equals_numbers_worked_by_hand_and_blanks_the_padding() -> None:
    x = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 7.0, torch.inf]])  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    white = whiten(x, torch.tensor([[True, True, False]] * 2))
    torch.testing.assert_close(white, torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / 5**0.5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1234.567, -1e6])
def test_whitening_makes_no_signal_out_of_rounding(constant: float) -> None:
    x = torch.full((32, 37), constant)
    assert whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1e-4
