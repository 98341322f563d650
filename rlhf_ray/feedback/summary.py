"""What lies in a pile of feedback: how much of which kind, on whose answers, by whom."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rlhf_ray.feedback.schema import Feedback, Kind


@dataclass(frozen=True, slots=True)
class Tally:
    """How often a sampler's answers were judged, or how often an annotator judged."""

    name: str
    n: int
    mean: float | None
    """Mean overall rating on the 1 to 5 scale; None where nothing was rated."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts and mean ratings, tallies by name."""

    rows: int
    by_kind: dict[Kind, int]
    by_sampler: tuple[Tally, ...]
    """`n` counts answers: a ranking of four judges four."""
    by_annotator: tuple[Tally, ...]
    """`n` counts judgements."""


def summarise(feedback: Iterable[Feedback]) -> StoreStats:
    """Counts and mean ratings by kind, by sampler and by annotator, in one pass."""
    kinds: Counter[Kind] = Counter()
    judged: Counter[str] = Counter()
    judging: Counter[str] = Counter()
    of_sampler: defaultdict[str, list[float]] = defaultdict(list)
    of_annotator: defaultdict[str, list[float]] = defaultdict(list)
    for item in feedback:
        kinds[item.kind] += 1
        judging[item.annotator] += 1
        judged.update(answer.sampler for answer in item.answers)
        if item.rating and item.rating.scale == "stars" and item.rating.aspect == "overall":
            of_sampler[item.answers[0].sampler].append(item.rating.value)
            of_annotator[item.annotator].append(item.rating.value)
    return StoreStats(kinds.total(), dict(kinds), _tallies(judged, of_sampler), _tallies(judging, of_annotator))


def _tallies(counts: Mapping[str, int], ratings: Mapping[str, list[float]]) -> tuple[Tally, ...]:
    return tuple(
        Tally(name, n, sum(ratings[name]) / len(ratings[name]) if name in ratings else None)
        for name, n in sorted(counts.items())
    )
