"""How good feedback is: how far people agree, and which of them can be relied on, from nothing but what they said.

What is compared is what several people said of one thing: of two answers which is better, of one answer how good it is.
Nobody is sent away by this: it shows whom to talk to, and `exclude` is a person's decision.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from rlhf_ray.algo.agreement import Level, krippendorff_alpha, krippendorff_interval
from rlhf_ray.algo.reliability import dawid_skene, rating_effects
from rlhf_ray.feedback.schema import Feedback, digest_of

Thing = tuple[str, ...]
"""What is judged: a prompt and one answer to it, or two."""
BETTER, WORSE, TIE = 0, 1, 2
"""What is said of two answers, in the order of their digests, which says nothing."""
ENOUGH = 20
"""Judgements of things that others judged too, before anything is said of a person."""
AGAINST, SOUND = -0.2, 0.2
"""The edge of choices, which is 0 for somebody who does not look: below the first it is no accident, from the second on
nothing is remarked."""
SLOPE = 0.3
"""The least correlation of somebody's ratings with how good things are that is not remarked upon."""
PLACE_Z = 4.0
"""Standard deviations from chance at which a liking for a place is remarked upon: one in 16,000."""
FAST_S = 2.0
"""Seconds a judgement in which nobody can have read two answers."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far people agree on one kind of judgement."""

    what: str
    level: Level
    alpha: float | None
    """Krippendorff's; None where nothing was judged twice, or nothing varies."""
    ci95: tuple[float, float] | None
    things: int
    """Judged by two people at least."""


@dataclass(frozen=True, slots=True)
class Person:
    """What is known of one annotator."""

    name: str
    judgements: int
    choices: int
    """Between two answers that somebody else compared too."""
    accuracy: float | None
    """Of those, as Dawid and Skene's model has it: how often what this one says is what is so."""
    edge: float | None
    """Of those between two answers of which this one preferred one, the share that is right less the share that is the
    wrong way round: 1 - 2e for a share e of mistakes."""
    ratings: int
    """Of answers that somebody else rated too."""
    bias: float | None
    """Of an answer of middling quality, by how much more than others, on the scale and aspect rated most."""
    scale: float | None
    """How far apart good and bad are, in points a standard deviation of quality, there too."""
    correlation: float | None
    """Of the ratings with quality: 0 is somebody who does not look, below 0 who has it the wrong way round. The
    mean over scales and aspects, by how many ratings of each."""
    first: float | None
    """How often the answer that was shown first came out best, where one did."""
    first_z: float | None
    """By how many standard deviations that differs from an equal chance for each place."""
    consistent: float | None
    """Of what this one judged twice, the share that came out the same."""
    seconds: float | None
    """The median time of a judgement, where it is known."""
    remarks: tuple[str, ...]
    """What somebody should look at."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a pile of feedback."""

    agreement: tuple[Agreement, ...]
    people: tuple[Person, ...]
    """Those with remarks first, then by name."""


def quality_of(feedback: Iterable[Feedback], *, seed: int = 0) -> Quality:
    """Agreement by kind, and what is known of each annotator, in one pass over the feedback."""
    said = _Said()
    for item in feedback:
        said.take(item)
    choices = _shared(said.choices)
    scales: defaultdict[tuple[str, str], dict[Thing, Marks]] = defaultdict(dict)
    for thing, marks in _shared(said.ratings).items():
        scales[thing[2], thing[3]][thing] = marks
    agreement = [
        _agreement("better of two answers", "nominal", choices, seed=seed),
        *(_agreement(f"{scale}, {aspect}", "interval", marks, seed=seed) for (scale, aspect), marks in scales.items()),
    ]
    people = _people(said, _choosers(choices), _raters(scales.values()))
    return Quality(tuple(found for found in agreement if found.things), people)


Marks = dict[str, list[float]]
"""What each annotator said of a thing, once or more often."""


@dataclass(frozen=True, slots=True)
class _Chooser:
    choices: int
    accuracy: float
    edge: float


@dataclass(frozen=True, slots=True)
class _Rater:
    ratings: int
    bias: float
    scale: float
    correlation: float


class _Said:
    """What was said, by thing and by annotator."""

    def __init__(self) -> None:
        self.judgements: Counter[str] = Counter()
        self.choices: dict[Thing, Marks] = {}
        self.ratings: dict[Thing, Marks] = {}
        self.first: defaultdict[str, list[tuple[bool, float]]] = defaultdict(list)
        """Whether the answer shown first came out best, and the chance of that."""
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def take(self, item: Feedback) -> None:
        who = item.annotator
        self.judgements[who] += 1
        if item.seconds is not None:
            self.seconds[who].append(item.seconds)
        if item.rating is not None:
            rating = item.rating
            thing = (item.prompt_id, digest_of(item.answers[0].text), rating.scale, rating.aspect)
            self.ratings.setdefault(thing, {}).setdefault(who, []).append(rating.value)
        elif item.ranking is not None:
            ranked = sorted(
                (digest_of(answer.text), rank) for answer, rank in zip(item.answers, item.ranking.ranks, strict=True)
            )
            for (one, high), (other, low) in combinations(ranked, 2):
                said = TIE if high == low else BETTER if high < low else WORSE
                if one != other:
                    self.choices.setdefault((item.prompt_id, one, other), {}).setdefault(who, []).append(said)
            best = [index for index, rank in enumerate(item.ranking.ranks) if rank == 1]
            if item.display_order is not None and len(best) == 1:
                self.first[who].append((item.display_order[0] == best[0], 1 / len(item.answers)))


def _shared(said: Mapping[Thing, Marks]) -> dict[Thing, Marks]:
    """What two people or more judged."""
    return {thing: marks for thing, marks in said.items() if len(marks) > 1}


def _agreement(what: str, level: Level, things: Mapping[Thing, Marks], *, seed: int) -> Agreement:
    """Each annotator's first word counts."""
    units = [[values[0] for values in marks.values()] for marks in things.values()]
    return Agreement(
        what, level, krippendorff_alpha(units, level), krippendorff_interval(units, level, seed=seed), len(units)
    )


def _columns(things: Mapping[Thing, Marks]) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Annotators, and for each thing said: number of the thing, of the annotator, and what."""
    names = sorted({who for marks in things.values() for who in marks})
    number = {who: n for n, who in enumerate(names)}
    rows = [
        (n, number[who], value)
        for n, marks in enumerate(things.values())
        for who, values in marks.items()
        for value in values
    ]
    numbers, judges, values = zip(*rows, strict=True)
    return names, torch.tensor(numbers), torch.tensor(judges), torch.tensor(values, dtype=torch.float64)


def _choosers(things: Mapping[Thing, Marks]) -> dict[str, _Chooser]:
    if not things:
        return {}
    names, numbers, judges, said = _columns(things)
    found = dawid_skene(numbers, judges, said.long(), classes=3)
    accuracy, edge = found.accuracy.tolist(), found.edge(BETTER, WORSE).tolist()
    counts = judges.bincount().tolist()
    return {name: _Chooser(counts[n], accuracy[n], edge[n]) for n, name in enumerate(names)}


def _raters(scales: Iterable[Mapping[Thing, Marks]]) -> dict[str, _Rater]:
    """By every scale and aspect on which enough was rated by several, or the commonest where that is none of them. They
    do not mix in one model, but each tells something.
    """
    commonest_first = sorted(scales, key=len, reverse=True)
    telling = [things for things in commonest_first if len(things) >= ENOUGH] or commonest_first[:1]
    by_name: defaultdict[str, list[_Rater]] = defaultdict(list)
    for things in telling:
        for name, rater in _raters_on_one(things).items():
            by_name[name].append(rater)
    return {name: _together(raters) for name, raters in by_name.items()}


def _raters_on_one(things: Mapping[Thing, Marks]) -> dict[str, _Rater]:
    names, numbers, judges, ratings = _columns(things)
    found = rating_effects(numbers, judges, ratings)
    counts = judges.bincount().tolist()
    bias, scale, correlation = (found.bias - found.bias.mean()), found.scale, found.correlation
    return {
        name: _Rater(counts[n], float(bias[n]), float(scale[n]), float(correlation[n])) for n, name in enumerate(names)
    }


def _together(raters: Sequence[_Rater]) -> _Rater:
    """One person on several scales: bias and scale, which are in points, of the one with most ratings."""
    main, ratings = max(raters, key=lambda rater: rater.ratings), sum(rater.ratings for rater in raters)
    correlation = sum(rater.correlation * (rater.ratings / ratings) for rater in raters)
    return replace(main, ratings=ratings, correlation=correlation)


def _people(said: _Said, choosers: Mapping[str, _Chooser], raters: Mapping[str, _Rater]) -> tuple[Person, ...]:
    """Those with remarks first."""
    twice = _twice(said)
    people = []
    for name in sorted(said.judgements):
        chooser, rater = choosers.get(name), raters.get(name)
        share, z = _liking(said.first[name])
        seconds = statistics.median(said.seconds[name]) if said.seconds[name] else None
        people.append(
            Person(
                name=name,
                judgements=said.judgements[name],
                choices=chooser.choices if chooser else 0,
                accuracy=chooser.accuracy if chooser else None,
                edge=chooser.edge if chooser else None,
                ratings=rater.ratings if rater else 0,
                bias=rater.bias if rater else None,
                scale=rater.scale if rater else None,
                correlation=rater.correlation if rater else None,
                first=share,
                first_z=z,
                consistent=twice.get(name),
                seconds=seconds,
                remarks=tuple(_remarks(chooser, rater, z, seconds)),
            )
        )
    return tuple(sorted(people, key=lambda person: not person.remarks))


def _remarks(
    chooser: _Chooser | None, rater: _Rater | None, first_z: float | None, seconds: float | None
) -> Iterator[str]:
    if chooser and chooser.choices >= ENOUGH and chooser.edge < SOUND:
        yield "chooses against the others" if chooser.edge < AGAINST else "chooses without regard to the others"
    if rater and rater.ratings >= ENOUGH and rater.correlation < SLOPE:
        yield "rates the wrong way round" if rater.correlation < -SLOPE else "rates without regard to the others"
    if first_z is not None and abs(first_z) > PLACE_Z:
        yield f"prefers what is shown {'first' if first_z > 0 else 'later'}"
    if seconds is not None and seconds < FAST_S:
        yield f"takes less than {FAST_S:g} s a judgement"


def _twice(said: _Said) -> dict[str, float]:
    """By annotator, the share of things judged twice that came out the same."""
    same: defaultdict[str, list[bool]] = defaultdict(list)
    for marks in (*said.choices.values(), *said.ratings.values()):
        for who, values in marks.items():
            same[who] += [again == values[0] for again in values[1:]]
    return {who: statistics.fmean(found) for who, found in same.items() if found}


def _liking(first: Sequence[tuple[bool, float]]) -> tuple[float | None, float | None]:
    """The share of what came out best and was shown first, and how far that is from chance in standard deviations."""
    if not first:
        return None, None
    seen, expected = sum(best for best, _ in first), sum(chance for _, chance in first)
    spread = math.sqrt(sum(chance * (1 - chance) for _, chance in first))
    return seen / len(first), (seen - expected) / spread
