"""Figures that set one policy beside another: who wins, by how much of it is length, and how varied the answers are."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from rlhf_ray.algo.ranking import bootstrap_mean_ci

Tokens = Sequence[Hashable]


def win_shares(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    """For each prompt the share of pairs, an answer of ours and one of theirs, in which ours has more; ties count half.

    Rows are prompts, columns answers; the two may have different numbers of them.
    """
    return [
        sum((a > b) + 0.5 * (a == b) for a in row for b in other) / (len(row) * len(other))
        for row, other in zip(ours, theirs, strict=True)
    ]


def win_rate(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int
) -> tuple[float, tuple[float, float]]:
    """The mean of `win_shares`, and its 95% interval by bootstrap over prompts."""
    shares = win_shares(ours, theirs)
    return sum(shares) / len(shares), bootstrap_mean_ci(shares, seed=seed)


def length_controlled_win_rate(wins: Sequence[float], longer_by: Sequence[float]) -> float:
    """What the win rate would be if the answers were equally long.

    The logistic regression P(win) = sigmoid(a + b * tanh(d / sd)), d how much longer ours is, read at d = 0, after
    Dubois et al. 2024 (arXiv:2404.04475), section 3, without its term for the prompt's difficulty. A ridge of 0.001 on
    b keeps it finite where length decides everything.

    wins: (N) 1 where ours won, 0.5 for a tie, else 0; longer_by: (N) in tokens or characters.
    """
    assert len(wins) == len(longer_by) > 0, (len(wins), len(longer_by))
    y = torch.tensor(wins, dtype=torch.float64)
    d = torch.tensor(longer_by, dtype=torch.float64)
    spread = d.square().mean().sqrt()
    x = torch.stack([torch.ones_like(d), (d / spread).tanh() if spread > 0 else torch.zeros_like(d)], dim=1)  # (N, 2)
    ridge = torch.tensor([1e-6, 1e-3], dtype=torch.float64) * len(y)
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):  # Newton's method on a convex function
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + ridge * weights
        hessian = (x * (p * (1 - p)).unsqueeze(1)).T @ x + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step.clamp(-2.0, 2.0)
        if step.abs().max() < 1e-10:
            break
    return float(torch.sigmoid(weights[0]))


def best_of_n(scores: Sequence[float], values: Sequence[float]) -> list[float]:
    """What to expect of the best by score among n of these answers to one prompt, for n = 1 to N.

    E_n = sum over i of C(i - 1, n - 1) / C(N, n) * value of the answer with the i-th lowest score, which is the mean
    over all choices of n among the N: Nakano et al. 2021 (arXiv:2112.09332), appendix I. Equal scores share values.

    scores, values: (N); give the scores themselves as values for what choosing does to the score.
    """
    assert len(scores) == len(values) > 0, (len(scores), len(values))
    equals: dict[float, list[float]] = {}
    for score, value in zip(scores, values, strict=True):
        equals.setdefault(score, []).append(value)
    ranked = [sum(shared) / len(shared) for _, shared in sorted(equals.items()) for _ in shared]
    total = len(ranked)
    return [
        sum(math.comb(i, n - 1) * value for i, value in enumerate(ranked)) / math.comb(total, n)
        for n in range(1, total + 1)
    ]


def best_of_n_kl(n: int) -> float:
    """How far choosing the best of n takes a policy from itself: log n - (n - 1) / n nats a response, at most.

    Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3; a bound that is met where no two answers score the same
    (Beirami et al. 2024, arXiv:2401.01879).
    """
    assert n >= 1, n
    return math.log(n) - (n - 1) / n


def paired_z(now: Sequence[float], then: Sequence[float]) -> float:
    """By how many standard errors the mean of `now` lies above that of `then`, (N) each, paired; 0 where equal.

    z = mean(d) / (sd(d) / sqrt(N)), d = now - then, sd with Bessel's correction.
    """
    assert len(now) == len(then) > 1, (len(now), len(then))
    d = torch.tensor(now, dtype=torch.float64) - torch.tensor(then, dtype=torch.float64)
    error = d.std() / math.sqrt(len(now))
    return float(d.mean() / error) if error > 0 else math.copysign(math.inf, d.mean().item()) if d.mean() else 0.0


def self_bleu(answers: Sequence[Tokens], *, n: int = 4) -> float:
    """How alike answers to one prompt are: the mean over them of BLEU against the others; 1 where all are the same.

    Zhu et al. 2018 (arXiv:1802.01886). BLEU: the geometric mean over 1 to n of the clipped share of n-grams, times the
    brevity penalty (Papineni et al. 2002), smoothed by adding 1 to both counts from bigrams on (Lin and Och 2004).
    """
    assert len(answers) > 1, "one answer is like no other"
    return sum(_bleu(answer, [*answers[:i], *answers[i + 1 :]], n) for i, answer in enumerate(answers)) / len(answers)


def repetition(tokens: Tokens, *, n: int = 3) -> float:
    """The share of n-grams that came before in the same answer; 0 where there is none."""
    grams = _grams(tokens, n)
    return 1.0 - len(grams) / grams.total() if grams else 0.0


def _bleu(answer: Tokens, references: Sequence[Tokens], n: int) -> float:
    if not answer:
        return float(any(not reference for reference in references))
    logs = 0.0
    for size in range(1, n + 1):
        own = _grams(answer, size)
        most: Counter[Tokens] = Counter()
        for reference in references:
            most |= _grams(reference, size)
        matched, total = sum((own & most).values()), own.total()
        smooth = 0 if size == 1 else 1
        if matched + smooth == 0:
            return 0.0
        logs += math.log((matched + smooth) / (total + smooth)) / n
    nearest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    return math.exp(logs + min(0.0, 1 - nearest / len(answer)))


def _grams(tokens: Tokens, n: int) -> Counter[Tokens]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
