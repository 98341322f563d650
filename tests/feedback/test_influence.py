from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.influence import beyond


def rows(**counts: int) -> list[tuple[int, str]]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return list(enumerate(names))


def left(cap: float, **counts: int) -> dict[str, int]:
    all_rows = rows(**counts)
    out = beyond(cap, all_rows)
    return dict(Counter(name for number, name in all_rows if number not in out))


def test_by_hand() -> None:
    """a of 10, 2 and 2 may have m <= (m + 4) / 2, so 4; with a third, 3 <= 0.25 x (3 + 3 + 3 + 3)."""
    assert left(0.5, a=10, b=2, c=2) == {"a": 4, "b": 2, "c": 2}
    assert left(0.25, a=10, b=3, c=9, d=3) == {"a": 3, "b": 3, "c": 3, "d": 3}
    assert left(1, a=10) == {"a": 10}
    assert beyond(0.5, []) == frozenset()


def test_too_few_annotators_for_such_a_share_are_named_with_the_least_cap() -> None:
    with pytest.raises(FeedbackError, match=r"of 3 annotators .* give a cap of 0.333 or more"):
        beyond(0.2, rows(a=5, b=5, c=5))
    with pytest.raises(FeedbackError, match="cap 0: give a share above 0"):
        beyond(0, rows(a=1))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.floats(0.5, 1))
def test_nobody_has_more_than_their_share_and_one_more_would_be_too_many(counts: list[int], cap: float) -> None:
    kept = left(cap, **{f"a{n}": count for n, count in enumerate(counts)})
    total = sum(kept.values())
    assert all(count <= cap * total + 1e-6 for count in kept.values())
    most = max(kept.values())
    if any(count > most for count in counts):
        more = [min(count, most + 1) for count in counts]
        assert most + 1 > cap * sum(more)


def test_the_same_rows_are_left_out_each_time_and_by_whom_else_is_there_does_not_matter() -> None:
    assert beyond(0.5, rows(a=10, b=2, c=2)) == beyond(0.5, rows(a=10, b=2, d=2))
