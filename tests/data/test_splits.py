from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.splits import folds_by_group, split_by_group
from rlhf_ray.errors import DataError


def first_letter(item: str) -> str:
    return item[0]


@given(st.lists(st.text(min_size=1), min_size=2), st.integers(0, 5))
def test_a_split_loses_nothing_and_shares_no_group(items: list[str], seed: int) -> None:
    groups = {first_letter(item) for item in items}
    if len(groups) < 2:
        return
    train, held_out = split_by_group(items, group=first_letter, held_out=1, seed=seed)
    assert Counter(train + held_out) == Counter(items)
    assert {first_letter(item) for item in train} & {first_letter(item) for item in held_out} == set()


def test_a_share_and_a_number_count_groups_not_items() -> None:
    items = [f"{letter}{number}" for letter in "abcdefghij" for number in range(5)]
    for held_out in (0.2, 2):
        assert len(split_by_group(items, group=first_letter, held_out=held_out, seed=0)[1]) == 10


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    items = [str(number) for number in range(100)]
    split = {seed: set(split_by_group(items, group=str, held_out=20, seed=seed)[1]) for seed in (0, 1)}
    assert set(split_by_group(items[::-1], group=str, held_out=20, seed=0)[1]) == split[0]
    assert split[0] != split[1]


def test_a_share_of_few_groups_is_one_of_them() -> None:
    train, held_out = split_by_group(["a", "b", "c"], group=str, held_out=0.1, seed=0)
    assert (len(train), len(held_out)) == (2, 1)


@pytest.mark.parametrize(
    ("items", "held_out"),
    [([], 0.5), (["a"], 0.5), (["a", "a"], 1), (["a", "b"], 2), (["a", "b"], 0)],
)
def test_too_few_to_hold_any_out_is_an_error_with_the_way_out(items: list[str], held_out: float) -> None:
    with pytest.raises(DataError, match="give more data or change held_out"):
        split_by_group(items, group=str, held_out=held_out, seed=0)


def test_folds_hold_each_item_out_once_and_share_no_group() -> None:
    items = [f"{letter}{number}" for letter in "abcdefg" for number in range(3)]
    splits = list(folds_by_group(items, group=first_letter, folds=3, seed=0))
    assert Counter(item for _, held_out in splits for item in held_out) == Counter(items)
    for train, held_out in splits:
        assert {item[0] for item in train}.isdisjoint(item[0] for item in held_out)
        assert len(train) + len(held_out) == len(items)


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_impossible_folds_are_refused(folds: int) -> None:
    with pytest.raises(DataError, match="folds"):
        folds_by_group(["a", "b", "c"], group=str, folds=folds, seed=0)
