"""How much of a set of feedback one annotator may make up."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from rlhf_ray.errors import FeedbackError


def beyond(cap: float, rows: Sequence[tuple[int, str]]) -> frozenset[int]:
    """Which rows to leave out so that nobody has more than the share `cap` of what is left, and as few as possible.

    rows: number and annotator. Of each annotator with too many the same are left out each time, drawn by a hash of
    their numbers. `FeedbackError` where there are too few annotators for such a share.
    """
    if not 0 < cap <= 1:
        raise FeedbackError(f"cap {cap:g}: give a share above 0, at most 1")
    counts = Counter(annotator for _, annotator in rows)
    most = _most(cap, list(counts.values()))
    if counts and most == 0:
        raise FeedbackError(
            f"of {len(counts)} annotators one has more than a share of {cap:g} whatever is left out: give a cap of "
            f"{1 / len(counts):.3g} or more"
        )
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, annotator in rows:
        numbers[annotator].append(number)
    return frozenset(
        number for mine in numbers.values() if len(mine) > most for number in sorted(mine, key=_draw)[most:]
    )


def _most(cap: float, counts: Sequence[int]) -> int:
    """The largest m with m <= cap * sum(min(n, m)): the right side grows ever slower, so below it all are good."""
    low, high = 0, max(counts, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if middle <= cap * sum(min(count, middle) for count in counts) + 1e-9:
            low = middle
        else:
            high = middle - 1
    return low


def _draw(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()
