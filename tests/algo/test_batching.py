import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algo.batching import by_length, dealt_by_length, dealt_by_weight, minibatches, pad

quick = settings(deadline=None, max_examples=60)
sequences = st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=6)
lengths = st.lists(st.integers(0, 50), max_size=40)


@quick
@given(sequences)
def test_padding_keeps_every_sequence_and_adds_only_the_value(rows: list[list[int]]) -> None:
    padded = pad(rows, value=-1, dtype=torch.int64)
    assert padded.shape == (len(rows), max(map(len, rows), default=0))
    for row, sequence in zip(padded.tolist(), rows, strict=True):
        assert row == sequence + [-1] * (len(row) - len(sequence))


def test_padding_takes_tuples_of_floats() -> None:
    padded = pad([(0.5,), (1.0, 2.0)], value=0.0, dtype=torch.float32)
    assert torch.equal(padded, torch.tensor([[0.5, 0.0], [1.0, 2.0]]))


@quick
@given(st.integers(0, 50), st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_an_epoch_of_minibatches_visits_each_number_once(n: int, size: int, seed: int) -> None:
    batches = [b.tolist() for b in minibatches(n, size, torch.Generator().manual_seed(seed))]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(batches)


def test_the_order_is_the_generator_s_and_changes_from_epoch_to_epoch() -> None:
    def two_epochs() -> list[list[int]]:
        generator = torch.Generator().manual_seed(4)
        return [torch.cat(list(minibatches(64, 10, generator))).tolist() for _ in range(2)]

    assert two_epochs() == two_epochs()
    first, second = two_epochs()
    assert first != second
    assert first != sorted(first)


@quick
@given(lengths, st.integers(1, 200))
def test_batches_by_length_hold_each_index_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = by_length(lengths, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)


@quick
@given(lengths, st.integers(1, 200))
def test_no_batch_closes_while_the_next_sequence_still_fits(lengths: list[int], max_tokens: int) -> None:
    batches = by_length(lengths, max_tokens=max_tokens)
    assert all((len(batch) + 1) * lengths[batch[0]] > max_tokens for batch in batches[:-1])


def test_batches_by_length_equal_those_worked_by_hand() -> None:
    assert by_length([3, 10, 4, 4, 25], max_tokens=12) == [[4], [1], [2, 3, 0]]


@pytest.mark.parametrize("size", [0, -1])
def test_minibatches_of_nothing_are_refused(size: int) -> None:
    with pytest.raises(AssertionError):
        next(minibatches(4, size, torch.Generator()))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 5))
def test_batches_are_dealt_out_evenly_and_each_sequence_once(lengths: list[int], most: int, hands: int) -> None:
    dealt = dealt_by_length(lengths, max_tokens=most, hands=hands)
    assert len(dealt) == hands
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(row for batches in dealt for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in (batch for batches in dealt for batch in batches if len(batch) > 1):
        assert len(batch) * max(lengths[row] for row in batch) <= most


def test_one_hand_is_dealt_what_by_length_says_and_many_all_have_work() -> None:
    lengths = [5, 9, 3, 8]
    assert dealt_by_length(lengths, max_tokens=100, hands=1) == [by_length(lengths, max_tokens=100)]
    assert all(any(batches) for batches in dealt_by_length(lengths, max_tokens=100, hands=2))
    assert dealt_by_length([4], max_tokens=100, hands=2) == [[[0]], [[]]]


def test_a_batch_ends_where_it_would_be_padded_too_much_unless_it_holds_too_little() -> None:
    lengths = [10, 9, 5, 5, 1]
    assert by_length(lengths, max_tokens=99, padding=1.1) == [[0, 1], [2, 3], [4]]
    assert by_length(lengths, max_tokens=99, padding=1.1, least=20) == [[0, 1, 2], [3, 4]]
    assert by_length(lengths, max_tokens=99) == [[0, 1, 2, 3, 4]]
    assert by_length(lengths, max_tokens=15, padding=1.1) == [[0], [1], [2, 3], [4]]


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120), st.integers(1, 5))
def test_batches_by_weight_hold_all_and_no_more_than_they_may(lengths: list[int], most: int, hands: int) -> None:
    dealt = dealt_by_weight(lengths, max_tokens=most, hands=hands)
    assert len({len(hand) for hand in dealt}) == 1
    batches = [batch for hand in dealt for batch in hand]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= 1 or sum(lengths[index] for index in batch) <= most for batch in batches)


def test_one_batch_holds_all_where_that_fits_and_hands_get_as_much() -> None:
    assert dealt_by_weight([5, 9, 3], max_tokens=17, hands=1) == [[[0, 1, 2]]]
    assert dealt_by_weight([5, 9, 3, 1], max_tokens=100, hands=2) == [[[1]], [[0, 2, 3]]]
    assert dealt_by_weight([8, 7, 6, 5], max_tokens=13, hands=1) == [[[0, 3], [1, 2]]]
