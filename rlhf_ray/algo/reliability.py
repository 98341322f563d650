"""Who among several judges can be relied on, found from nothing but what they said of the same things.

Whoever judges things that nobody else judged cannot be told from anybody: their figures stay those of the prior.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PASSES, CLOSE_ENOUGH = 200, 1e-6
"""Of expectation maximisation: at most so many, or until nothing moves by more."""
EARLIER_CHOICES, EARLIER_RIGHT = 4.0, 0.7
"""What is believed of a judge before they said anything: as if of so many choices this share had been right. Better
than chance, or all would be as likely with everything turned round."""
EARLIER_RATINGS = 4.0
"""The same of ratings: how many a judge's line is pulled to everybody's by."""
LEAST_NOISE = 1e-3
"""Variance of a rating; people who always agree would otherwise be infinitely sure."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What is true, and how each judge says it. I things, J judges, K classes."""

    truth: Tensor
    """(I, K) how likely each class is, given all that was said."""
    confusion: Tensor
    """(J, K, K) how often a judge says the column where the row is true."""
    prior: Tensor
    """(K) how common each class is."""

    @property
    def accuracy(self) -> Tensor:
        """(J) how often each judge says what is true."""
        return (self.confusion.diagonal(dim1=1, dim2=2) * self.prior).sum(1)

    def edge(self, one: int, other: int) -> Tensor:
        """(J) of what a judge says to be one of two classes that are each other's opposite, the share that is so less
        the share of which the opposite is: 1 is a perfect judge, 0 one who does not look, -1 an adversary.

        1 - 2e where both are as common and a share e comes out the wrong way round. Unlike accuracy it has nothing of
        how easy the other classes are to tell.
        """
        said = self.confusion * self.prior[:, None]  # (J, true, said)
        so = said[:, one, one] + said[:, other, other]
        opposite = said[:, one, other] + said[:, other, one]
        return (so - opposite) / said[:, :, (one, other)].sum((1, 2))


def dawid_skene(things: Tensor, judges: Tensor, said: Tensor, *, classes: int) -> Choices:
    """Truth and judges of choices among classes, by expectation maximisation: Dawid and Skene 1979.

    In turns: what is true, P(k | i) ~ p_k * prod_j c_j[k, said_ij], begun with the share of votes; and each judge's
    confusion c_j[k, l] and the prior p_k, by counting with those chances. Each judge's rows begin with
    `EARLIER_CHOICES` choices, most of them right, so that who said little is not believed to be perfect, or worthless.

    things, judges, said: (N) ints from 0, one row a choice; all three of one length, at least 1.
    """
    assert len(things) == len(judges) == len(said) > 0, (len(things), len(judges), len(said))
    count, people = int(things.max()) + 1, int(judges.max()) + 1
    wrong = EARLIER_CHOICES * (1 - EARLIER_RIGHT) / max(1, classes - 1)
    earlier = torch.full((classes, classes), wrong, dtype=torch.float64)
    earlier.fill_diagonal_(EARLIER_CHOICES * EARLIER_RIGHT)
    votes = torch.zeros(count, classes, dtype=torch.float64)
    votes.index_put_((things, said), torch.ones(len(said), dtype=torch.float64), accumulate=True)
    truth = votes / votes.sum(1, keepdim=True).clamp(min=1)
    for _ in range(PASSES):
        counts = earlier.expand(people, classes, classes).transpose(1, 2).clone()  # (J, said, true)
        counts.index_put_((judges, said), truth[things], accumulate=True)
        confusion = counts.transpose(1, 2) / counts.sum(1)[:, :, None]  # (J, true, said)
        prior = truth.mean(0)
        logs = prior.clamp(min=1e-12).log().expand(count, classes).clone()
        logs.index_add_(0, things, confusion.log()[judges, :, said])
        before, truth = truth, logs.softmax(1)
        if float((truth - before).abs().max()) < CLOSE_ENOUGH:
            break
    return Choices(truth, confusion, prior)


@dataclass(frozen=True, slots=True)
class Ratings:
    """How good each thing is, and how each judge turns that into a number. I things, J judges."""

    quality: Tensor
    """(I) of mean 0 and variance about 1 over all things, drawn to 0 where little was said."""
    bias: Tensor
    """(J) what a judge gives a thing of quality 0."""
    scale: Tensor
    """(J) how much more for one of quality 1; below 0 for who has it the wrong way round."""
    noise: Tensor
    """(J) standard deviation of what is left."""

    @property
    def correlation(self) -> Tensor:
        """(J) of a judge's ratings with quality: 1 is a perfect judge, 0 one who does not look, -1 an adversary."""
        return self.scale / (self.scale**2 + self.noise**2).sqrt()


def rating_effects(things: Tensor, judges: Tensor, ratings: Tensor) -> Ratings:
    """A bias, a scale and a noise for each judge, and each thing's quality: the model of one factor.

    r_ij = b_j + s_j * q_i + e_ij, with q_i ~ N(0, 1) and e_ij ~ N(0, v_j), by expectation maximisation (Rubin and
    Thayer 1982), whatever is missing left out. Each judge's line is pulled to everybody's as if by `EARLIER_RATINGS`
    ratings.

    things, judges: (N) ints from 0, ratings: (N); one row a rating, at least one.
    """
    assert len(things) == len(judges) == len(ratings) > 0, (len(things), len(judges), len(ratings))
    count, people = int(things.max()) + 1, int(judges.max()) + 1
    r = ratings.double()

    def by_thing(x: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, things, x)

    def by_judge(x: Tensor) -> Tensor:
        return torch.zeros(people, dtype=torch.float64).index_add_(0, judges, x)

    ones = torch.ones_like(r)
    n = by_judge(ones)
    middle, spread = r.mean(), r.std(correction=0).clamp(min=LEAST_NOISE**0.5)
    bias = (by_judge(r) + EARLIER_RATINGS * middle) / (n + EARLIER_RATINGS)
    scale = (spread * 0.5**0.5).expand(people).clone()
    variance = (spread**2 / 2).expand(people).clone()
    for _ in range(PASSES):
        weight = scale[judges] / variance[judges]
        precision = 1 + by_thing(scale[judges] * weight)
        quality = by_thing(weight * (r - bias[judges])) / precision  # (I) expected
        unsure = 1 / precision  # (I) variance
        q, q2 = quality[things], (quality**2 + unsure)[things]
        # everybody's line is worth EARLIER_RATINGS things of quality 0 and variance 1 to each judge
        all_bias, all_scale = bias.mean(), scale.mean()
        s1, sq, sqq = n + EARLIER_RATINGS, by_judge(q), by_judge(q2) + EARLIER_RATINGS
        sr, srq = by_judge(r) + EARLIER_RATINGS * all_bias, by_judge(r * q) + EARLIER_RATINGS * all_scale
        determinant = s1 * sqq - sq**2
        before = torch.cat([bias, scale])
        bias, scale = (sqq * sr - sq * srq) / determinant, (s1 * srq - sq * sr) / determinant
        left = (r - bias[judges] - scale[judges] * q) ** 2 + scale[judges] ** 2 * unsure[things]
        variance = (by_judge(left) + EARLIER_RATINGS * variance.mean()) / s1
        variance = variance.clamp(min=LEAST_NOISE)
        if float((torch.cat([bias, scale]) - before).abs().max()) < CLOSE_ENOUGH:
            break
    turned = -1.0 if float((n * scale).sum()) < 0 else 1.0
    return Ratings(turned * quality, bias, turned * scale, variance.sqrt())


def area_under_curve(bad: Tensor, good: Tensor) -> float:
    """How well a score tells two groups apart: how often one of `bad` has more than one of `good`, ties half.

    The area under the receiver's operating curve, which is the statistic of Mann and Whitney 1947.
    """
    assert len(bad) > 0, "nobody to find"
    assert len(good) > 0, "nobody to tell them from"
    apart = bad[:, None] - good[None, :]
    return float(((apart > 0).double() + 0.5 * (apart == 0).double()).mean())
