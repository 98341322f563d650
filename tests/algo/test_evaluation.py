import math
import random
from itertools import combinations, product

import pytest
import torch

from rlhf_ray.algo.evaluation import (
    best_of_n,
    best_of_n_kl,
    length_controlled_win_rate,
    paired_z,
    repetition,
    self_bleu,
    win_rate,
    win_shares,
)


def test_win_shares_worked_by_hand() -> None:
    assert win_shares([[1.0, 3.0]], [[2.0, 3.0]]) == [(0 + 0 + 1 + 0.5) / 4]
    assert win_shares([[5.0], [0.0]], [[1.0, 2.0, 3.0], [0.0]]) == [1.0, 0.5]


def test_win_rates_equal_a_loop_and_their_interval_holds_them() -> None:
    rng = random.Random(0)
    ours, theirs = ([[rng.gauss(mean, 1) for _ in range(4)] for _ in range(60)] for mean in (0.5, 0.0))
    pairs = [a > b for row, other in zip(ours, theirs, strict=True) for a, b in product(row, other)]
    rate, (low, high) = win_rate(ours, theirs, seed=0)
    assert rate == pytest.approx(sum(pairs) / len(pairs))
    assert 0.5 < low < rate < high < 0.8
    assert win_rate(theirs, ours, seed=0)[0] == pytest.approx(1 - rate)
    assert win_rate(ours, theirs, seed=0) == win_rate(ours, theirs, seed=0)


def test_a_win_that_is_all_length_is_none_once_length_is_accounted_for() -> None:
    rng = random.Random(1)
    longer = [rng.gauss(20, 30) for _ in range(4000)]
    wins = [float(rng.random() < 1 / (1 + math.exp(-d / 15))) for d in longer]
    assert sum(wins) / len(wins) > 0.65
    assert length_controlled_win_rate(wins, longer) == pytest.approx(0.5, abs=0.05)


def test_where_length_plays_no_part_the_rate_stays() -> None:
    rng = random.Random(2)
    longer = [rng.gauss(0, 30) for _ in range(4000)]
    wins = [float(rng.random() < 0.7) for _ in longer]
    assert length_controlled_win_rate(wins, longer) == pytest.approx(sum(wins) / len(wins), abs=0.02)
    assert length_controlled_win_rate([1.0, 0.0, 0.5], [0.0, 0.0, 0.0]) == pytest.approx(0.5)


def test_the_regression_agrees_with_a_plain_gradient_descent() -> None:
    rng = random.Random(3)
    longer = [rng.gauss(5, 20) for _ in range(300)]
    wins = [rng.choice([0.0, 0.5, 1.0]) if d < 0 else 1.0 for d in longer]
    d = torch.tensor(longer, dtype=torch.float64)
    x = (d / d.square().mean().sqrt()).tanh()
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([a, b], max_iter=500, tolerance_grad=1e-12)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        nll = torch.nn.functional.binary_cross_entropy_with_logits(
            a + b * x, torch.tensor(wins, dtype=torch.float64), reduction="sum"
        )
        total = nll + 0.5 * len(wins) * (1e-6 * a**2 + 1e-3 * b**2)
        total.backward()
        return total

    optimizer.step(loss)
    assert length_controlled_win_rate(wins, longer) == pytest.approx(torch.sigmoid(a).item(), abs=1e-5)


def test_even_where_length_decides_everything_the_rate_is_a_number() -> None:
    longer = [1.0, 2.0, 3.0, -1.0, -2.0, -3.0]
    assert length_controlled_win_rate([1.0] * 3 + [0.0] * 3, longer) == pytest.approx(0.5, abs=0.01)


def test_self_bleu_of_the_same_and_of_quite_other_answers() -> None:
    same = [["we", "send", "a", "new", "lamp", "today"]] * 3
    assert self_bleu(same) == pytest.approx(1.0)
    other = [["we", "send", "a", "new", "lamp", "today"], ["please", "return", "it", "by", "post"]]
    assert self_bleu(other) == 0.0
    near = [["we", "send", "a", "new", "lamp", "today"], ["we", "send", "a", "new", "chair", "today"]]
    assert 0.3 < self_bleu(near) < 1.0


def test_self_bleu_worked_by_hand() -> None:
    # unigrams 2 of 3, bigrams (1 + 1) of (2 + 1), both ways, no brevity penalty: sqrt(2/3 * 2/3)
    assert self_bleu([["a", "b", "c"], ["a", "b", "d"]], n=2) == pytest.approx(2 / 3)
    # "a" against "a b": unigrams 1 of 1, penalty exp(1 - 2); "a b" against "a": 1 of 2, no penalty
    assert self_bleu([["a"], ["a", "b"]], n=1) == pytest.approx((math.exp(-1) + 0.5) / 2)


def test_paired_z_worked_by_hand() -> None:
    # differences 1, 2, 3: mean 2, sd 1, error 1 / sqrt 3
    assert paired_z([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == pytest.approx(2 * math.sqrt(3))
    assert paired_z([0.0, 0.0], [0.0, 0.0]) == 0.0
    assert paired_z([-1.0, -1.0], [0.0, 0.0]) == -math.inf


def test_repetition_worked_by_hand() -> None:
    assert repetition(["a", "b", "c", "a", "b", "c"]) == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition(["a", "b"]) == 0.0
    assert repetition(["a"] * 6) == pytest.approx(3 / 4)


def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n() -> None:
    rng = random.Random(3)
    scores, values = [rng.gauss(0, 1) for _ in range(7)], [rng.random() for _ in range(7)]
    for n, expected in enumerate(best_of_n(scores, values), 1):
        draws = list(combinations(range(7), n))
        chosen = [values[max(draw, key=lambda i: scores[i])] for draw in draws]
        assert expected == pytest.approx(sum(chosen) / len(draws))


def test_the_best_of_n_worked_by_hand_and_equal_scores_share_their_values() -> None:
    assert best_of_n([1.0, 2.0], [10.0, 0.0]) == [5.0, 0.0]
    assert best_of_n([2.0, 2.0, 1.0], [1.0, 0.0, 5.0]) == pytest.approx([2.0, 0.5, 0.5])
    assert best_of_n([0.0] * 4, [1.0, 2.0, 3.0, 6.0]) == pytest.approx([3.0] * 4)


def test_the_kl_of_choosing_is_exact_for_answers_that_all_score_differently() -> None:
    assert best_of_n_kl(1) == 0
    # of many equally likely answers the i-th from below is chosen with probability (i/m)^n - ((i-1)/m)^n
    m, n = 20_000, 4
    chosen = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
    assert best_of_n_kl(n) == pytest.approx(sum(p * math.log(p * m) for p in chosen), abs=1e-3)
