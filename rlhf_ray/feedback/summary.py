"""What lies in a pile of feedback: how much of which kind, on whose answers, by whom."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rlhf_ray.feedback.schema import Feedback, Kind, Scale


@dataclass(frozen=True, slots=True)
class Tally:
    """How often a sampler's answers were judged, or how often an annotator judged."""

    name: str
    n: int
    mean: float | None
    """Mean overall rating on the store's scale; None where nothing was rated on it."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts and mean ratings, tallies by name."""

    rows: int
    by_kind: dict[Kind, int]
    scale: Scale | None
    """Of mean ratings: that of stars and points which most overall ratings are on; two scales do not mix."""
    by_sampler: tuple[Tally, ...]
    """`n` counts answers: a ranking of four judges four."""
    by_annotator: tuple[Tally, ...]
    """`n` counts judgements."""


def summarise(feedback: Iterable[Feedback]) -> StoreStats:
    """Counts and mean ratings by kind, by sampler and by annotator, in one pass."""
    kinds: Counter[Kind] = Counter()
    judged: Counter[str] = Counter()
    judging: Counter[str] = Counter()
    scales: Counter[Scale] = Counter()
    of_sampler: defaultdict[tuple[Scale, str], _Sum] = defaultdict(_Sum)
    of_annotator: defaultdict[tuple[Scale, str], _Sum] = defaultdict(_Sum)
    for item in feedback:
        kinds[item.kind] += 1
        judging[item.annotator] += 1
        judged.update(answer.sampler for answer in item.answers)
        rating = item.rating
        if rating and rating.scale != "thumb" and rating.aspect == "overall":
            scales[rating.scale] += 1
            of_sampler[rating.scale, item.answers[0].sampler].add(rating.value)
            of_annotator[rating.scale, item.annotator].add(rating.value)
    scale = max(scales, key=lambda scale: scales[scale], default=None)
    return StoreStats(
        kinds.total(), dict(kinds), scale, _tallies(judged, of_sampler, scale), _tallies(judging, of_annotator, scale)
    )


@dataclass(slots=True)
class _Sum:
    total: float = 0.0
    n: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.n += 1


def _tallies(
    counts: Mapping[str, int], ratings: Mapping[tuple[Scale, str], _Sum], scale: Scale | None
) -> tuple[Tally, ...]:
    means = {name: total.total / total.n for (on, name), total in ratings.items() if on == scale}
    return tuple(Tally(name, n, means.get(name)) for name, n in sorted(counts.items()))
