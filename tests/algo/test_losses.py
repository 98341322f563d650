import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo.losses import (
    Averaging,
    TokenLoss,
    Totals,
    average,
    cispo_loss,
    clip_loss,
    dual_clip_loss,
    gspo_loss,
    masked_mean,
    policy_stats,
    reinforce_loss,
    value_loss_clipped,
)
from tests.algo.batches import Ragged, parity, ragged

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]


def reinforce(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    return reinforce_loss(new, advantages, mask)


LOSSES: dict[str, Loss] = {
    "clip": partial(clip_loss, low=0.2, high=0.3),
    "dual_clip": partial(dual_clip_loss, low=0.2, high=0.3, dual=1.5),
    "gspo": partial(gspo_loss, low=0.1, high=0.2),
    "cispo": partial(cispo_loss, high=0.5),
    "reinforce": reinforce,
}
all_losses = pytest.mark.parametrize("name", LOSSES)
AVERAGES: list[Averaging] = ["token", "sequence", "constant"]


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def textbook(name: str, new: list[float], old: list[float], advantages: list[float]) -> list[float]:
    """The loss of each token of one response."""
    losses = []
    for n, o, a in zip(new, old, advantages, strict=True):
        ratio = math.exp(n) / math.exp(o)
        match name:
            case "clip":
                gain = min(ratio * a, clamp(ratio, 0.8, 1.3) * a)
            case "dual_clip":
                gain = min(ratio * a, clamp(ratio, 0.8, 1.3) * a)
                gain = max(gain, 1.5 * a) if a < 0 else gain
            case "gspo":
                whole = math.prod(math.exp(x) / math.exp(y) for x, y in zip(new, old, strict=True)) ** (1 / len(new))
                gain = min(whole * a, clamp(whole, 0.9, 1.2) * a)
            case "cispo":
                gain = min(ratio, 1.5) * a * n
            case _:
                gain = a * n
        losses.append(-gain)
    return losses


def textbook_average(how: Averaging, rows: list[list[float]], length: int) -> float:
    rows = [row for row in rows if row]
    match how:
        case "token":
            return statistics.fmean(x for row in rows for x in row)
        case "sequence":
            return statistics.fmean(statistics.fmean(row) for row in rows)
        case "constant":
            return sum(sum(row) for row in rows) / (len(rows) * length)


@all_losses
@parity
@given(ragged())
def test_each_policy_loss_equals_the_textbook_loop(name: str, batch: Ragged) -> None:
    new, old, advantages = batch.draw(3)
    found = LOSSES[name](new, old, advantages, batch.mask).loss
    for losses, *row in batch.rows(found, new, old, advantages):
        assert losses == pytest.approx(textbook(name, *row), abs=1e-6)


@pytest.mark.parametrize("how", AVERAGES)
@parity
@given(ragged())
def test_each_average_equals_the_textbook_loop(how: Averaging, batch: Ragged) -> None:
    (x,) = batch.draw(1, fill=torch.nan)
    rows = [row for (row,) in batch.rows(x)]
    assert average(x, batch.mask, how, length=9).item() == pytest.approx(textbook_average(how, rows, 9), abs=1e-6)


def test_averages_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = {how: average(x, mask, how, length=10).item() for how in AVERAGES}
    assert found == {"token": 3.5, "sequence": 4.0, "constant": pytest.approx(0.7)}


@pytest.mark.parametrize("how", AVERAGES)
@parity
@given(ragged())
def test_parts_that_know_the_totals_add_up_to_the_whole(how: Averaging, batch: Ragged) -> None:
    (x,) = batch.draw(1, fill=torch.nan)
    totals, half = Totals.of(batch.mask), len(x) // 2
    parts = [
        average(x[rows], batch.mask[rows], how, length=9, totals=totals) for rows in (slice(0, half), slice(half, None))
    ]
    assert sum(parts).item() == pytest.approx(average(x, batch.mask, how, length=9).item(), abs=1e-5)


def test_masked_mean_sees_the_mask_only() -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, -torch.inf]])
    assert masked_mean(x, torch.tensor([[True, True, False], [True, False, False]])).item() == 3.0


def test_a_mean_of_nothing_is_no_number() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert masked_mean(torch.ones(2, 2), nothing).isnan()
    assert all(average(torch.ones(2, 2), nothing, how, length=3).isnan() for how in AVERAGES)


def test_clip_loss_and_stats_equal_numbers_worked_by_hand() -> None:
    # ratio:      1.5         0.5   1.5          0.5           1.5
    # advantage:  1           1     -1           -1            2
    # gain:       1.2 (clip)  0.5   -1.5         -0.8 (clip)   2.4 (clip)     sum 1.8, mean 0.36
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.5]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    old = torch.full((1, 5), -2.0)
    mask = torch.ones(1, 5, dtype=torch.bool)
    new = old + ratios.log()
    part = clip_loss(new, old, advantages, mask, low=0.2, high=0.2)
    stats = policy_stats(new, old, part.clipped, mask)
    assert masked_mean(part.loss, mask).item() == pytest.approx(-0.36, abs=1e-6)
    assert stats.clipfrac.item() == pytest.approx(0.6)
    assert stats.ratio.item() == pytest.approx(1.1)
    # ln 1.5 = 0.405465, ln 0.5 = -0.693147; (3 * 0.164402 + 2 * 0.480453) / 5 / 2
    assert stats.approxkl.item() == pytest.approx(0.145411, abs=1e-5)


def test_other_losses_equal_numbers_worked_by_hand() -> None:
    # ratio 4, advantage -1: the clip does not bind (-4), the dual clip stops it at 3
    ratio, mask = torch.tensor([[4.0]]), torch.ones(1, 1, dtype=torch.bool)
    worst = dual_clip_loss(ratio.log(), torch.zeros(1, 1), torch.tensor([[-1.0]]), mask, low=0.2, high=0.2, dual=3.0)
    assert (worst.loss.item(), worst.clipped.item()) == (3.0, True)
    # ratios 4 and 1: their geometric mean is 2, which is cut to 1.2
    new, both = torch.tensor([[math.log(4.0), 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    whole = gspo_loss(new, torch.zeros(1, 2), torch.ones(1, 2), both, low=0.2, high=0.2)
    assert whole.loss.tolist()[0] == pytest.approx([-1.2, -1.2])
    assert whole.clipped.all()
    # ratio e^-1, below the cap: -e^-1 * 2 * -1
    weighed = cispo_loss(torch.tensor([[-1.0]]), torch.zeros(1, 1), torch.tensor([[2.0]]), mask, high=0.5)
    assert weighed.loss.item() == pytest.approx(2 / math.e)
    assert reinforce_loss(torch.tensor([[-1.5]]), torch.tensor([[2.0]]), mask).loss.item() == 3.0


def gradient(loss: Loss, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    new = new.clone().requires_grad_()
    masked_mean(loss(new, old, advantages, mask).loss, mask).backward()
    assert new.grad is not None
    return new.grad


def test_the_clips_gradient_is_the_advantage_inside_and_zero_where_it_binds() -> None:
    new = torch.tensor([[0.0, math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]])
    advantages = torch.tensor([[3.0, 1.0, 1.0, -1.0, -1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    found = gradient(partial(clip_loss, low=0.2, high=0.2), new, torch.zeros(1, 5), advantages, mask)
    # dL/dlogprob = -A * ratio / 5 where the clip does not bind
    torch.testing.assert_close(found, torch.tensor([[-0.6, 0.0, -0.1, 0.3, 0.0]]))


@pytest.mark.parametrize("name", ["clip", "dual_clip", "cispo"])
@parity
@given(ragged())
def test_where_nothing_has_moved_the_gradient_is_that_of_reinforce(name: str, batch: Ragged) -> None:
    old, advantages = batch.draw(2)
    plain = gradient(reinforce, old, old, advantages, batch.mask)
    torch.testing.assert_close(gradient(LOSSES[name], old, old, advantages, batch.mask), plain)


@parity
@given(ragged(shortest=1))
def test_gspos_gradient_at_ratio_one_is_reinforces_with_one_advantage_a_response(batch: Ragged) -> None:
    (old,) = batch.draw(1)
    advantages = torch.arange(1.0, len(old) + 1, dtype=torch.float64).unsqueeze(1).expand_as(old)

    def by_sequence(loss: Loss) -> Tensor:
        new = old.clone().requires_grad_()
        average(loss(new, old, advantages, batch.mask).loss, batch.mask, "sequence", length=6).backward()
        assert new.grad is not None
        return new.grad

    torch.testing.assert_close(by_sequence(LOSSES["gspo"]), by_sequence(reinforce))


@all_losses
@parity
@given(ragged(), st.sampled_from([torch.nan, torch.inf]))
def test_rubbish_in_the_padding_reaches_neither_loss_nor_gradient(name: str, batch: Ragged, rubbish: float) -> None:
    results: list[Any] = []
    for fill in (0.0, rubbish):
        new, old, advantages = batch.draw(3, fill)
        new.requires_grad_()
        part = LOSSES[name](new, old, advantages, batch.mask)
        loss = average(part.loss, batch.mask, "sequence", length=6)
        loss.backward()
        assert new.grad is not None
        assert not new.grad[~batch.mask].any()
        stats = policy_stats(new, old, part.clipped, batch.mask)
        results.append([loss, new.grad, stats.approxkl, stats.clipfrac, stats.ratio])
    torch.testing.assert_close(results[0], results[1])


@all_losses
@parity
@given(ragged(shortest=1), st.data())
def test_two_shards_weighted_by_their_tokens_make_the_whole(name: str, batch: Ragged, data: st.DataObject) -> None:
    tensors, mask = list(batch.draw(3)), batch.mask
    cut = data.draw(st.integers(1, len(mask) - 1))

    def loss(rows: slice) -> Tensor:
        return masked_mean(LOSSES[name](*(x[rows] for x in tensors), mask[rows]).loss, mask[rows])

    parts = [loss(rows) * mask[rows].sum() / mask.sum() for rows in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(sum(parts), loss(slice(None)))


def textbook_value_loss(values: list[float], old: list[float], returns: list[float], clip: float) -> list[float]:
    return [
        max((v - r) ** 2, (o + clamp(v - o, -clip, clip) - r) ** 2) / 2
        for v, o, r in zip(values, old, returns, strict=True)
    ]


@parity
@given(ragged(), st.floats(0.05, 0.5), st.sampled_from([0.0, torch.nan]))
def test_value_loss_equals_the_textbook_loop(batch: Ragged, clip: float, fill: float) -> None:
    values, old, returns = batch.draw(3, fill)
    loss = value_loss_clipped(values, old, returns, batch.mask, clip=clip)
    rows = [textbook_value_loss(*row, clip) for row in batch.rows(values, old, returns)]
    assert loss.item() == pytest.approx(textbook_average("token", rows, 1), abs=1e-6)


def test_value_loss_and_gradient_equal_numbers_worked_by_hand() -> None:
    # value, old, return:  1.5, 1, 2  clipped to 1.2: max(0.25, 0.64) = 0.64, no gradient
    #                      0.5, 1, 2  clipped to 0.8: max(2.25, 1.44) = 2.25, gradient 0.5 - 2
    #                      1.1, 1, 2  not clipped:    0.81,                   gradient 1.1 - 2
    values = torch.tensor([[1.5, 0.5, 1.1]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = value_loss_clipped(values, torch.ones(1, 3), torch.full((1, 3), 2.0), mask, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx((0.64 + 2.25 + 0.81) / 6, abs=1e-6)
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0, :2] * 3, torch.tensor([0.0, -1.5]))
    assert -0.9 - 1e-6 <= values.grad[0, 2].item() * 3 <= -0.45 + 1e-6  # a tie of both branches: any split is right
