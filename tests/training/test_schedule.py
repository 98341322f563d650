import random

import pytest

from rlhf_ray.training.schedule import LengthGrouped, Pace


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    pace = Pace(120, eval_every=50, tail=0.2)
    factors = [pace.factor(step) for step in range(121)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert factors[6:101] == [1.0] * 95
    assert factors[110] == pytest.approx(0.5)
    assert factors[120] == 0


def test_a_fit_too_short_for_a_second_look_decays_too() -> None:
    pace = Pace(12, eval_every=50, tail=0.2)
    assert [pace.factor(step) for step in (9, 10, 11, 12)] == [1.0, 1.0, 0.5, 0.0]


def test_a_decay_that_begins_early_ends_early() -> None:
    pace = Pace(120, eval_every=50, tail=0.2)
    pace.turn_flat(50)
    assert pace.end == 60
    assert [pace.factor(step) for step in (50, 55, 60)] == [1.0, 0.5, 0.0]


def test_with_a_schedule_of_trainers_there_is_no_decay_and_a_flat_loss_ends_the_fit() -> None:
    pace = Pace(120, eval_every=50, tail=0.2, scheduled=True)
    assert (pace.tail_start, pace.end) == (120, 120)
    pace.turn_flat(50)
    assert pace.end == 50


def test_an_epoch_visits_every_item_once_and_the_next_in_another_order() -> None:
    rng = random.Random(0)
    sampler = LengthGrouped([rng.randrange(5, 60) for _ in range(333)], 8, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(333)) != first
    assert first != second


def test_batches_hold_like_lengths_in_an_order_that_says_nothing() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(5, 60) for _ in range(1024)]
    order = list(LengthGrouped(lengths, 8, seed=0))
    batches = [[lengths[index] for index in order[start : start + 8]] for start in range(0, 1024, 8)]
    padded = sum(8 * max(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    longest = [max(batch) for batch in batches]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
