"""Losses against numbers worked by hand, gradients against differences, minima against what was planted."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algo.feedback_losses import pair_losses, ranking_losses, rating_losses, thumb_losses

NO, YES = torch.tensor([False]), torch.tensor([True])


def one(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def minimise(loss, *parameters: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Newton-like, to the bottom."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_a_choice_is_bradley_and_terrys() -> None:
    assert pair_losses(one(2), one(1), tied=NO).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert pair_losses(one(1), one(1), tied=NO).item() == pytest.approx(math.log(2))
    assert pair_losses(one(3), one(-5), tied=YES).item() == 0  # a tie that is no part of the model


def test_scores_may_lie_far_apart() -> None:
    for ties in ("none", "davidson", "rao_kupper"):
        assert pair_losses(one(-500), one(500), tied=NO, ties=ties, tie=one(0)).item() == pytest.approx(1000, abs=1)
        assert pair_losses(one(500), one(-500), tied=NO, ties=ties, tie=one(0)).item() == pytest.approx(0, abs=1e-6)
    assert ranking_losses(torch.tensor([[500.0, -500.0]]), torch.tensor([[2, 1]])).item() == 1000


def test_a_margin_has_to_be_won_by() -> None:
    assert pair_losses(one(2), one(1), tied=NO, margin=1.0).item() == pytest.approx(math.log(2))
    tie = {"tied": YES, "ties": "davidson", "tie": 0.3}
    assert pair_losses(one(2), one(1), margin=1.0, **tie) == pair_losses(one(2), one(1), **tie)


def test_smoothing_is_that_share_of_the_opposite() -> None:
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert pair_losses(one(2), one(1), tied=NO, smoothing=0.1).item() == pytest.approx(0.9 * right + 0.1 * wrong)
    assert thumb_losses(one(1), one(1), smoothing=0.1).item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_davidson_by_hand() -> None:
    # scores 2 log 2 and 0: worth 4 and 1, so 2 and 1/2 of the root; t = 0 is worth 1: 2 : 1/2 : 1 of 3.5
    better, worse = one(2 * math.log(2)), one(0)
    assert math.exp(-pair_losses(better, worse, tied=NO, ties="davidson").item()) == pytest.approx(4 / 7)
    assert math.exp(-pair_losses(worse, better, tied=NO, ties="davidson").item()) == pytest.approx(1 / 7)
    assert math.exp(-pair_losses(better, worse, tied=YES, ties="davidson").item()) == pytest.approx(2 / 7)


def test_rao_and_kupper_by_hand() -> None:
    # scores log 4 and 0, threshold s = log 2: 4/(4+2), 1/(1+8), and what is left
    better, worse, t = one(math.log(4)), one(0), math.log(math.exp(math.log(2)) - 1)
    told = {"ties": "rao_kupper", "tie": t}
    assert math.exp(-pair_losses(better, worse, tied=NO, **told).item()) == pytest.approx(4 / 6)
    assert math.exp(-pair_losses(worse, better, tied=NO, **told).item()) == pytest.approx(1 / 9)
    assert math.exp(-pair_losses(better, worse, tied=YES, **told).item()) == pytest.approx(1 - 4 / 6 - 1 / 9)


def test_a_ranking_by_hand() -> None:
    scores = torch.tensor([[math.log(1), math.log(2), math.log(3)]], dtype=torch.float64)
    ranks = torch.tensor([[2, 1, 3]])  # the second first: 2/6, then the first of what is left: 1/4
    assert math.exp(-ranking_losses(scores, ranks).item()) == pytest.approx(2 / 6 * 1 / 4)
    tied = torch.tensor([[1, 1, 3]])  # each of the first two from all three
    assert math.exp(-ranking_losses(scores, tied).item()) == pytest.approx(1 / 6 * 2 / 6)
    padded = torch.tensor([[2, 1, 0]])  # 2/3
    assert math.exp(-ranking_losses(scores, padded).item()) == pytest.approx(2 / 3)


def test_a_ranking_of_two_is_a_choice() -> None:
    scores = torch.tensor([[0.3, -1.2]])
    alike = pair_losses(scores[:, 0], scores[:, 1], tied=NO)
    assert torch.allclose(ranking_losses(scores, torch.tensor([[1, 2]])), alike)


def test_rankings_are_the_chances_of_all_orders_and_sum_to_one() -> None:
    scores = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orders = list(itertools.permutations((1, 2, 3, 4)))
    chances = torch.exp(-ranking_losses(scores.expand(len(orders), 4), torch.tensor(orders)))
    assert chances.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_what_can_happen_to_a_pair_sums_to_one(ties: str) -> None:
    for d in (-30.0, -1.0, 0.0, 0.4, 30.0):
        told = {"ties": ties, "tie": one(-0.7)}
        losses = [
            pair_losses(one(d), one(0), tied=NO, **told),
            pair_losses(one(0), one(d), tied=NO, **told),
            pair_losses(one(d), one(0), tied=YES, **told),
        ]
        assert sum(math.exp(-loss.item()) for loss in losses) == pytest.approx(1)


def test_gradients_equal_finite_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 4, dtype=torch.float64, generator=draw, requires_grad=True)
    tied = torch.tensor([True, False, True, False, False, True])
    margin = torch.rand(6, dtype=torch.float64, generator=draw)
    tie = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for ties in ("none", "davidson", "rao_kupper"):

        def pairs(r: Tensor, t: Tensor, ties: str = ties) -> Tensor:
            return pair_losses(r[:, 0], r[:, 1], tied=tied, margin=margin, smoothing=0.1, ties=ties, tie=t)

        assert torch.autograd.gradcheck(pairs, (scores, tie))
    ranks = torch.tensor([[1, 2, 3, 4], [2, 1, 2, 4], [1, 1, 1, 1], [3, 1, 2, 0], [1, 2, 0, 0], [4, 3, 2, 1]])
    assert torch.autograd.gradcheck(lambda r: ranking_losses(r, ranks), (scores,))
    up = (torch.rand(6, dtype=torch.float64, generator=draw) > 0.5).double()
    assert torch.autograd.gradcheck(lambda r: thumb_losses(r[:, 0], up, smoothing=0.1), (scores,))
    assert torch.autograd.gradcheck(lambda r: rating_losses(r[:, 0], up), (scores,))


def test_where_a_ranking_is_short_no_gradient_is_lost() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    ranking_losses(scores, torch.tensor([[1, 2, 0]])).sum().backward()
    assert scores.grad is not None
    assert torch.allclose(scores.grad, torch.tensor([[-0.5, 0.5, 0.0]]))


def planted(n: int) -> tuple[Tensor, torch.Generator]:
    truth = torch.tensor([1.2, 0.4, 0.0, -0.5, -1.1], dtype=torch.float64)
    return truth - truth.mean(), torch.Generator().manual_seed(n)


def test_plackett_and_luce_find_what_was_planted() -> None:
    truth, draw = planted(0)
    noise = -torch.log(-torch.log(torch.rand(20_000, 5, dtype=torch.float64, generator=draw)))
    ranks = (truth + noise).argsort(1, descending=True).argsort(1) + 1  # Gumbel noise: Yellott 1977
    scores = torch.zeros(5, dtype=torch.float64)
    minimise(lambda: ranking_losses(scores.expand(len(ranks), 5), ranks).mean(), scores)
    assert torch.allclose(scores.detach() - scores.detach().mean(), truth, atol=0.03)


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_models_of_ties_find_what_was_planted(ties: str) -> None:
    truth, draw = planted(1)
    t = one(-0.4)
    i, j = torch.randint(0, 5, (2, 200_000), generator=draw)
    i, j = i[i != j], j[i != j]
    nothing = torch.zeros(len(i), dtype=torch.bool)
    told = {"ties": ties, "tie": t}
    wins = torch.exp(-pair_losses(truth[i], truth[j], tied=nothing, **told))
    draws = torch.exp(-pair_losses(truth[i], truth[j], tied=~nothing, **told))
    u = torch.rand(len(i), dtype=torch.float64, generator=draw)
    tied, lost = (u >= wins) & (u < wins + draws), u >= wins + draws
    better, worse = torch.where(lost, j, i), torch.where(lost, i, j)
    scores, found = torch.zeros(5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def loss() -> Tensor:
        return pair_losses(scores[better], scores[worse], tied=tied, ties=ties, tie=found).mean()

    minimise(loss, scores, found)
    assert torch.allclose(scores.detach() - scores.detach().mean(), truth, atol=0.03)
    assert found.item() == pytest.approx(-0.4, abs=0.03)


def test_thumbs_and_ratings_find_what_was_planted() -> None:
    truth, draw = planted(2)
    rows = torch.randint(0, 5, (100_000,), generator=draw)
    up = (torch.rand(len(rows), dtype=torch.float64, generator=draw) < torch.sigmoid(truth[rows])).double()
    scores = torch.zeros(5, dtype=torch.float64)
    minimise(lambda: thumb_losses(scores[rows], up).mean(), scores)
    assert torch.allclose(scores.detach(), truth, atol=0.05)
    ratings = truth[rows] + torch.randn(len(rows), dtype=torch.float64, generator=draw)
    scores = torch.zeros(5, dtype=torch.float64)
    minimise(lambda: rating_losses(scores[rows], ratings).mean(), scores)
    assert torch.allclose(scores.detach(), truth, atol=0.03)


def test_smoothed_choices_never_make_scores_surer_than_the_labels_are() -> None:
    better, worse = one(0.0), one(0.0)
    minimise(lambda: pair_losses(better, worse.detach(), tied=NO, smoothing=0.2).mean(), better)
    assert torch.sigmoid(better).item() == pytest.approx(0.8)
