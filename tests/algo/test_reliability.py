"""Judges whose faults are known, found again."""

import random

import pytest
import torch

from rlhf_ray.algo.reliability import EARLIER_RIGHT, Choices, area_under_curve, dawid_skene, rating_effects


def choices(
    accuracy: list[float], *, things: int, overlap: int, classes: int = 2, seed: int = 0
) -> tuple[Choices, torch.Tensor]:
    """Estimates from judges who are right so often, else wrong evenly; with the truth."""
    draw = random.Random(seed)
    truth = [draw.randrange(classes) for _ in range(things)]
    rows = []
    for thing in range(things):
        for judge in draw.sample(range(len(accuracy)), overlap):
            others = [k for k in range(classes) if k != truth[thing]]
            said = truth[thing] if draw.random() < accuracy[judge] else draw.choice(others)
            rows.append((thing, judge, said))
    found = dawid_skene(*(torch.tensor(column) for column in zip(*rows, strict=True)), classes=classes)
    return found, torch.tensor(truth)


@pytest.mark.parametrize("classes", [2, 3])
def test_planted_accuracies_and_the_truth_are_found(classes: int) -> None:
    planted = [0.95, 0.9, 0.85, 0.8, 0.7, 0.6]
    found, truth = choices(planted, things=1_500, overlap=4, classes=classes)
    assert (found.accuracy - torch.tensor(planted)).abs().max() < 0.05
    assert float((found.truth.argmax(1) == truth).double().mean()) > 0.93


def test_one_who_says_the_opposite_helps_rather_than_harms() -> None:
    found, truth = choices([0.9, 0.9, 0.9, 0.9, 0.1], things=800, overlap=3)
    assert float(found.accuracy[4]) == pytest.approx(0.1, abs=0.05)
    votes, _ = choices([0.9, 0.9, 0.9, 0.9], things=800, overlap=2)
    assert float((found.truth.argmax(1) == truth).double().mean()) > 0.94
    assert votes.accuracy.min() > 0.8


def test_one_pass_by_hand() -> None:
    """Three judges, all agree on both things: of each row's 4 + 1 choices 2.8 + 1 are right."""
    rows = [(thing, judge, thing) for thing in range(2) for judge in range(3)]
    found = dawid_skene(*(torch.tensor(column) for column in zip(*rows, strict=True)), classes=2)
    assert torch.allclose(found.truth, torch.eye(2, dtype=torch.float64), atol=0.05)
    assert found.accuracy.tolist() == pytest.approx([(2.8 + 1) / 5] * 3, abs=0.02)


def test_an_edge_is_one_less_twice_the_mistakes_however_many_ties_everybody_sees() -> None:
    draw, mistakes, rows = random.Random(0), [0.0, 0.1, 0.3, 0.5, 0.6], []
    for thing in range(3_000):
        truth = draw.choice((0, 1, 2, 2))
        for judge in draw.sample(range(5), 4):
            said = 1 - truth if truth < 2 and draw.random() < mistakes[judge] else truth
            rows.append((thing, judge, said))
    found = dawid_skene(*(torch.tensor(column) for column in zip(*rows, strict=True)), classes=3)
    assert found.edge(0, 1).tolist() == pytest.approx([1 - 2 * e for e in mistakes], abs=0.08)
    assert float(found.accuracy[4]) > 0.65  # of which the ties are no merit


def test_an_edge_by_hand() -> None:
    """Of 40 things 20 are ties; the judge calls 5 of them better, and 3 of 20 the wrong way round."""
    confusion = torch.tensor([[[7.0, 3.0, 0.0], [0.0, 10.0, 0.0], [5.0, 0.0, 15.0]]]).double()
    confusion /= confusion.sum(2, keepdim=True)
    prior = torch.tensor([0.25, 0.25, 0.5]).double()
    assert Choices(prior[None], confusion, prior).edge(0, 1).item() == pytest.approx((17 - 3) / (17 + 3 + 5))


def test_who_said_nothing_that_others_judged_keeps_the_prior() -> None:
    rows = [(i, 0, i % 2) for i in range(50)]
    found = dawid_skene(*(torch.tensor(column) for column in zip(*rows, strict=True)), classes=2)
    assert found.accuracy.tolist() == pytest.approx([EARLIER_RIGHT], abs=1e-3)


def rated(
    lines: list[tuple[float, float, float]], *, things: int, overlap: int, seed: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    draw = random.Random(seed)
    quality = [draw.gauss(0, 1) for _ in range(things)]
    rows = []
    for thing in range(things):
        for judge in draw.sample(range(len(lines)), overlap):
            bias, scale, noise = lines[judge]
            rows.append((thing, judge, bias + scale * quality[thing] + draw.gauss(0, noise)))
    return tuple(torch.tensor(column) for column in zip(*rows, strict=True)), torch.tensor(quality)  # type: ignore[return-value]


def test_planted_biases_scales_and_noises_are_found() -> None:
    lines = [(3.0, 1.0, 0.3), (4.0, 0.5, 0.3), (2.0, 1.0, 0.6), (3.0, 0.8, 0.2), (3.0, 0.0, 0.5), (3.0, -0.9, 0.4)]
    told, quality = rated(lines, things=2_000, overlap=4)
    found = rating_effects(*told)
    planted = torch.tensor(lines)
    assert (found.bias - planted[:, 0]).abs().max() < 0.06
    assert (found.scale - planted[:, 1]).abs().max() < 0.06
    assert (found.noise - planted[:, 2]).abs().max() < 0.06
    expected = planted[:, 1] / (planted[:, 1] ** 2 + planted[:, 2] ** 2).sqrt()
    assert (found.correlation - expected).abs().max() < 0.06
    assert float(torch.corrcoef(torch.stack([found.quality, quality]))[0, 1]) > 0.95


def test_the_scales_are_those_that_the_covariances_give() -> None:
    """Where three rate everything: the covariance of two judges is the product of their scales."""
    lines = [(0.0, 1.0, 0.5), (0.0, 0.7, 0.5), (0.0, 0.4, 0.5)]
    (things, judges, ratings), _ = rated(lines, things=4_000, overlap=3)
    table = torch.zeros(4_000, 3, dtype=torch.float64)
    table[things, judges] = ratings.double()
    covariance = torch.cov(table.T)
    a, b, c = covariance[0, 1], covariance[0, 2], covariance[1, 2]
    loadings = torch.stack([(a * b / c).sqrt(), (a * c / b).sqrt(), (b * c / a).sqrt()])
    assert torch.allclose(rating_effects(things, judges, ratings).scale, loadings, atol=0.01)


def test_people_who_always_agree_do_not_break_it() -> None:
    rows = [(thing, judge, float(thing % 5)) for thing in range(20) for judge in range(3)]
    found = rating_effects(*(torch.tensor(column) for column in zip(*rows, strict=True)))
    assert bool(torch.isfinite(found.quality).all())
    assert found.correlation.min() > 0.9
    same = rating_effects(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([3.0, 3.0]))
    assert bool(torch.isfinite(same.correlation).all())


def test_the_area_under_the_curve_by_hand() -> None:
    assert area_under_curve(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx((4 - 1 + 0.5 - 0) / 4)
    assert area_under_curve(torch.tensor([1.0]), torch.tensor([2.0])) == 0.0
